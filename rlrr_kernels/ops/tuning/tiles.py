"""``tune``: measures candidate tiles on the user's GPU and keeps those that are faster than the ones shipped.

Nothing tunes itself: this runs when it is called, and what it finds is used by later calls and later processes
(:mod:`rlrr_kernels.ops.choice.store`). A candidate that needs too much shared memory, spills registers or is less exact
than the bound of :mod:`rlrr_kernels.numerics` is never chosen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rlrr_kernels import backends, devices, numerics
from rlrr_kernels.devices import Gpu
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import KERNELS, Product, Tiles
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.host import formula, guard, private
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.linear.triton import launches as linear_launches

# By kernel, bytes of an element and the largest M of the class (0: any). What ships is always tried as well.
CANDIDATES = {
    ("forward", 2, 16): [(16, 32, 128, 4, 4), (16, 32, 256, 8, 3), (16, 64, 128, 4, 5), (16, 64, 256, 4, 3)],
    ("forward", 2, 64): [(64, 64, 64, 4, 5), (64, 64, 128, 4, 3), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4)],
    ("forward", 2, 256): [
        (64, 64, 64, 4, 4), (64, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 128, 4, 3), (128, 128, 32, 8, 4),
    ],
    ("forward", 2, 0): [
        (128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 32, 4, 5), (128, 128, 64, 4, 3), (128, 64, 64, 4, 3),
    ],
    ("grad_x", 2, 16): [(16, 64, 32, 4, 4), (16, 128, 32, 4, 4), (16, 128, 64, 4, 5), (16, 256, 64, 4, 3)],
    ("grad_x", 2, 64): [(64, 64, 64, 4, 5), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4), (64, 64, 128, 4, 4)],
    ("grad_x", 2, 256): [
        (64, 64, 64, 4, 4), (64, 64, 128, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 32, 128, 8, 4),
    ],
    ("grad_x", 2, 0): [
        (128, 64, 128, 8, 4), (256, 64, 128, 8, 3), (128, 32, 128, 4, 5), (128, 64, 128, 4, 3), (128, 64, 64, 4, 3),
    ],
    ("grad_scales", 2, 64): [(64, 64, 64, 4, 3), (16, 64, 128, 4, 3), (32, 128, 64, 4, 3), (16, 64, 64, 4, 4)],
    ("grad_scales", 2, 0): [(64, 128, 128, 8, 3), (32, 128, 128, 8, 4), (128, 128, 128, 8, 2), (64, 128, 64, 4, 4)],
    ("forward", 4, 0): [(64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3)],
    ("grad_x", 4, 0): [(64, 32, 64, 4, 3), (64, 32, 64, 8, 3), (128, 32, 64, 8, 3), (128, 32, 128, 8, 3)],
    ("grad_scales", 4, 0): [(32, 64, 64, 4, 3), (32, 64, 64, 8, 3), (32, 128, 64, 8, 3), (32, 128, 128, 8, 3)],
}  # fmt: skip
"""(block_m, block_n, block_k, warps, stages) for :class:`Tiles`; ``benchmarks.model --tiles`` predicts times."""

PERSISTENT_CANDIDATES = {
    ("grad_scales", 2): [
        (64, 128, 256, 8, 4), (64, 128, 256, 8, 3), (64, 256, 128, 8, 4), (64, 128, 128, 4, 3), (64, 128, 128, 8, 4),
    ],
}  # fmt: skip
"""The same for persistent grids, by kernel and bytes of an element."""

INTERPRETED_CANDIDATES = [Tiles(16, 16, 32, 4, 1, schedule=name) for name in configs.SCHEDULES]

GAIN = 0.98
"""Share of the shipped tiles' time below which others are kept: less is noise."""

Timer = Callable[[Callable[[], object]], float]
"""Takes a call, gives its time in microseconds."""


class Tuned(NamedTuple):
    """What was found for a kernel and class of M."""

    kernel: str
    precision: str
    limit: int  # largest M of the class, 0 for any
    tiles: Tiles  # the fastest
    shipped: Tiles
    us: float  # geometric mean over the shapes
    shipped_us: float
    rejected: dict[Tiles, str]  # candidates that were not timed, and why

    @property
    def kept(self) -> bool:
        """Whether the fastest tiles are written to the user's file."""
        return self.us < GAIN * self.shipped_us


