"""How long a one-pass kernel should take with given tiles on an H200, predicted from its machine code; needs no GPU.

    python -m benchmarks.model.tiles [--kernel forward ...] [--dtype bf16 ...] [--rows 16 12608 ...] [--candidates]

One line a configuration: programs a multiprocessor holds, share of the tensor cores' peak that its main loop allows
(with perfect overlap, and likely), what rules it; then for each layer of a ViT-B, and for a wide one, the predicted
time beside the library's. Predicted, measured by no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
from typing import NamedTuple

import torch

from benchmarks import compile_report
from benchmarks.common import LAYER_SHAPES
from benchmarks.model import library
from benchmarks.model import sass as sass_model
from benchmarks.model.sass import CLOCK_HZ, L2_BYTES_A_CLOCK, L2_CLOCKS, MEMORY_CLOCKS, MULTIPROCESSORS
from rlrr_kernels import devices
from rlrr_kernels.ops.linear import path as linear_paths
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.tiles import KERNELS, Tiles

DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "tf32": (torch.float32, torch.float32),
}
"""Of x and W, by the names of the compile report."""

SHAPES = (*((n, k) for k, n in LAYER_SHAPES), (8192, 8192))
"""(N, K) of ViT-B's layers and of one whose weight no L2 cache holds."""

BANDWIDTH = linear_paths.REACHED_BANDWIDTH * devices.typical("sm_90").peaks.bandwidth


class Compiled(NamedTuple):
    """What the compiler made of a kernel with its tiles."""

    loop: sass_model.Loop | None
    registers: int
    spills: int
    shared_bytes: int
    resident: int  # programs a multiprocessor holds


