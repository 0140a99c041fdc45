"""The error rule: the one place that says how exact an implementation of ``rlrr_linear`` or ``rlrr_mlp`` must be.

Over at least eight seeds, the root mean square error of y, ∂x and every ∂s_r, ∂s_c and ∂b against float64 may be at
most :data:`RATIO` times that of the eager formula in the same dtypes; in float64, where eager is the oracle, at most
:data:`FLOAT64_ROUNDOFFS` unit roundoffs. Where the exact result cancels (1 + s_r s_c ≈ 0) eager's relative error says
nothing; there, and for any single case, the error may be at most :data:`BOUND` · u · ‖|x| · |W| (1 + |s_r s_c|)‖ with u
the unit roundoff of the compute dtype, and likewise for the gradients: the formula on absolute values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.reference import rlrr_linear_reference

RATIO = 1.1
BOUND = 4.0
"""The roundings of one product of a 1 x 1 x 1 problem in fp32: of 1 + s_r s_c (two), of W' and of x W'."""

FLOAT64_ROUNDOFFS = 8.0
SEEDS = 8
VALUES = 1 << 14
"""A small case takes more seeds, until this many values of y were compared: fewer make the ratio itself noise."""

OUTPUTS = ("y", "x", "scale_row", "scale_col", "bias")
"""y, then the gradients by the name of their tensor."""

_LAYER = ("weight", "scale_row", "scale_col", "bias")
_MLP_ARGUMENTS = ("x", *(f"{layer}_{name}" for layer in ("fc1", "fc2") for name in _LAYER))

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """Shapes and dtypes of one problem; tensors are drawn by :meth:`draw`."""

    rows: int  # M
    out_features: int  # N
    in_features: int  # K
    rank: int = 1
    groups: int = 1
    bias: bool = True
    residual: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    scale_dtype: torch.dtype | None = None  # None: float32, float64 for float64
    scale_std: float = 1.0
    device: str = "cpu"

    def draw(self, seed: int) -> dict[str, Tensor]:
        """x [M, K], weight [N, K], scale_row [N, r], scale_col [G, r, K], bias [N] and grad_y [M, N], standard normal.

        The scales have a standard deviation of ``scale_std`` / √r^½, so that s_r s_c has one of ``scale_std``².
        """
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        scale_dtype = self.scale_dtype or wide
        std = self.scale_std / self.rank**0.25

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(self.device, dtype)

        tensors = {
            "x": normal(self.rows, self.in_features, dtype=self.dtype),
            "weight": normal(self.out_features, self.in_features, dtype=self.weight_dtype or self.dtype),
            "scale_row": normal(self.out_features, self.rank, dtype=scale_dtype, scale=std),
            "scale_col": normal(self.groups, self.rank, self.in_features, dtype=scale_dtype, scale=std),
            "grad_y": normal(self.rows, self.out_features, dtype=self.dtype),
        }
        if self.bias:
            tensors["bias"] = normal(self.out_features, dtype=scale_dtype)
        return tensors


class MlpCase(NamedTuple):
    """One problem for ``rlrr_mlp``: fc1 has the groups that are given, fc2 one."""

    rows: int  # M
    out_features: int  # N
    hidden_features: int  # H
    in_features: int  # K
    rank: int = 1
    groups: int = 1
    bias: bool = True
    residual: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    scale_dtype: torch.dtype | None = None  # None: float32, float64 for float64
    device: str = "cpu"

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Arguments of ``rlrr_mlp`` and grad_y [M, N]. h has a standard deviation near 2: both tails of GELU occur."""
        options = self.bias, self.residual, self.dtype, self.weight_dtype, self.scale_dtype, 1.0, self.device
        fc1 = Case(self.rows, self.hidden_features, self.in_features, self.rank, self.groups, *options).draw(2 * seed)
        fc2 = Case(self.rows, self.out_features, self.hidden_features, self.rank, 1, *options).draw(2 * seed + 1)
        fc1["weight"] = (fc1["weight"].double() * max(1, self.in_features) ** -0.5).to(fc1["weight"].dtype)
        layers = {
            f"{layer}_{name}": drawn[name]
            for layer, drawn in (("fc1", fc1), ("fc2", fc2))
            for name in _LAYER
            if name in drawn
        }
        return {"x": fc1["x"], **layers, "grad_y": fc2["grad_y"]}


class MultiCase(NamedTuple):
    """One problem for ``rlrr_linear_multi``: samples of some rows each, under the adapters that ``index`` names."""

    index: tuple[int, ...]  # type: ignore[assignment]  # [S]; tuple.index gives way
    per_sample: int
    out_features: int  # N
    in_features: int  # K
    tasks: int  # T
    rank: int = 1
    groups: int = 1
    bias: bool = True
    residual: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    scale_dtype: torch.dtype | None = None  # None: float32, float64 for float64
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """M, of all samples together."""
        return len(self.index) * self.per_sample

    def draw(self, seed: int) -> dict[str, Tensor]:
        """x [S, per_sample, K], weight, scale_row [T, N, r], scale_col [T, G, r, K], bias, shift [T, N] and grad_y."""
        options = self.rank, self.groups, self.bias, self.residual, self.dtype, self.weight_dtype, self.scale_dtype
        case = Case(self.rows, self.out_features, self.in_features, *options, device=self.device)
        drawn = case.draw(seed * (self.tasks + 1))
        tasks = [
            case._replace(rows=0, bias=True).draw(seed * (self.tasks + 1) + 1 + task) for task in range(self.tasks)
        ]
        stacks = {"scale_row": "scale_row", "scale_col": "scale_col", "shift": "bias"}
        return (
            drawn
            | {name: drawn[name].unflatten(0, (len(self.index), self.per_sample)) for name in ("x", "grad_y")}
            | {name: torch.stack([task[source] for task in tasks]) for name, source in stacks.items()}
        )


