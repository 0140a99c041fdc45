"""The backward of an activation in Triton, which computes its value again on the way: one pass over h and ∂a.

Why a pass of its own, and not the prologue of the scale-gradient kernel: that kernel loads its tile of act(h) once for
every tile of N, so a prologue evaluates GELU N / 128 times, about 25 instructions each. For ViT-B's fc2 (H = 3072,
N = 768) and M = 12,608 rows on an H200 (29 · 10¹² instructions/s, 4.3 TB/s) that is 200 µs, beside 75 µs for the whole
product. Here h and ∂a are read for ∂h anyway, and act(h) costs one write, 18 µs, to scratch that lives for the call. In
the forward it is the same, 200 µs against 36 µs for torch's own pass.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.ops.activation import functions
from rlrr_kernels.ops.host import formula, guard
from rlrr_kernels.ops.host.launch import TL_ACCUMULATE, Launch, Plan

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TWO_SQRT_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))

_BLOCK = 1024


@triton.jit
def _activation_bwd_kernel(
    grad_ptr, h_ptr, value_ptr, size,
    ACTIVATION: tl.constexpr, NEED_VALUE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂h = ∂a ⊙ act'(h) over ∂a, and act(h) in value when NEED_VALUE; all [size], in ACC. Grid: (blocks of size,)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)
    if ACTIVATION == "gelu":
        gate = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))  # Φ(h); its derivative is the normal density
        value = h * gate
        slope = gate + h * (tl.exp(-0.5 * h * h) * _INV_SQRT_2PI)
    else:
        # ½ (1 + tanh u) = σ(2u) with u = √(2/π) (h + 0.044715 h³). By σ(-|2u|), at most ½, nothing cancels.
        scaled = h * _TWO_SQRT_2_OVER_PI
        decay = tl.exp(-tl.abs(scaled) * (1.0 + 0.044715 * h * h))
        small = decay / (1.0 + decay)
        value = tl.where(h < 0, h * small, h - h * small)
        slope = tl.where(h < 0, small, 1.0 - small) + scaled * (1.0 + 0.134145 * h * h) * small * (1.0 - small)
    tl.store(grad_ptr + offs, (grad * slope).to(grad_ptr.dtype.element_ty), mask=mask)
    if NEED_VALUE:
        tl.store(value_ptr + offs, value.to(value_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=1024)
def _plan(size: int, name: str, need_value: bool, wide: torch.dtype) -> Plan:
    meta = {
        "ACTIVATION": name, "NEED_VALUE": need_value, "ACC": TL_ACCUMULATE[wide], "BLOCK": _BLOCK, "num_warps": 4,
    }  # fmt: skip
    return Plan(_activation_bwd_kernel, (triton.cdiv(size, _BLOCK),), (size,), meta)


def backward_launch(grad_a: Tensor, h: Tensor, name: str, value: Tensor | None) -> Launch:
    """∂h over ``grad_a`` [M, H], and act(h) in ``value`` unless that is None; all of them contiguous."""
    plan = _plan(h.numel(), name, value is not None, torch.promote_types(h.dtype, torch.float32))
    return Launch(plan, (grad_a, h, h if value is None else value))


def backward(grad_a: Tensor, h: Tensor, name: str, need_value: bool) -> tuple[Tensor, Tensor | None]:
    """∂h, which takes the memory of ``grad_a`` [M, H], and act(h) in the dtype of h if it is needed."""
    h = h.contiguous()
    value = torch.empty_like(h) if need_value else None
    if h.numel():
        launches = (backward_launch(grad_a, h, name, value),)
        given = grad_a.clone() if guard.will_look(launches) else grad_a
        if not guard.ran(launches, forced=False, find_error=lambda: _first_error(given, h, name, grad_a, value)):
            value = functions.forward(h, name) if need_value else None
            return functions.backward(given, h, name), value
    return grad_a, value


_LOOKED_AT = 4096


def _first_error(grad_a: Tensor, h: Tensor, name: str, grad_h: Tensor, value: Tensor | None) -> str | None:
    """What is wrong with ∂h and act(h), at a few places; None for nothing."""
    places = formula.picks(h.numel(), _LOOKED_AT, h.device)
    grad_a, h, grad_h, value = (None if t is None else t.flatten()[places] for t in (grad_a, h, grad_h, value))

    def of_grad(absolute: bool) -> Tensor:  # |act'| < 1.13
        return grad_a.double().abs() if absolute else functions.backward(grad_a.double(), h.double(), name)

    def of_value(absolute: bool) -> Tensor:
        return h.double().abs() if absolute else functions.forward(h.double(), name)

    found = formula.error("the gradient of the activation's input", grad_h, of_grad, h.dtype)
    if found is None and value is not None:
        found = formula.error("the activation", value, of_value, h.dtype)
    return found