@functools.cache
def compiled(kernel: str, tiles: Tiles, dtype: str, rows: int) -> Compiled:
    """Compiles a kernel of ``linear_configs.KERNELS`` for sm_90 at M = ``rows`` of a 768 to 3072 layer.

    Raises:
        RuntimeError: the compiler failed.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        # On an error the compiler prints all of its code.
        with contextlib.redirect_stdout(io.StringIO()):
            case = compile_report._case(kernel, "sm_90", dtype, tiles, DTYPES[dtype], rows)
            binary = compile_report.compile_launch(case.launch, "sm_90")
    except Exception as error:  # compilers fail in many ways
        raise RuntimeError(f"{kernel} with {tiles} does not compile: {type(error).__name__}") from error
    finally:
        torch.set_float32_matmul_precision(before)
    registers, spills = compile_report._nvidia_resources(binary.asm["cubin"])
    shared = binary.metadata.shared
    loop = sass_model.read_loop(binary.asm["sass"], tiles.warps)
    resident = sass_model.resident(registers, tiles.warps, shared)
    if tiles.schedule == "gluon" and loop is not None:
        # Each of two halves of a tile has warps of its own, whose loop does two blocks a trip.
        loop, resident = loop._replace(stalls=loop.stalls // 2), 1
    return Compiled(loop, registers, spills, shared, resident)


class Grid(NamedTuple):
    """How a problem is cut."""

    programs: int
    trips: int  # of a program
    tile_bytes: int  # of the operands of a trip
    result_bytes: int  # of a program
    row_tiles: int
    splits: int
    ends: float = 0.0  # how often a program of a persistent grid ends a tile


def grid(kernel: str, tiles: Tiles, m: int, n: int, k: int, dtype: str) -> Grid:
    """The grid of a product x [M, K], W [N, K], as the launchers cut it on Hopper."""
    size, weight_size = (entry.itemsize for entry in DTYPES[dtype])
    of_m, of_n, of_k = (-(-a // b) for a, b in zip((m, n, k), tiles[:3], strict=True))
    bm, bn, bk = tiles[:3]
    moved = bm * (bn + bk) * size
    if tiles.schedule == "persistent" and kernel == "grad_scales":
        trips = linear_configs.steps_a_program(of_n * of_k * of_m, tiles, "sm_90")
        ends = trips / of_m + 1
        return Grid(-(-of_n * of_k * of_m // trips), trips, moved, round(4 * (bn + bk) * ends), of_m, 1, ends)
    if kernel == "grad_scales":
        programs = of_n * (of_k + 1)  # those that sum g for the bias among them
        splits = linear_configs.splits_for(m, tiles, programs, "sm_90")
        return Grid(programs * splits, -(-of_m // splits), moved, 4 * (bn + bk), of_m, splits)
    free, steps, width = (of_n, of_k, bn) if kernel == "forward" else (of_k, of_n, bk)
    contracted = bk if kernel == "forward" else bn
    moved = bm * contracted * size + bn * bk * weight_size
    if tiles.schedule != "tiled":
        running = MULTIPROCESSORS if tiles.schedule == "gluon" else linear_configs.wave(tiles, "sm_90")
        programs = min(of_m * free, running)
        ends = -(-of_m * free // programs)
        return Grid(programs, ends * steps, moved, ends * bm * width * size, of_m, 1, ends)
    splits = linear_configs.contraction_splits(steps, of_m * free, tiles, "sm_90")
    trips = -(-steps // splits)
    splits = -(-steps // trips)
    return Grid(of_m * free * splits, trips, moved, bm * width * (4 if splits > 1 else size), of_m, splits)


class Prediction(NamedTuple):
    """Microseconds, with perfect overlap and as is likely, and what rules the former."""

    best_us: float
    likely_us: float
    bound: str


def predict(kernel: str, tiles: Tiles, m: int, n: int, k: int, dtype: str, code: Compiled) -> Prediction:
    """The time of a one-pass product, the sum of its parts included, as replayed from a CUDA graph.

    Programs of one multiprocessor fill one another's gaps; "likely" lets a program alone overlap its copies and nothing
    else. The programs of a last, partly filled wave take as long as they do where fewer share a multiprocessor.
    """
    cut = grid(kernel, tiles, m, n, k, dtype)
    one = sass_model.trip(code.loop, cut.tile_bytes)
    # Where W is read by one row of programs it comes from memory, else mostly from the L2 cache.
    clocks = MEMORY_CLOCKS if cut.row_tiles == 1 and kernel != "grad_scales" else L2_CLOCKS
    stages = max(tiles.stages - 1, 1)

    def wave(together: int) -> tuple[float, float]:
        edge = together * (
            (code.loop.outside + cut.ends * code.loop.rare) * tiles.warps / 4 + cut.result_bytes / L2_BYTES_A_CLOCK
        )
        # Copies are asked for ``stages`` trips ahead.
        arrivals = clocks * max(1.0, cut.trips / stages)
        best = together * one.overlapped
        return tuple(max(clocks + cut.trips * busy, arrivals) + edge for busy in (best, max(best, one.serial)))

    full, rest = divmod(cut.programs, MULTIPROCESSORS * code.resident)
    waves = [wave(code.resident)] * full + ([wave(-(-rest // MULTIPROCESSORS))] if rest else [])
    size, weight_size = (entry.itemsize for entry in DTYPES[dtype])
    parts = cut.programs * cut.result_bytes if cut.splits > 1 or kernel == "grad_scales" else 0
    result = 0 if kernel == "grad_scales" else m * (n if kernel == "forward" else k) * size
    operands = n * k * weight_size + m * (k * size if kernel != "grad_x" else n * size)
    if kernel == "grad_scales":
        operands += m * n * size
    memory = 1e6 * (operands + (parts or result)) / BANDWIDTH
    # The wait for the first tile is a kernel's ramp, which KERNEL_US has.
    best, likely = (
        max(1e6 * (sum(w[i] for w in waves) - clocks) / CLOCK_HZ, memory) + linear_configs.KERNEL_US for i in (0, 1)
    )
    more = linear_configs.KERNEL_US + 1e6 * (parts + result) / BANDWIDTH if parts else 0.0
    bound = "memory" if memory >= 1e6 * sum(w[0] for w in waves) / CLOCK_HZ else one.bound
    return Prediction(best + more, likely + more, bound)


def library_us(m: int, n: int, k: int, dtype: str) -> float:
    """Microseconds of the library's product [M, K] by [K, N]."""
    kind = linear_paths.precision_kind(DTYPES[dtype][0], dtype == "tf32")
    rate = linear_paths.REACHED_RATE * getattr(devices.typical("sm_90").peaks, kind)
    launches = library.product(m, n, k, DTYPES[dtype][0].itemsize, BANDWIDTH, rate)
    return sum(launch.microseconds(BANDWIDTH, rate) for launch in launches)


def configurations(kernel: str, dtype: str, rows: int, candidates: bool) -> list[Tiles]:
    """What is shipped for M = ``rows``, and if asked for what the tuner would try beside it."""
    x_dtype = DTYPES[dtype][0]
    if not candidates:
        return [linear_configs.tiles_for(kernel, "sm_90", x_dtype, rows, ("tiled", "persistent"))]
    from rlrr_kernels.ops.tuning import tiles as tuning

    return tuning.candidates(kernel, "sm_90", x_dtype, rows, experimental=True)


