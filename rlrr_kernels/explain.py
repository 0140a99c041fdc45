"""``explain``: which backend, path, tiles and kernels a call takes, and why."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels import backends, devices
from rlrr_kernels.devices import Gpu
from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.ops.activation.functions import check_name
from rlrr_kernels.ops.checks import canonical, check_linear, check_tensors
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.linear.public import known_call
from rlrr_kernels.ops.multi.checks import check_index_of, check_samples, check_stacks, check_values
from rlrr_kernels.ops.multi.task_index import BARE, TaskIndex, TaskRows
from rlrr_kernels.ops.sampling.row_sample import RowSample

_ARGUMENTS = ("weight", "scale_row", "scale_col", "bias")
_MULTI = ("shift", "index")
_OPTIONS = ("residual", "input_activation", "backend")


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the computations of a call.

    Attributes:
        name: ``forward``, ``grad_x`` or ``grad_scales`` (∂s_r, ∂s_c and ∂b).
        path: ``fused`` (W is rescaled on its way into the product), ``merge`` (W' in scratch, then the library's
            product); of the C++ operator ``fused``, ``panels`` or ``library``; of several adapters also ``mixed`` (x
            is rescaled, and their rows share tiles) and ``library`` (the bare W); of a merged layer ``library``.
        why: what decided it.
        launches: the kernels in their order.
        schedule: how the programs of the first kernel share its work; None without one of ours.
        tiles: block sizes, warps, stages and splits of the first kernel; None without one of ours.
    """

    name: str
    path: str
    why: str
    launches: tuple[str, ...]
    schedule: str | None = None
    tiles: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call does; prints as a few lines.

    Attributes:
        problem: M, N, K, r, G and the dtypes; S, the rows that ``scale_grad_rows`` leaves the scale gradients; of
            ``rlrr_linear_multi`` also how many adapters have rows.
        device: what runs it.
        backend: never ``auto``.
        why: what decided the backend.
        steps: forward, ∂x and the scale gradients.
        replayed: whether the next forward of this layout starts its kernels past all that chose them.
        gave_way: kernels that gave way to the library's products in this process, and why.
    """

    problem: dict[str, int | str]
    device: str
    backend: str
    why: str
    steps: tuple[Step, ...]
    replayed: bool
    gave_way: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            ", ".join(f"{name} {value}" for name, value in self.problem.items()),
            f"on {self.device} by backend {self.backend}: {self.why}",
        ]
        for step in self.steps:
            lines.append(f"  {step.name}: {step.path}, {step.why}")
            if step.tiles is not None:
                sizes = ", ".join(f"{name} {value}" for name, value in step.tiles.items())
                lines.append(f"    {step.schedule} tiles: {sizes}")
            lines.append(f"    launches: {', '.join(step.launches)}")
        if self.backend.startswith("triton"):
            lines.append(f"  the next call of this layout is {'' if self.replayed else 'not '}replayed")
        lines += [f"  gave way: {name}: {reason}" for name, reason in self.gave_way.items()]
        return "\n".join(lines)


def explain(
    layer: RLRRLinear | Mapping[str, Any], x: Tensor, *, gpu: str | None = None, backend: str | None = None
) -> Explanation:
    """Says what a call of a layer, or of :func:`rlrr_kernels.rlrr_linear`, does with an x of this layout, and why.

    Nothing is computed. The values in the tensors do not matter, so tensors on ``meta`` serve as well.

    Args:
        layer: an ``RLRRLinear``, or the arguments of ``rlrr_linear`` by name: ``weight``, ``scale_row``, ``scale_col``
            and, where given, ``bias``, ``residual``, ``input_activation`` and ``backend``. With an ``index`` those of
            ``rlrr_linear_multi``, of which one step is told for each way that adapters take.
        x: [..., K].
        gpu: what a GPU of this name would do, such as "sm_90" or "gfx942", instead of the device of x.
        backend: instead of the one of the call.

    Raises:
        TypeError, ValueError: as ``rlrr_linear``; or ``layer`` is neither, or holds an unknown name.
    """
    given = _arguments(layer)
    if backend is not None:
        given["backend"] = backend
    if gpu is not None and not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]+", gpu):
        raise ValueError(f"gpu must be a name such as sm_90 or gfx942; got {gpu!r}")
    if "index" in given:
        return _explain_multi(given, x, gpu)
    if given["input_activation"] is not None:
        check_name("input_activation", given["input_activation"])
    tensors = {name: given[name] for name in _ARGUMENTS}
    dtype, weight = check_linear(x, **tensors), tensors["weight"]
    call = None if gpu is not None else known_call(x, **tensors, **{name: given[name] for name in _OPTIONS})
    if gpu is not None:
        x = _meta(x)
        tensors = {name: None if tensor is None else _meta(tensor) for name, tensor in tensors.items()}
    x = x.to(dtype)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    row, col = canonical(tensors["scale_row"], tensors["scale_col"], tensors["weight"])
    sample = layer._draw_rows(_meta(x)) if isinstance(layer, RLRRLinear) else None  # on meta: nothing is drawn
    if isinstance(layer, RLRRLinear) and layer.merged:
        name, why, steps = "torch", "the layer is merged", _MERGED
    else:
        name, why = _backend(given["backend"], x, dtype, gpu)
        steps = _steps(name, gpu, flat, tensors["weight"], row, col, tensors["bias"], sample)
    groups, rank, K = col.shape
    kind = {"x": dtype, "W": weight.dtype}
    return Explanation(
        problem={
            "M": flat.shape[0], "N": weight.shape[0], "K": K, "r": rank, "G": groups,
            **({} if sample is None else {"S": sample.index.shape[0]}),
            **{name: str(value).removeprefix("torch.") for name, value in kind.items()},
        },
        device=gpu or str(x.device),
        backend=name,
        why=why,
        steps=steps,
        replayed=call is not None and call.replayed,
        gave_way=_gave_way(name),
    )  # fmt: skip


_MERGED = tuple(
    Step(name, "library", "by the W' that was computed when it was merged", ("library product",))
    for name in ("forward", "grad_x")
)


def _arguments(layer: RLRRLinear | Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"bias": None, "residual": True, "input_activation": None, "backend": "auto"}
    if isinstance(layer, RLRRLinear):
        row, col = layer.scales()
        bias = layer._total_bias()
        return defaults | {
            "weight": layer.weight, "scale_row": row, "scale_col": col, "bias": bias, "residual": layer.residual,
        }  # fmt: skip
    if not isinstance(layer, Mapping):
        raise TypeError(f"layer must be an RLRRLinear or the arguments of rlrr_linear; got {type(layer).__name__}")
    multi = "index" in layer
    known = (*_ARGUMENTS, *_MULTI, "residual", "backend") if multi else (*_ARGUMENTS, *_OPTIONS)
    if unknown := sorted(set(layer) - {*known}):
        raise ValueError(f"layer must hold {', '.join(known)} alone; got {', '.join(unknown)}")
    if "weight" not in layer:
        raise ValueError(f"layer must hold a weight; got {', '.join(layer) or 'nothing'}")
    return {"scale_row": None, "scale_col": None} | defaults | dict(layer)


def _explain_multi(given: dict[str, Any], x: Tensor, gpu: str | None) -> Explanation:
    """The same of a call of ``rlrr_linear_multi``."""
    weight, shift, index = given["weight"], given.get("shift"), given["index"]
    stacks = given["scale_row"], given["scale_col"], given["bias"]
    dtype = check_tensors(x, weight, *stacks, shift=shift)
    check_samples(x, weight)
    tasks = check_stacks(weight, *stacks, shift)
    check_index_of(index, x)
    # Its own tables: what another GPU would do stays out of the caller's.
    index = TaskIndex(index.index if isinstance(index, TaskIndex) else index)
    check_values(index, tasks)
    name, why = _backend(given["backend"], x, dtype, gpu)
    rows = index.rows(x.shape[1:-1].numel())
    row, col = canonical(given["scale_row"], given["scale_col"], weight, (tasks,))
    if gpu is not None:
        x, weight, row, col = map(_meta, (x, weight, row, col))
    flat = x.to(dtype).reshape(x.shape[:-1].numel(), x.shape[-1])
    kind, _, forced = name.partition(".")
    if kind == "cpp":
        steps = _cpp_multi_steps(flat, weight, row.shape[2], rows)
    elif kind == "triton" and len(rows.counts) > 1:
        steps = _triton_multi_steps(_gpu(gpu, x), forced or None, flat, weight, col, rows)
    else:
        each = f"one call of rlrr_linear for each of {len(rows.counts)} adapters: "
        alone = _steps(name, gpu, flat, weight, row[0], col[0], None) if tasks else ()
        steps = tuple(dataclasses.replace(step, why=each + step.why) for step in alone)
    return Explanation(
        problem={
            "M": flat.shape[0], "N": weight.shape[0], "K": weight.shape[1], "r": row.shape[2], "G": col.shape[1],
            "T": tasks, "adapters with rows": len(rows.counts),
            **{side: str(kind).removeprefix("torch.") for side, kind in (("x", dtype), ("W", weight.dtype))},
        },
        device=gpu or str(x.device), backend=name, why=why, steps=steps, replayed=False, gave_way=_gave_way(name),
    )  # fmt: skip


def _cpp_multi_steps(x: Tensor, weight: Tensor, rank: int, rows: TaskRows) -> tuple[Step, ...]:
    """By the ways of the forward, then of the backward: which adapters' rows take it."""
    from rlrr_kernels.ops.linear.cpp_backend import path_of
    from rlrr_kernels.ops.multi import cpp_backend

    launches = {
        "fused": ("one pass over W for all of them",),
        "panels": ("panels of W' for each",),
        "library": ("merge", "library product", "for each"),
    }
    steps = []
    for name, backward in (("forward", False), ("grad_x and grad_scales", True)):
        ways: dict[str, list[int]] = {}
        together = cpp_backend.has_kernels(x, weight, rank, rows, backward)
        for count in sorted(rows.counts.values()):
            if together:
                path = cpp_backend.path_of_task(x, weight, rank, count, backward).replace("library", "panels")
            else:
                path = path_of(x.new_empty(count, x.shape[1]), weight, rank, backward)
            ways.setdefault(path, []).append(count)
        for path, of in ways.items():
            why = f"{_adapters(of)}, by the crossovers of csrc/dispatch.h at level {backends.cpu_level()}"
            done = launches[path] if path == "library" or (together and not backward) else (f"{path} loop for each",)
            steps.append(Step(name, path, why, done))
    return tuple(steps)