def candidates(kernel: str, gpu: Gpu, dtype: torch.dtype, rows: int, experimental: bool = False) -> list[Tiles]:
    """The tiles to try at M = ``rows``; the shipped ones come first, and split products are tried unsplit too.

    Only if ``experimental``: those with a schedule that is not :func:`rlrr_kernels.ops.choice.tiles.proven`.
    """
    tma = gpu.family in configs.TMA_FAMILIES and rows >= configs.TMA_MIN_ROWS
    schedules = ("tiled", "persistent") if tma else ("tiled",)
    found = [configs.tiles_for(kernel, gpu, dtype, rows, schedules)]
    if gpu.name == devices.INTERPRETER:
        return found + [tiles for tiles in INTERPRETED_CANDIDATES if kernel in configs.SCHEDULES[tiles.schedule]]
    limit = configs.shape_class(kernel, gpu, dtype, rows)
    found.append(configs.tiles_for(kernel, gpu, dtype, rows))
    found += [Tiles(*values) for values in CANDIDATES.get((kernel, dtype.itemsize, limit), [])]
    if tma and not limit:
        values = PERSISTENT_CANDIDATES.get((kernel, dtype.itemsize), [])
        found += [Tiles(*numbers, schedule="persistent") for numbers in values]
    if limit and kernel != "grad_scales":
        found += [tiles._replace(max_splits=1) for tiles in found]
    if not experimental:
        found = [tiles for tiles in found if configs.proven(kernel, tiles.schedule, gpu)]
    return list(dict.fromkeys(found))


def launches_of(kernel: str, t: dict[str, Tensor], gpu: Gpu, tiles: Tiles) -> tuple[Launch, ...]:
    """The launches of a fused kernel on tensors as :meth:`rlrr_kernels.numerics.Case.draw` gives them."""
    given, how = (t["weight"], t["scale_row"], t["scale_col"]), (gpu, matmul_precision(), tiles)
    if kernel == "forward":
        y = torch.empty(t["x"].shape[0], t["weight"].shape[0], dtype=t["x"].dtype, device=t["x"].device)
        return linear_launches.forward_launches(t["x"], *given, t["bias"], True, y, *how)
    if kernel == "grad_x":
        return linear_launches.grad_x_launches(t["grad_y"], *given, True, torch.empty_like(t["x"]), *how)
    grads = [torch.empty_like(t[name]) for name in ("scale_row", "scale_col", "bias")]
    return linear_launches.grad_scales_launches(t["grad_y"], t["x"], *given, tuple(grads), *how)


def rejection(kernel: str, t: dict[str, Tensor], gpu: Gpu, tiles: Tiles) -> str | None:
    """Why a candidate must not be chosen; None where it may."""
    x, weight = t["x"], t["weight"]
    operands = {"forward": (x, weight), "grad_x": (t["grad_y"], weight), "grad_scales": (x, t["grad_y"])}[kernel]
    product = Product.of(kernel, gpu, *operands, weight.dtype, t["scale_col"].shape[1])
    if tiles.schedule not in configs.schedules_for(product):
        return f"the schedule {tiles.schedule} does not serve this problem"
    if not configs.fits(kernel, tiles, x.dtype, weight.dtype, gpu):
        needed = configs.shared_bytes(kernel, tiles, x.dtype, weight.dtype, gpu)
        return f"needs {needed >> 10} KiB of shared memory"
    try:
        for launch in launches_of(kernel, t, gpu, tiles):
            compiled = launch.plan.kernel[launch.plan.grid](*launch.args, **launch.plan.meta)
            if spilled := private.spilled_registers(compiled):
                return f"spills {spilled} registers"
        with store.only_tiles(kernel, tiles):
            errors = numerics.bound_errors(functools.partial(rlrr_linear, backend="triton.fused"), t)
    except Exception as error:  # compilers fail in many ways, and one candidate must not end the tuning
        return guard.in_a_line(error)
    tf32 = x.dtype == torch.float32 and matmul_precision() == "tf32"
    bound = numerics.BOUND * (formula.TF32_ROUNDOFFS if tf32 else 1)
    broken = {name: round(error, 2) for name, error in errors.items() if not error <= bound}
    return f"over {bound} unit roundoffs of the bound: {broken}" if broken else None


