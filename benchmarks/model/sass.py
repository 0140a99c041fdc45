"""What one trip through a kernel's main loop costs a Hopper multiprocessor, read off its machine code; needs no GPU.

The main loop is the innermost one with the matrix instructions. Its trip is charged to five things that can run beside
one another: the tensor cores, the instruction pipes, shared memory, the L2 cache and the wait for memory. Their maximum
is the time with perfect overlap, the serial sum that without any. A model, not a measurement: rates are NVIDIA's where
it publishes them, and those of the literature where it does not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MULTIPROCESSORS = 132
CLOCK_HZ = 1.755e9
"""Of an H100 or H200 SXM under load; the datasheet's 989 TFLOP/s are 132 times 4096 operations at 1.83 GHz."""

WGMMA_MACS = {"BF16": 2048, "F16": 2048, "TF32": 1024}
"""Multiply-adds a clock of a multiprocessor, by the type of the operands (H100 datasheet)."""

MMA_SHARE = 0.62
"""Of that rate which ``mma.sync`` reaches (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU, 2024)."""

SHARED_BYTES_A_CLOCK = 128
"""A multiprocessor's shared memory, reads, writes and the operands of matrix instructions together."""

L2_BYTES_A_CLOCK = 5120 / MULTIPROCESSORS
"""A multiprocessor's share of the L2 cache's 5120 bytes a clock (A100 whitepaper; none is published for Hopper)."""

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


class Instruction(NamedTuple):
    """One line of machine code: ``HGMMA.64x128x16.F32.BF16``, the rest of it, and the clocks its warp then stalls."""

    name: str
    operands: str
    stall: int


class Code(NamedTuple):
    """A kernel's instructions, and before which of them each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]


_LINE = re.compile(r"^(?:\d\d|--):[\d-]:[\d-]:[Y-]:([0-9a-f])\s+(?:@!?U?P[T\d]\s+)?([A-Z][\w.]*);?\s*(.*?);?\s*$")


def parse(sass: str) -> Code:
    """Machine code as Triton's ``compiled.asm["sass"]`` has it.

    Raises:
        ValueError: there is no instruction in it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := _LINE.match(line):
            instructions.append(Instruction(found[2], found[3], int(found[1], 16)))
        elif line.rstrip().endswith(":"):
            labels[line.strip()[:-1]] = len(instructions)
    if not instructions:
        raise ValueError(f"sass must be machine code with its stall counts; got {sass[:80]!r}")
    return Code(instructions, labels)