def _adapters(counts: list[int]) -> str:
    """So many adapters of so many rows; ``counts`` ascend."""
    span = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{len(counts)} adapter{'s' * (len(counts) > 1)} of {span} rows"


def _triton_multi_steps(
    gpu: Gpu, path: str | None, x: Tensor, weight: Tensor, col: Tensor, rows: TaskRows
) -> tuple[Step, ...]:
    from rlrr_kernels.ops.multi import triton_backend

    steps = []
    for name, first in (("forward", x), ("grad_x", x.new_empty(x.shape[0], weight.shape[0]))):
        cut = triton_backend.cut_of(name, first, weight, col, rows, gpu, path)
        kernel = "rlrr_linear_multi_fwd_kernel" if name == "forward" else "rlrr_linear_multi_bwd_dx_kernel"
        bare = sum(end - start for task, start, end in cut.library if task == BARE)
        if bare:
            steps.append(Step(name, "library", f"{bare} rows of the bare W", ("library product",)))
        if merged := sorted(end - start for task, start, end in cut.library if task != BARE):
            why = f"{_adapters(merged)}, for which a merge pays as it does in rlrr_linear"
            steps.append(Step(name, "merge", why, ("merge", "library product", "for each")))
        for way, segments, tiles, launch in (
            ("fused", cut.tiled, cut.tiles, kernel),
            ("mixed", cut.mixed, cut.mixed_tiles, "rlrr_linear_multi_mixed_kernel"),
        ):
            if not segments:
                continue
            counts: collections.Counter[int] = collections.Counter()
            for task, start, end in segments:
                counts[task] += end - start
            how = (
                f"{len(segments)} tiles of rows, {cut.padding:.0%} of whose rows are no sample's"
                if way == "fused" else "whose tiles they share"
            )  # fmt: skip
            why = f"{_adapters(sorted(counts.values()))}, {how}"
            steps.append(Step(name, way, why, (launch,), tiles.schedule, _sizes(tiles)))
    kernels = "rlrr_linear_multi_bwd_scales_kernel", "rlrr_linear_multi_bwd_reduce_kernel"
    why = "parts of each adapter's rows leave the tiles of G, and are added up in a fixed order"
    return (*steps, Step("grad_scales", "fused", why, kernels))


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _backend(name: str, x: Tensor, dtype: torch.dtype, gpu: str | None) -> tuple[str, str]:
    asked = backends.default_backend() if name == "auto" else backends.check_name(name, "backend")
    if asked != "auto":
        how = "asked for by the call" if name != "auto" else "use_backend or RLRR_BACKEND asks for it"
        if gpu is not None and asked == "cpp":
            raise ValueError(f"backend must be another one than cpp, which computes on the CPU, for gpu={gpu!r}")
        return (asked if gpu is not None else backends.resolve(asked, x.device, dtype)), how
    if gpu is not None:
        if distrust := devices.distrust_of_triton(gpu):
            return "torch", distrust
        if dtype == torch.float64:
            return "torch", "float64 has no matrix instructions worth a kernel"
        return "triton", "the fastest there"
    found = backends.resolve("auto", x.device, dtype)
    report = backends.backend_report()["devices"].get(x.device.type, {})
    reasons = {**report.get("unavailable", {}), **report.get("distrusted", {})}
    first = "cpp" if x.device.type == "cpu" else "triton"
    return found, f"not {first}: {reasons[first]}" if first in reasons else "the fastest that runs here"