def microseconds(call: Callable[[], object]) -> float:
    """Median time on the GPU, its cache emptied before each call."""
    return 1e3 * triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def tune(
    shapes: Iterable[tuple[int, int]] = ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    rows: Sequence[int] = (8, 64, 1576),
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Sequence[str] = KERNELS,
    experimental: bool = False,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    path: Path | None = None,
    report: Callable[[Tuned], object] | None = None,
) -> list[Tuned]:
    """Measures tiles for layers of these shapes on this GPU and keeps what is faster in the user's file of tiles.

    Minutes, most of them compilation. What is kept serves every shape of the same kernel, dtype and class of M.

    Args:
        shapes: (N, K) of the frozen weights; default: the linear layers of a ViT-B block.
        rows: M, rows of x (batch times tokens); one or more of each class of M that matters.
        dtype: of x and W: bfloat16, float16 or float32.
        kernels: of "forward", "grad_x", "grad_scales".
        experimental: also try what no GPU has run yet. A kernel that hangs does not return: the process must be
            killed, and what was found for other kernels and classes of M is in the file.
        device: a CUDA device.
        timer: takes a call and gives microseconds; default: Triton's benchmark with an empty L2 cache.
        path: the file; default: where later calls look, :func:`rlrr_kernels.ops.choice.store.cache_file`.
        report: called with each result as soon as it is known and written.

    Raises:
        ValueError: an argument is not one of those above, or Triton cannot run on ``device``.
    """
    shapes, rows = list(shapes), list(rows)
    if not kernels or set(kernels) - set(KERNELS):
        raise ValueError(f"kernels must be of {', '.join(KERNELS)}; got {list(kernels)}")
    device = check_problems(shapes, rows, dtype, device)
    path, timer = path or store.cache_file(), timer or microseconds
    gpu = devices.gpu_of(device)
    results = []
    for kernel in kernels:
        classes: dict[int, list[int]] = {}
        for count in rows:
            classes.setdefault(configs.shape_class(kernel, gpu, dtype, count), []).append(count)
        for limit, counts in classes.items():
            problems = [(count, *shape) for shape in shapes for count in counts]
            with current(device):
                result = _tune_class(kernel, problems, dtype, device, gpu, limit, experimental, timer)
            name = store.entry_name(store.gpu_name(device), kernel, result.precision, limit)
            times = {"us": round(result.us, 3), "shipped_us": round(result.shipped_us, 3)}
            store.write(path, {name: result.tiles._asdict() | times if result.kept else None})
            results.append(result)
            if report is not None:
                report(result)
    return results


def current(device: torch.device) -> AbstractContextManager[object]:
    """A block with this GPU as the current one, on which Triton's launcher and its benchmark work."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_problems(
    shapes: list[tuple[int, int]], rows: list[int], dtype: torch.dtype, device: torch.device | str
) -> torch.device:
    """The device, with its number, on which all of it can be measured.

    Raises:
        ValueError: an argument is not one of :func:`tune`'s, or Triton cannot run on ``device``.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32; got {dtype}")
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes must be pairs (N, K) of positive numbers; got {shapes}")
    if not rows or min(rows) < 1:
        raise ValueError(f"rows must be positive numbers; got {rows}")
    device = torch.device(device)
    reason = backends.unavailable("triton", device.type)
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "there is no CUDA GPU here"
    if reason:
        raise ValueError(f"device={str(device)!r} cannot be tuned: {reason}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _tune_class(kernel, problems, dtype, device, gpu, limit, experimental, timer) -> Tuned:
    shipped, *others = candidates(kernel, gpu, dtype, problems[0][0], experimental)
    rejected: dict[Tiles, str] = {}
    logs: dict[Tiles, float] = dict.fromkeys([shipped, *others], 0.0)
    for count, out_features, in_features in problems:
        tensors = draw(numerics.Case(count, out_features, in_features, dtype=dtype, device=str(device)))
        for tiles in list(logs):
            if tiles != shipped and (reason := rejection(kernel, tensors, gpu, tiles)):
                rejected[tiles] = reason
                del logs[tiles]
                continue
            launches = launches_of(kernel, tensors, gpu, tiles)
            logs[tiles] += math.log(timer(lambda launches=launches: [launch.run() for launch in launches]))
    times = {tiles: math.exp(total / len(problems)) for tiles, total in logs.items()}
    best = min(times, key=times.get)
    precision = store.precision_name(dtype, dtype, matmul_precision())
    return Tuned(kernel, precision, limit, best, shipped, times[best], times[shipped], rejected)


def draw(case: numerics.Case) -> dict[str, Tensor]:
    """A problem with its scales as the launches want them."""
    return {name: tensor.detach().contiguous() for name, tensor in case.draw(0).items()}
