"""How long a fused kernel should take with given tiles on an H200, predicted from its machine code; needs no GPU.

The main loop is the innermost one with the matrix instructions. An iteration is charged to four things that can run
beside one another: the tensor cores, the instruction pipes, shared memory and the L2 cache. Their maximum is the time
with perfect overlap ("best"); "likely" lets a program overlap its copies and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import compile_report
from benchmarks.gpu.launch_model import (
    ARCHITECTURE,
    BANDWIDTH,
    CLOCK_HZ,
    GPU,
    H200,
    L2_BYTES_A_CLOCK,
    MULTIPROCESSORS,
    SCHEDULES,
    grid,
    library_product,
)  # fmt: skip
from benchmarks.gpu.plan import PRECISIONS, vit_layers
from benchmarks.model import tasks
from benchmarks.support.common import LAYER_SHAPES
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles

WGMMA_MACS = {"BF16": 2048, "F16": 2048, "TF32": 1024}
"""Multiply-adds a clock of a multiprocessor, by the type of the operands (H100 datasheet)."""

MMA_SHARE = 0.62
"""Of that rate which ``mma.sync`` reaches (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU, 2024)."""

SHARED_BYTES_A_CLOCK = 128
"""A multiprocessor's shared memory, reads, writes and the operands of matrix instructions together."""

MEMORY_CLOCKS, L2_CLOCKS = 1230, 600
"""From the request of a tile to its arrival under load: 700 ns from memory (by which 4.3 TB/s need 23 KB in flight a
multiprocessor), half of that from the L2 cache."""

_PIPES = (
    # Clocks for which a warp's instruction holds its scheduler's pipe: 32 lanes over a quarter of the rate that the
    # CUDA programming guide gives for compute capability 9.0: FP32 128 a clock, integers 64, conversions 64, others 16.
    ("fma", 1.0, r"FFMA|FMUL|FADD"),
    ("fma", 2.0, r"IMAD|DFMA|DMUL|DADD"),
    ("alu", 2.0, r"F2FP|IADD3|LOP3|SHF|PRMT|I?SEL|[IF]SETP|FSEL|LEA|VIADD|IMNMX|FMNMX|SGXT|PLOP3|IABS|MOV"),
    ("special", 8.0, r"MUFU|F2F|F2I|I2F|S2R|POPC|SHFL"),
)

SHAPES = (*LAYER_SHAPES, (8192, 8192))
"""(N, K) of ViT-B's layers and of one whose weight no L2 cache holds."""

OVERHEAD_M = (394, 788, 1576, 3152, 6304, 12608, 50432)
"""M over which :func:`overheads` are taken, and layers of ViT-B, L and H."""


class Instruction(NamedTuple):
    """One line of machine code: ``HGMMA.64x128x16.F32.BF16``, the rest of it, and the clocks its warp then stalls."""

    name: str
    operands: str
    stall: int

    @property
    def product(self) -> tuple[int, str]:
        """Multiply-adds and type of the operands of a warpgroup's HGMMA or a warp's HMMA; (0, "") of others."""
        if found := _PRODUCT.match(self.name):
            *sizes, kind = found.groups()
            return math.prod(int(size) for size in sizes if size), kind or "F16"
        return 0, ""


_PRODUCT = re.compile(r"H(?:GMMA\.(\d+)x(\d+)x(\d+)|MMA\.(16)(8)(16|8|4))\.F32(?:\.(BF16|TF32))?")
_LINE = re.compile(r"^(?:\d\d|--):[\d-]:[\d-]:[Y-]:([0-9a-f])\s+(?:@!?U?P[T\d]\s+)?([A-Z][\w.]*);?\s*(.*?);?\s*$")


class Code:
    """A kernel's instructions.

    Raises:
        ValueError: ``sass``, as Triton's ``compiled.asm["sass"]`` has it, holds no instruction.
    """

    def __init__(self, sass: str) -> None:
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for line in sass.splitlines():
            if found := _LINE.match(line):
                self.instructions.append(Instruction(found[2], found[3], int(found[1], 16)))
            elif line.rstrip().endswith(":"):
                self._labels[line.strip()[:-1]] = len(self.instructions)
        if not self.instructions:
            raise ValueError(f"sass must be machine code with its stall counts; got {sass[:80]!r}")

    def target(self, index: int) -> int | None:
        """Where the branch at ``index`` leads, by label or address (16 bytes an instruction); None without one."""
        instruction = self.instructions[index]
        if not instruction.name.startswith("BRA"):
            return None
        if found := re.search(r"\b0x([0-9a-f]+)$", instruction.operands):
            return int(found[1], 16) // 16
        found = re.search(r"\.?L\w+", instruction.operands)
        return self._labels.get(found[0]) if found else None

    def macs(self, within: range) -> int:
        """Multiply-adds of the instructions within a range."""
        return sum(self.instructions[i].product[0] for i in within)

    def main_loop(self) -> range | None:
        """The innermost loop with matrix instructions; of several the one with most multiply-adds, None without any."""
        targets = ((self.target(end), end) for end in range(len(self.instructions)))
        loops = [range(start, end + 1) for start, end in targets if start is not None and start <= end]
        loops = [loop for loop in loops if self.macs(loop)]
        inner = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
        return max(inner, key=self.macs, default=None)

    def jumped_over(self, within: range) -> Iterator[range]:
        """What forward branches within a range jump over, unless there are matrix instructions in it; outermost."""
        index = within.start
        while index < within.stop:
            inner = range(index + 1, self.target(index) or index)
            if len(inner) and inner.stop <= within.stop and not self.macs(inner):
                yield inner
                index = inner.stop
            else:
                index += 1


