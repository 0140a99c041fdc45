"""What the linear operators take: checks that name the argument, and the one form the implementations see."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private

MAX_RANK = 64

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF, torch.float64)


def check_linear(
    x: Tensor, weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None, prefix: str = ""
) -> torch.dtype:
    """All that a linear operator asks of its tensors; returns the compute dtype, that of x after autocast."""
    dtype = check_tensors(x, weight, scale_row, scale_col, bias, prefix)
    check_input(x, weight, prefix)
    check_parameters(weight, scale_row, scale_col, bias, prefix)
    return dtype


def check_tensors(
    x: Tensor, weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None,
    prefix: str = "", shift: Tensor | None = None, function: str = "linear",
) -> torch.dtype:  # fmt: skip
    """Types, layouts, devices and dtypes; ``weight`` is frozen. ``prefix`` comes before the names of all but x.

    Returns the compute dtype, that of x after autocast, which decides what the others may have. ``function`` of
    ``torch.nn.functional`` would train the weight.
    """
    optional = ("scale_row", scale_row), ("scale_col", scale_col), ("bias", bias), ("shift", shift)
    others = [(prefix + name, tensor) for name, tensor in optional if tensor is not None]
    check_operands(x, (f"{prefix}weight", weight), *others)
    check_frozen(weight, f"{prefix}weight", function)
    dtype, autocast = compute_dtype(x)
    if dtype not in _DTYPES:
        raise _no_float(dtype)
    if weight.dtype != dtype and not (
        dtype in _HALF and (weight.dtype == torch.float32 or (autocast and weight.dtype in _HALF))
    ):
        expected = f"{dtype} or torch.float32" if dtype in _HALF else f"{dtype}"
        raise TypeError(f"{prefix}weight must be {expected} for x of {dtype}; got {weight.dtype}")
    for name, tensor in others:
        if tensor.dtype not in (torch.float32, dtype, weight.dtype):
            raise TypeError(f"{name} must be torch.float32 or {dtype} for x of {dtype}; got {tensor.dtype}")
    return dtype


def check_operands(x: Tensor, *named: tuple[str, Tensor]) -> None:
    """All are tensors, neither sparse nor nested, and on the device of x."""
    for name, tensor in (("x", x), *named):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor; got {kind}. Call {name}.to_dense() or pad it first")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")


def check_float(x: Tensor) -> None:
    """Raises ``TypeError`` unless the operators compute in the dtype of x."""
    if x.dtype not in _DTYPES:
        raise _no_float(x.dtype)


def _no_float(dtype: torch.dtype) -> TypeError:
    return TypeError(f"x must be float32, float16, bfloat16 or float64; got {dtype}")


def check_frozen(tensor: Tensor, name: str, function: str) -> None:
    """Refuses to leave out, in silence, the gradient of a tensor that is trained as ``F.function`` would train it.

    Raises:
        ValueError: it requires a gradient, and gradients are on.
    """
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return
    if private.transforms_active():
        raise ValueError(
            f"{name} must be frozen, but torch.func differentiates with respect to it: give grad, vjp or jacrev the "
            f"trained parameters alone, and {name} detached or from outside the function"
        )
    raise ValueError(
        f"{name} must be frozen: it has requires_grad=True, and no gradient is computed for it. "
        f"Call {name}.requires_grad_(False), or use torch.nn.functional.{function} to train it"
    )


def compute_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype to which autocast makes ``F.linear`` cast x, and whether autocast is on."""
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)  # it raises for meta
    return torch.get_autocast_dtype(device_type) if autocast and x.dtype != torch.float64 else x.dtype, autocast


def check_input(x: Tensor, weight: Tensor, prefix: str = "") -> None:
    """x [..., K] fits weight [N, K]."""
    if weight.dim() != 2:
        raise ValueError(f"{prefix}weight must be [N, K]; got shape {tuple(weight.shape)}")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K] with K = {K} as in {prefix}weight {[N, K]}; got shape {tuple(x.shape)}")


def check_parameters(
    weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None,
    prefix: str = "", stacked: bool = False,
) -> None:  # fmt: skip
    """Scales and bias fit weight [N, K]; ``stacked`` scales have a dimension T before all others."""
    N, K = weight.shape
    rank = 1
    first, t = (1, "T, ") if stacked else (0, "")
    if scale_row is not None:
        shape = scale_row.shape[first:]
        if len(shape) not in (1, 2) or shape[0] != N:
            raise ValueError(
                f"{prefix}scale_row must be [{t}N] or [{t}N, r] with N = {N}; got shape {tuple(scale_row.shape)}"
            )
        if len(shape) == 2:
            rank = shape[1]
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(
                    f"{prefix}scale_row must have a rank r from 1 to {MAX_RANK}; got shape {tuple(scale_row.shape)}"
                )
    if scale_col is not None:
        shape = scale_col.shape[first:]
        if scale_row is None or scale_row.dim() - first == 1:
            expected, fits = f"[{t}K] or [{t}G, K]", len(shape) in (1, 2)
            groups = shape[0] if len(shape) == 2 else 1
        else:
            expected, fits = f"[{t}r, K] or [{t}G, r, K] with r = {rank}", len(shape) in (2, 3) and shape[-2] == rank
            groups = shape[0] if len(shape) == 3 else 1
        given = f"got shape {tuple(scale_col.shape)}"
        if not fits or shape[-1] != K:
            raise ValueError(f"{prefix}scale_col must be {expected} with K = {K}; {given}")
        if groups < 1 or N % groups:
            raise ValueError(f"{prefix}scale_col has G = {groups} groups, which must divide N = {N}; {given}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"{prefix}bias must be [N] with N = {N}; got shape {tuple(bias.shape)}")


def canonical(
    scale_row: Tensor | None, scale_col: Tensor | None, weight: Tensor, stack: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """scale_row as [N, r] and scale_col as [G, r, K], each behind the dimensions of a ``stack``; None becomes ones that
    share one element."""
    lead = len(stack)
    if scale_row is None:
        rank = 1 if scale_col is None or scale_col.dim() < lead + 3 else scale_col.shape[lead + 1]
        one = torch.ones((), dtype=accumulate_dtype(weight.dtype), device=weight.device)
        row = one.expand(*stack, weight.shape[0], rank)
    else:
        row = scale_row if scale_row.dim() == lead + 2 else scale_row.unsqueeze(-1)
    if scale_col is None:
        one = torch.ones((), dtype=row.dtype, device=weight.device)
        col = one.expand(*stack, 1, row.shape[-1], weight.shape[1])
    elif scale_col.dim() == lead + 3:
        col = scale_col
    elif row is scale_row:  # beside [N, r]
        col = scale_col.unsqueeze(lead)
    else:
        col = scale_col.unsqueeze(-2) if scale_col.dim() == lead + 2 else scale_col[..., None, None, :]
    return row, col


def in_memory(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors with the values that their memory holds: a kernel is handed addresses and knows no lazy negation."""
    return tuple([t.resolve_neg() if t is not None and t.is_neg() else t for t in tensors])