def table(kernel: str, dtype: str, rows: int, configs: list[Tiles]) -> list[list[str]]:
    """A line a configuration: the code's figures, then likely (best) / library time of each shape of :data:`SHAPES`."""
    lines = []
    for tiles in configs:
        try:
            code = compiled(kernel, tiles, dtype, rows)
        except RuntimeError as error:
            lines.append([str(tuple(tiles)), str(error)])
            continue
        if code.loop is None or code.spills:
            reason = f"spills {code.spills} bytes" if code.spills else "no matrix instruction"
            lines.append([str(tuple(tiles)), reason])
            continue
        cut = grid(kernel, tiles, rows, 768, 768, dtype)
        one = sass_model.trip(code.loop, cut.tile_bytes)
        peak = code.loop.macs / sass_model.WGMMA_MACS["TF32" if dtype == "tf32" else "BF16"] * code.resident
        likely = max(code.resident * one.overlapped, one.serial)
        in_flight = code.resident * (tiles.stages - 1) * cut.tile_bytes >> 10
        cells = [
            str(tuple(tiles)), code.loop.instruction, str(code.registers), str(code.resident), f"{in_flight}",
            f"{peak / (code.resident * one.overlapped):.2f}", f"{peak / likely:.2f}", one.bound,
        ]  # fmt: skip
        for n, k in SHAPES:
            found = predict(kernel, tiles, rows, n, k, dtype, code)
            cells.append(f"{found.likely_us:.1f} ({found.best_us:.1f})")
        lines.append(cells)
    return lines


HEADS = [
    "tiles", "instruction", "registers", "a multiprocessor", "KiB in flight", "peak, best", "peak, likely", "bound",
    *(f"{k} → {n}" for n, k in SHAPES),
]  # fmt: skip


def library_line(kernel: str, dtype: str, rows: int) -> list[str]:
    """The library's product of the same shapes."""
    times = []
    for n, k in SHAPES:
        sizes = {"forward": (rows, n, k), "grad_x": (rows, k, n), "grad_scales": (n, k, rows)}[kernel]
        times.append(f"{library_us(*sizes, dtype):.1f}")
    return ["library", *[""] * 7, *times]


VIT_SHAPES = [(n * d, k * d) for d in (768, 1024, 1280) for n, k in ((1, 1), (3, 1), (4, 1), (1, 4))]
"""(N, K) of the layers of ViT-B, L and H."""


def trails(kernel: str, dtype: str) -> list[float]:
    """What the shipped tiles take longer than the library, as shares of the product at its rate, layer by layer and M.

    The median is in ``linear_paths.TRAIL``.
    """
    peak = getattr(devices.typical("sm_90").peaks, linear_paths.precision_kind(DTYPES[dtype][0], dtype == "tf32"))
    found = []
    for m in (394, 788, 1576, 3152, 6304, 12608, 50432):
        tiles = linear_configs.tiles_for(kernel, "sm_90", DTYPES[dtype][0], m)
        code = compiled(kernel, tiles, dtype, 4096)
        for n, k in VIT_SHAPES:
            sizes = (m, n, k) if kernel == "forward" else (m, k, n)
            longer = predict(kernel, tiles, m, n, k, dtype, code).likely_us - library_us(*sizes, dtype)
            found.append(1e-6 * longer * linear_paths.REACHED_RATE * peak / (2.0 * m * n * k))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=["bf16"], help="of x, and behind a slash of W"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 1576, 12608], help="M, rows of x")
    parser.add_argument("--candidates", action="store_true", help="also what rlrr tune --experimental would try")
    parser.add_argument("--trails", action="store_true", help="only by how much a product trails the library's")
    options = parser.parse_args()
    print("Predicted for an H200 from machine code, measured by no GPU; times are µs, likely (best).")
    for kernel in options.kernel:
        for dtype in options.dtype:
            if options.trails:
                if kernel != "grad_scales":
                    print(f"{kernel}, {dtype}: median {statistics.median(trails(kernel, dtype)):.2f}", flush=True)
                continue
            for rows in options.rows:
                print(f"\n{kernel}, {dtype}, M = {rows}")
                lines = table(kernel, dtype, rows, configurations(kernel, dtype, rows, options.candidates))
                for line in [HEADS, *lines, library_line(kernel, dtype, rows)]:
                    print("  ".join(line), flush=True)


if __name__ == "__main__":
    main()