def macs(instruction: Instruction) -> tuple[int, str]:
    """Multiply-adds and type of the operands: of a warpgroup for HGMMA, of a warp for HMMA; (0, "") for any other."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\..*?(BF16|TF32)?$", instruction.name):
        m, n, k, kind = found.groups()
        return int(m) * int(n) * int(k), kind or "F16"
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)\.F32(?:\.(BF16|TF32))?", instruction.name):
        m, n, k, kind = found.groups()
        return int(m) * int(n) * int(k), kind or "F16"
    return 0, ""


def _target(code: Code, index: int) -> int | None:
    """The instruction that the branch at ``index`` leads to, by label or address (16 bytes each); None without one."""
    instruction = code.instructions[index]
    if not instruction.name.startswith("BRA"):
        return None
    if found := re.search(r"\b0x([0-9a-f]+)$", instruction.operands):
        return int(found[1], 16) // 16
    found = re.search(r"\.?L\w+", instruction.operands)
    return code.labels.get(found[0]) if found else None


def main_loop(code: Code) -> range | None:
    """The innermost loop with matrix instructions; of several the one with most multiply-adds, None without any."""
    loops = []
    for end in range(len(code.instructions)):
        start = _target(code, end)
        if start is not None and start <= end and any(macs(i)[0] for i in code.instructions[start : end + 1]):
            loops.append(range(start, end + 1))
    inner = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
    return max(inner, key=lambda loop: sum(macs(code.instructions[i])[0] for i in loop), default=None)


def _jumped_over(code: Code, within: range) -> list[range]:
    """What forward branches within a range jump over, unless there are matrix instructions in it; outermost first."""
    found, index = [], within.start
    while index < within.stop:
        target = _target(code, index)
        inner = range(index + 1, target or index)
        if len(inner) and inner.stop <= within.stop and not any(macs(code.instructions[i])[0] for i in inner):
            found.append(inner)
            index = inner.stop
        else:
            index += 1
    return found


def _before(code: Code, loop: range) -> int:
    """Instructions a warp meets on its way to the loop: not those that end the program instead."""
    ends = (r for r in _jumped_over(code, range(loop.start)) if any(code.instructions[i].name == "EXIT" for i in r))
    return loop.start - sum(len(r) for r in ends)


class Loop(NamedTuple):
    """A trip of one program through its main loop: clocks of a multiprocessor that does nothing else."""

    macs: int  # of all its warps
    instruction: str  # "HGMMA" or "HMMA"
    tensor: float
    issue: float  # the busiest of the schedulers' slots and pipes
    stalls: int  # of one warp, before any wait for data
    operands: float  # shared memory read by loads and matrix instructions
    copied_bytes: int  # global to shared memory by cp.async; TMA's are not to be seen here
    outside: int  # instructions of a warp before and after the loop
    rare: int  # and in the loop, where most trips jump over them: a persistent grid ends its tiles there


_BYTES = {"128": 16, "64": 8}


def _width(name: str) -> int:
    """Bytes a lane of a load or store."""
    return next((size for part, size in _BYTES.items() if part in name.split(".")), 4)


def read_loop(sass: str, warps: int) -> Loop | None:
    """The main loop of a program all of whose ``warps`` run it; None without matrix instructions of 16 bits or TF32."""
    code = parse(sass)
    loop = main_loop(code)
    if loop is None:
        return None
    rare = {i for part in _jumped_over(code, loop) for i in part}
    body = [code.instructions[i] for i in loop if i not in rare]
    products = [(i, *macs(i)) for i in body if macs(i)[0]]
    wide = products[0][0].name.startswith("HGMMA")
    teams = warps // 4 if wide else warps
    total = teams * sum(count for _, count, _ in products)
    rate = WGMMA_MACS[products[0][2]] * (1.0 if wide else MMA_SHARE)
    pipes: dict[str, float] = {}
    for instruction in body:
        for pipe, clocks, names in _PIPES:
            if re.match(rf"(?:{names})(?:\.|$)", instruction.name):
                pipes[pipe] = pipes.get(pipe, 0.0) + clocks
                break
    read = copied = 0
    for instruction in body:
        if instruction.name.startswith("LDGSTS"):
            copied += 32 * warps * _width(instruction.name)
        elif instruction.name.startswith("LDSM"):
            read += 128 * int(instruction.name[-1]) * warps
        elif re.match(r"(?:LDS|STS)(?:\.|$)", instruction.name) and "[RZ]" not in instruction.operands:
            read += 32 * warps * _width(instruction.name)
    for instruction, _, _ in products:
        if wide:  # the second operand's columns of 32 bytes, and the first's 64 unless it is in registers
            columns = int(instruction.name.split("x")[1])
            in_registers = re.match(r"R\d+,\s*R\d+,\s*gdesc", instruction.operands)
            read += teams * 32 * (columns + (0 if in_registers else 64))
    return Loop(
        total,
        "HGMMA" if wide else "HMMA",
        total / rate,
        max(len(body), *pipes.values(), 0.0) * warps / 4,
        sum(instruction.stall for instruction in body),
        read / SHARED_BYTES_A_CLOCK,
        copied,
        _before(code, loop) + len(code.instructions) - loop.stop,
        len(rare),
    )


class Trip(NamedTuple):
    """Clocks of a trip with perfect overlap within a program, and of one that overlaps nothing but its copies."""

    overlapped: float
    serial: float
    bound: str  # what rules the first


def trip(loop: Loop, tile_bytes: int) -> Trip:
    """What a trip costs that brings ``tile_bytes`` of operands from the L2 cache into shared memory."""
    parts = {
        "tensor cores": loop.tensor,
        "instructions": loop.issue,
        "shared memory": loop.operands + tile_bytes / SHARED_BYTES_A_CLOCK,
        "L2 cache": tile_bytes / L2_BYTES_A_CLOCK,
    }
    bound = max(parts, key=parts.get)
    serial = max(parts["L2 cache"], parts["shared memory"], loop.tensor + max(loop.issue, loop.stalls))
    return Trip(parts[bound], serial, bound)


def resident(registers: int, warps: int, shared_bytes: int) -> int:
    """How many programs a Hopper multiprocessor holds: 65,536 registers, in units of 256 a warp, 228 KiB, 64 warps."""
    by_registers = 65536 // (-(-32 * registers // 256) * 256 * warps)
    by_shared = (228 << 10) // (shared_bytes + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)