class Loop(NamedTuple):
    """An iteration of one program's main loop: clocks of a multiprocessor that does nothing else."""

    macs: int  # of all its warps
    instruction: str  # "HGMMA" or "HMMA"
    tensor: float
    issue: float  # the busiest of the schedulers' slots and pipes
    stalls: int  # of one warp, before any wait for data
    operands: float  # shared memory read by loads and matrix instructions
    outside: int  # instructions of a warp before and after the loop
    rare: int  # and in the loop, where most iterations jump over them: a persistent grid ends its tiles there

    def clocks(self, tile_bytes: int) -> tuple[float, float, str]:
        """Best and serial clocks of an iteration that loads ``tile_bytes``, and what bounds the former."""
        parts = {
            "tensor cores": self.tensor, "instructions": self.issue,
            "shared memory": self.operands + tile_bytes / SHARED_BYTES_A_CLOCK,
            "L2 cache": tile_bytes * MULTIPROCESSORS / L2_BYTES_A_CLOCK,
        }  # fmt: skip
        bound = max(parts, key=parts.get)
        serial = max(parts["L2 cache"], parts["shared memory"], self.tensor + max(self.issue, self.stalls))
        return parts[bound], serial, bound


def read_loop(sass: str, warps: int) -> Loop | None:
    """The main loop of a program all of whose ``warps`` run it; None without matrix instructions of 16 bits or TF32."""
    code = Code(sass)
    loop = code.main_loop()
    if loop is None:
        return None
    rare = {i for part in code.jumped_over(loop) for i in part}
    body = [code.instructions[i] for i in loop if i not in rare]
    products = [instruction for instruction in body if instruction.product[0]]
    wide = products[0].name.startswith("HGMMA")
    teams = warps // 4 if wide else warps
    macs = teams * sum(instruction.product[0] for instruction in products)
    rate = WGMMA_MACS[products[0].product[1]] * (1.0 if wide else MMA_SHARE)
    pipes: dict[str, float] = {}
    read = 0
    for instruction in body:
        for pipe, clocks, names in _PIPES:
            if re.match(rf"(?:{names})(?:\.|$)", instruction.name):
                pipes[pipe] = pipes.get(pipe, 0.0) + clocks
                break
        if instruction.name.startswith("LDSM"):
            read += 128 * int(instruction.name[-1]) * warps
        elif re.match(r"(?:LDS|STS)(?:\.|$)", instruction.name) and "[RZ]" not in instruction.operands:
            parts = instruction.name.split(".")
            read += 32 * warps * (16 if "128" in parts else 8 if "64" in parts else 4)
        elif wide and instruction.product[0]:  # its second operand's columns, and 64 of the first's unless in registers
            in_registers = re.match(r"R\d+,\s*R\d+,\s*gdesc", instruction.operands)
            read += teams * 32 * (int(instruction.name.split("x")[1]) + (0 if in_registers else 64))
    # A warp on its way to the loop does not meet what ends the program instead.
    ends = (r for r in code.jumped_over(range(loop.start)) if any(code.instructions[i].name == "EXIT" for i in r))
    outside = len(code.instructions) - len(loop) - sum(map(len, ends))
    issue = max(len(body), *pipes.values(), 0.0) * warps / 4
    stalls = sum(instruction.stall for instruction in body)
    kind = "HGMMA" if wide else "HMMA"
    return Loop(macs, kind, macs / rate, issue, stalls, read / SHARED_BYTES_A_CLOCK, outside, len(rare))


def resident(registers: int, warps: int, shared_bytes: int) -> int:
    """How many programs a Hopper multiprocessor holds: 65,536 registers, in units of 256 a warp, 228 KiB, 64 warps."""
    by_registers = 65536 // (-(-32 * registers // 256) * 256 * warps)
    by_shared = (228 << 10) // (shared_bytes + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