def outputs(function: Function, tensors: dict[str, Tensor], residual: bool) -> dict[str, Tensor]:
    """y and the gradients of x and all that is trained under ``grad_y``, by names as in :data:`OUTPUTS`."""
    arguments = (
        _MLP_ARGUMENTS if "fc1_weight" in tensors else ("x", *_LAYER, *(["shift"] if "shift" in tensors else []))
    )
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in arguments
        if name in tensors and not name.endswith("weight")
    }
    y = function(*((tensors | leaves).get(name) for name in arguments), residual=residual)
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors["grad_y"])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact_outputs(
    tensors: dict[str, Tensor], residual: bool, reference: Function = rlrr_linear_reference
) -> dict[str, Tensor]:
    """The same by the literal formula ``reference`` in float64."""
    return outputs(reference, {name: tensor.double() for name, tensor in tensors.items()}, residual)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in float64; 0 for two empty or two zero tensors, NaN if ``actual`` has one."""
    error = (actual.double() - exact).norm().item()
    return error if error == 0 or math.isnan(error) else error / exact.norm().item()


def error_rule(
    function: Function, case: Case, seeds: int | None = None, reference: Function = rlrr_linear_reference
) -> dict[str, tuple[float, float]]:
    """Root mean square of the relative errors over ``seeds`` seeds, by output: of ``function``, and of eager PyTorch.

    By default there are :data:`SEEDS` of them, more for small cases. In float64 the second number is not an error but
    :data:`FLOAT64_ROUNDOFFS` unit roundoffs over :data:`RATIO`. ``reference`` is the eager formula; another one than
    the linear layer's goes with a ``case`` of its own that has :class:`Case`'s ``draw``, ``residual`` and ``dtype``.
    """
    if seeds is None:
        values = max(1, case.rows * min(case.out_features, case.in_features))
        seeds = max(SEEDS, min(64, -(-VALUES // values)))
    squares: dict[str, list[float]] = {}
    for seed in range(seeds):
        tensors = case.draw(seed)
        exact = exact_outputs(tensors, case.residual, reference)
        for index, candidate in enumerate((function, reference)):
            for name, actual in outputs(candidate, tensors, case.residual).items():
                squares.setdefault(name, [0.0, 0.0])[index] += relative_error(actual, exact[name]) ** 2
    errors = {name: (math.sqrt(ours / seeds), math.sqrt(eager / seeds)) for name, (ours, eager) in squares.items()}
    if case.dtype == torch.float64:
        limit = FLOAT64_ROUNDOFFS * torch.finfo(torch.float64).eps / 2 / RATIO
        return {name: (ours, limit) for name, (ours, _) in errors.items()}
    return errors


def check_error_rule(
    function: Function, case: Case, seeds: int | None = None, reference: Function = rlrr_linear_reference
) -> None:
    """Raises ``AssertionError`` naming every output whose error is over :data:`RATIO` times eager's (or is NaN)."""
    errors = error_rule(function, case, seeds, reference)
    broken = [
        f"{name}: {ours:.2e}, eager {eager:.2e}, ratio {ours / eager if eager else math.inf:.2f}"
        for name, (ours, eager) in errors.items()
        if not ours <= RATIO * eager
    ]
    if broken:
        raise AssertionError(f"{case}\n  " + "\n  ".join(broken))


def bound_errors(function: Function, tensors: dict[str, Tensor], residual: bool = True) -> dict[str, float]:
    """‖actual - exact‖ / (u ‖bound‖) of y and each gradient for one problem; at most :data:`BOUND` where all is well.

    The bound is the float64 formula on absolute values: |x| · |W| (1 + |s_r| |s_c|) for y. Unlike a relative error it
    stays meaningful where the exact result cancels, and for single values.
    """
    exact = exact_outputs(tensors, residual)
    bound = exact_outputs({name: tensor.abs() for name, tensor in tensors.items()}, residual)
    tiny = torch.finfo(torch.float64).tiny
    errors = {}
    for name, actual in outputs(function, tensors, residual).items():
        # A gradient has the dtype of its tensor, which may be coarser than that of x.
        roundoff = max(torch.finfo(dtype).eps for dtype in (tensors["x"].dtype, actual.dtype)) / 2
        errors[name] = (actual.double() - exact[name]).norm().item() / max(roundoff * bound[name].norm().item(), tiny)
    return errors


def check_bound(function: Function, tensors: dict[str, Tensor], residual: bool = True) -> None:
    """Raises ``AssertionError`` naming every output outside its bound (or NaN)."""
    errors = bound_errors(function, tensors, residual)
    if broken := {name: error for name, error in errors.items() if not error <= BOUND}:
        raise AssertionError(f"over {BOUND} unit roundoffs of the bound: {broken}")


def cancelling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same problem without bias and with s_r s_c = -1 + O(u) everywhere: all of W' cancels."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "bias"}
    tensors["scale_row"].zero_()[:, 0] = 1.5
    tensors["scale_col"][:, 0] = -1 / 1.5
    return tensors