def _steps(
    name: str, gpu: str | None, x: Tensor, weight: Tensor, row: Tensor, col: Tensor, bias: Tensor | None,
    sample: RowSample | None = None,
) -> tuple[Step, ...]:  # fmt: skip
    kind, _, forced = name.partition(".")
    if kind == "cpp":
        return _cpp_steps(x, weight, row.shape[1], sample)
    if kind == "torch":
        library = "W' in scratch, then the library's product"
        blocks = "G a block of rows at a time, by the library's product"
        return (
            Step("forward", "merge", library, ("merge", "library product")),
            Step("grad_x", "merge", library, ("merge", "library product")),
            Step("grad_scales", "library", _estimated(sample) + blocks, ("library product", "sums")),
        )
    return _triton_steps(_gpu(gpu, x), forced, x, weight, row.contiguous(), col.contiguous(), bias, sample)


def _gpu(name: str | None, x: Tensor) -> Gpu:
    return devices.gpu_of(x.device) if name is None else devices.typical(name)


def _estimated(sample: RowSample | None) -> str:
    return "" if sample is None else f"estimated from {sample.index.shape[0]} rows: "


def _cpp_steps(x: Tensor, weight: Tensor, rank: int, sample: RowSample | None) -> tuple[Step, ...]:
    from rlrr_kernels.ops.linear import cpp_backend

    calls = [("forward", x), ("grad_x and grad_scales", x)]
    if sample is not None:  # one call for ∂x and ∂b, and one for each part of the sample
        meta = x.new_empty(len(sample.index), x.shape[1], device="meta")
        parts = sample.parts(x.new_empty(x.shape[0], weight.shape[0], device="meta"), meta)
        calls = [("forward", x), ("grad_x", x)]
        calls += [("grad_scales", x.new_empty(rows.shape)) for _, rows, _ in parts]
    steps = []
    for name, rows in calls:
        path = cpp_backend.path_of(rows, weight, rank, backward=name != "forward")
        why = f"the crossovers of csrc/dispatch.h for M = {rows.shape[0]} at level {backends.cpu_level()}"
        if name == "grad_scales":
            why = _estimated(sample) + why
        launches = ("merge", "library product") if path == "library" else (f"{path} loop",)
        steps.append(Step(name, path, why, launches))
    return tuple(steps)