class Compiled(NamedTuple):
    """What the compiler made of a kernel with its tiles."""

    loop: Loop | None
    registers: int
    spills: int
    resident: int  # programs a multiprocessor holds


@functools.cache
def compiled(kernel: str, tiles: Tiles, precision: str, m: int) -> Compiled:
    """Compiles a kernel of ``configs.KERNELS`` for sm_90 at this M of a 768 to 3072 layer.

    Raises:
        RuntimeError: the compiler failed.
    """
    case = PRECISIONS[precision]
    try:
        with case.applied(), contextlib.redirect_stdout(io.StringIO()):  # where a compiler fails, it prints all code
            dtypes = case.dtype, case.weight_dtype
            report_case = compile_report._case(kernel, ARCHITECTURE, precision, tiles, dtypes, m)
            binary = compile_report.compile_launch(report_case.launch, ARCHITECTURE)
    except Exception as error:  # compilers fail in many ways
        raise RuntimeError(f"{kernel} with {tiles} does not compile: {type(error).__name__}") from error
    registers, spills = compile_report._nvidia_resources(binary.asm["cubin"])
    loop, held = read_loop(binary.asm["sass"], tiles.warps), resident(registers, tiles.warps, binary.metadata.shared)
    return Compiled(loop, registers, spills, held)


class Prediction(NamedTuple):
    """Microseconds, with perfect overlap and as is likely."""

    best_us: float
    likely_us: float