def _triton_steps(
    gpu: Gpu, forced: str, x: Tensor, weight: Tensor, row: Tensor, col: Tensor, bias: Tensor | None,
    sample: RowSample | None,
) -> tuple[Step, ...]:  # fmt: skip
    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.linear.triton import launches, sampled

    rank, precision = col.shape[1], matmul_precision()
    grad_y = x.new_empty(x.shape[0], weight.shape[0])
    given, grad_x = (weight, row, col), torch.empty_like(x)
    products = {
        "forward": (x, lambda tiles: launches.forward_launches(x, *given, bias, True, grad_y, gpu, precision, tiles)),
        "grad_x": (
            grad_y,
            lambda tiles: launches.grad_x_launches(grad_y, *given, True, grad_x, gpu, precision, tiles),
        ),
    }
    steps = []
    for name, (first, build) in products.items():
        choice = store.path_choice(
            gpu, precision, first.device, first.dtype, weight.dtype, len(first), weight.shape, rank
        )
        path = forced or choice.path
        why = (
            "asked for by the call" if forced else
            f"a merge saves {choice.gain:.2f} times what it costs, and pays above {choice.least_gain:.2f}"
        )  # fmt: skip
        if path == "merge":
            merge = launches.merge_launch(*given, True, torch.empty_like(weight, dtype=first.dtype))
            steps.append(Step(name, path, why, (_kernel_name(merge), "library product")))
            continue
        tiles = store.choose_tiles(name, gpu, precision, first, weight, weight.dtype, rank)
        steps.append(_fused(name, why, tiles, build(tiles)))
    if sample is not None:
        x = x.new_empty(sample.index.shape[0], x.shape[1])
    tiles = store.choose_tiles("grad_scales", gpu, precision, x, grad_y, weight.dtype, rank, sample is not None)
    grads = (torch.empty_like(row), torch.empty_like(col), x.new_empty(weight.shape[0]))
    arguments = grad_y, x, *given, grads, *(() if sample is None else (sample,)), gpu, precision, tiles
    found = (launches if sample is None else sampled).grad_scales_launches(*arguments)
    why = _estimated(sample) + "sums leave the tiles of G, and G never reaches memory"
    return (*steps, _fused("grad_scales", why, tiles, found))


def _fused(name: str, why: str, tiles: Any, launches: tuple[Any, ...]) -> Step:
    return Step(name, "fused", why, tuple(map(_kernel_name, launches)), tiles.schedule, _sizes(tiles))


def _sizes(tiles: Any) -> dict[str, int]:
    return {field: value for field, value in tiles._asdict().items() if field != "schedule"}


def _kernel_name(launch: Any) -> str:
    grid = " x ".join(map(str, launch.plan.grid))
    return f"{launch.plan.kernel.fn.__name__} ({grid} programs)"


def _gave_way(backend: str) -> dict[str, str]:
    if not backend.startswith("triton"):
        return {}
    from rlrr_kernels.ops.host import guard

    return guard.given_up()