def predict(kernel: str, tiles: Tiles, m: int, n: int, k: int, precision: str, code: Compiled) -> Prediction:
    """The time of a fused product, the sum of its split results included, as replayed from a CUDA graph.

    Programs of one multiprocessor fill one another's gaps. The programs of a last, partly filled wave take as long as
    they do where fewer share a multiprocessor.
    """
    dtype, weight_dtype = PRECISIONS[precision].dtype, PRECISIONS[precision].weight_dtype
    cut = grid(kernel, tiles, m, n, k, dtype, weight_dtype)
    overlapped, serial, _ = code.loop.clocks(cut.tile_bytes)
    scales = kernel == "grad_scales"
    # Where W is read by one row of programs it comes from memory, else mostly from the L2 cache.
    clocks = MEMORY_CLOCKS if cut.m_tiles == 1 and not scales else L2_CLOCKS
    ends = 0.0 if tiles.schedule == "tiled" else cut.ends

    def wave(together: int) -> tuple[float, float]:
        stored = cut.result_bytes * MULTIPROCESSORS / L2_BYTES_A_CLOCK
        edge = together * ((code.loop.outside + ends * code.loop.rare) * tiles.warps / 4 + stored)
        # Copies are asked for all stages but one ahead.
        arrivals = clocks * max(1.0, cut.iterations / max(tiles.stages - 1, 1))
        best = together * overlapped
        return tuple(max(clocks + cut.iterations * busy, arrivals) + edge for busy in (best, max(best, serial)))

    full, rest = divmod(cut.programs, MULTIPROCESSORS * code.resident)
    waves = [wave(code.resident)] * full + ([wave(-(-rest // MULTIPROCESSORS))] if rest else [])
    partial = cut.programs * cut.result_bytes if cut.splits > 1 or scales else 0
    result = 0 if scales else m * (n if kernel == "forward" else k) * dtype.itemsize
    given = m * ((0 if kernel == "grad_x" else k) + (0 if kernel == "forward" else n)) * dtype.itemsize
    memory = 1e6 * (n * k * weight_dtype.itemsize + given + (partial or result)) / BANDWIDTH
    sum_us = configs.KERNEL_US + 1e6 * (partial + result) / BANDWIDTH if partial else 0.0
    # The wait for the first tile is a kernel's ramp, which KERNEL_US has.
    times = (max(1e6 * (sum(w[i] for w in waves) - clocks) / CLOCK_HZ, memory) for i in (0, 1))
    return Prediction(*(time + configs.KERNEL_US + sum_us for time in times))


def library_us(kernel: str, m: int, n: int, k: int, precision: str) -> float:
    """Microseconds of the library's product of the same operands."""
    sizes = {"forward": (m, n, k), "grad_x": (m, k, n), "grad_scales": (n, k, m)}[kernel]
    rate = H200.rates[precision.split("/")[0]]
    launches = library_product(*sizes, PRECISIONS[precision].dtype.itemsize, BANDWIDTH, rate)
    return sum(launch.microseconds(BANDWIDTH, rate) for launch in launches)


def overheads(kernel: str, precision: str) -> list[float]:
    """What the shipped tiles take longer than the library, as shares of the product at its rate, by layer and M.

    The median for forward and ∂x is a constant of :mod:`rlrr_kernels.ops.choice.path`.
    """
    rate, found = H200.rates[precision.split("/")[0]], []
    for m in OVERHEAD_M:
        tiles = configs.tiles_for(kernel, GPU, PRECISIONS[precision].dtype, m)
        code = compiled(kernel, tiles, precision, 4096)
        for shape in (shape for width in (768, 1024, 1280) for shape in vit_layers("", width)):
            sizes = m, shape.n, shape.k
            longer = predict(kernel, tiles, *sizes, precision, code).likely_us - library_us(kernel, *sizes, precision)
            found.append(1e-6 * longer * rate / (2.0 * m * shape.n * shape.k))
    return found


def _line(kernel: str, tiles: Tiles, precision: str, m: int) -> list[object]:
    """A configuration's figures, then likely (best) time of each of :data:`SHAPES`; or why there are none."""
    name = str(tuple(tiles))
    try:
        code = compiled(kernel, tiles, precision, m)
    except RuntimeError as error:
        return [name, str(error)]
    if code.loop is None or code.spills:
        return [name, f"spills {code.spills} bytes" if code.spills else "no matrix instruction"]
    case = PRECISIONS[precision]
    tile_bytes = grid(kernel, tiles, m, 768, 768, case.dtype, case.weight_dtype).tile_bytes
    overlapped, serial, bound = code.loop.clocks(tile_bytes)
    best = code.resident * overlapped
    peak = code.loop.macs / WGMMA_MACS["TF32" if precision == "tf32" else "BF16"] * code.resident
    in_flight = code.resident * (tiles.stages - 1) * tile_bytes >> 10
    shares = f"{peak / best:.2f}", f"{peak / max(best, serial):.2f}"
    times = (predict(kernel, tiles, m, n, k, precision, code) for n, k in SHAPES)
    cells = [name, code.loop.instruction, code.registers, code.resident, in_flight, *shares, bound]
    return cells + [f"{time.likely_us:.1f} ({time.best_us:.1f})" for time in times]


HEADS = (
    "tiles", "instruction", "registers", "a multiprocessor", "KiB in flight", "peak, best", "peak, likely", "bound",
    *(f"{k} → {n}" for n, k in SHAPES),
)  # fmt: skip


def report(kernels: list[str], precisions: list[str], sizes: list[int], candidates: bool) -> Iterator[str]:
    """Lines: of every kernel, precision and M its tiles and the library; without ``sizes`` the median overhead."""
    yield "Predicted for an H200 from machine code, measured by no GPU; times are µs, likely (best)."
    for kernel in kernels:
        for precision in precisions:
            if not sizes and kernel != "grad_scales":
                yield f"{kernel}, {precision}: median overhead {statistics.median(overheads(kernel, precision)):.2f}"
            for m in sizes:
                dtype = PRECISIONS[precision].dtype
                tried = [configs.tiles_for(kernel, GPU, dtype, m, SCHEDULES)]
                if candidates:
                    from rlrr_kernels.ops.tuning import tiles as tuning

                    tried = tuning.candidates(kernel, GPU, dtype, m, experimental=True)
                yield f"\n{kernel}, {precision}, M = {m}"
                yield "  ".join(HEADS)
                yield from ("  ".join(map(str, _line(kernel, tiles, precision, m))) for tiles in tried)
                times = (f"{library_us(kernel, m, n, k, precision):.1f}" for n, k in SHAPES)
                yield "  ".join(["library", *[""] * 7, *times])


def tasks_report() -> Iterator[str]:
    """Lines: 64 images for 64 tasks in tiles of one task, by what a launch of one task with as many padded rows takes.

    A loop of ``rlrr_linear_multi`` is that of ``rlrr_linear``.
    """
    yield "Predicted for an H200 from machine code, measured by no GPU: 64 images for 64 tasks, bf16, µs, likely (best)"
    batch, total = tasks.BATCHES[0], [0.0, 0.0, 0.0]
    for kernel in ("forward", "grad_x"):
        for shape in vit_layers("ViT-B", 768):
            cut, sizes = tasks.cut_of(kernel, batch, shape), (shape.n, shape.k)
            rows = len(cut.tiled) * cut.tiles.block_m
            best, likely = predict(kernel, cut.tiles, rows, *sizes, "bf16", compiled(kernel, cut.tiles, "bf16", rows))
            times = best, likely, library_us(kernel, batch.samples * batch.rows, *sizes, "bf16")
            yield _beside_merged(f"{kernel} {shape.name}, {cut.padding:.0%} padding", *times)
            total = [a + b for a, b in zip(total, times, strict=True)]
        yield _beside_merged(f"{kernel}, all four", *total)
        total = [0.0, 0.0, 0.0]


def _beside_merged(name: str, best: float, likely: float, merged: float) -> str:
    ratios = f"{likely / merged:.2f} ({best / merged:.2f})"
    return f"{name}: {likely:.1f} ({best:.1f}); one merged model {merged:.1f}; ratio {ratios}"
