"""PEFT's HiRA through ``rlrr_linear``: the same function, y = x (W ⊙ (1 + B A))ᵀ + b, with nothing W-sized kept.

PEFT computes it as two products, x Wᵀ + b and x (W ⊙ (B A))ᵀ, makes B A and W ⊙ (B A), and keeps the latter for the
backward. :func:`accelerate_hira` gives its layers another ``forward``; parameters, names and files stay PEFT's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

import torch
from peft.tuners.hira.layer import HiraLayer
from peft.tuners.hira.layer import Linear as HiraLinear
from torch import Tensor, nn

from rlrr_kernels import backends
from rlrr_kernels.nn.rescaled import has_hooks, has_replaced_forward
from rlrr_kernels.ops.checks import MAX_RANK, compute_dtype
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear import dispatch
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.second_order import ReverseOnly, differentiable_gradients

PRODUCTS = ("input", "float32")
_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class HiraReport:
    """What :func:`accelerate_hira` found in a model; ``print`` it.

    Attributes:
        accelerated: names of the layers whose next call takes our operator.
        kept: names of the HiRA layers whose next call takes PEFT's path, and why.
    """

    accelerated: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} HiRA layers by rlrr_linear, {len(self.kept)} by PEFT"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.kept.items())])


class AcceleratedLinear(HiraLinear):
    """PEFT's HiRA layer whose forward is one call of ``rlrr_linear`` where it may be; products in the dtype of x."""

    products = "input"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        names = _active(self)
        if args or kwargs or _reason_now(self, base, names):
            return super().forward(x, *args, **kwargs)
        rows, cols = [self.hira_B[name] for name in names], [self.hira_A[name] for name in names]
        if not _fit(x, base.weight, *rows, *cols):
            return super().forward(x, *args, **kwargs)
        # A sum of products of ranks r and s is one of rank r + s.
        row, col = (rows[0], cols[0]) if len(names) == 1 else (torch.cat(rows, 1), torch.cat(cols, 0))
        if self.products == "input" or x.dtype not in _HALF or compute_dtype(x)[1]:
            return rlrr_linear(x, base.weight, row, col, base.bias)
        # The compiler decides what is kept; torch.func takes no function whose forward has a context.
        if torch.compiler.is_compiling() or private.transforms_active():
            return _in_float32(x, base.weight, row, col, base.bias)
        return _InFloat32.apply(x, base.weight, row, col, base.bias)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # What a module's call runs instead of the forward while torch.jit.trace records: it could neither save nor
        # move what an autograd.Function does.
        return super().forward(*args, **kwargs)


class AcceleratedFloat32Linear(AcceleratedLinear):
    """The same with the products of 16-bit layers in float32."""

    products = "float32"


_CLASSES: dict[str, type[AcceleratedLinear]] = {"input": AcceleratedLinear, "float32": AcceleratedFloat32Linear}


def accelerate_hira(model: nn.Module, *, products: Literal["input", "float32"] = "input") -> HiraReport:
    """Makes the HiRA layers of a PEFT model compute by :func:`rlrr_kernels.rlrr_linear`; in place.

    Every linear HiRA layer gets the new forward and asks at each call whether it serves: adapters may be added, set,
    disabled, merged and deleted as before, and several active ones are computed as one of their ranks' sum. A layer
    keeps PEFT's path while it is merged or disabled, while a dropout module of its active adapters is in training mode,
    while their ranks sum to more than 64, while W is trained, while its base layer is of another class than
    ``nn.Linear`` or has another ``forward``, and where hooks want to see the call of it. Convolutions, embeddings,
    quantised layers and transposed ones (``fan_in_fan_out``) keep it always.

    Args:
        model: a model from ``get_peft_model(model, HiraConfig(...))``, or any module with such layers in it.
        products: of 16-bit layers without autocast. ``"input"``: in the dtype of x, W' rounded to it once: what the
            layer computes once it is merged, at the speed of 16-bit products, hence the default. ``"float32"``: x and W
            cast to float32 at each call and y rounded once. PEFT is between the two: it adds a product of x Wᵀ in 16
            bits to one of x (W ⊙ (B A))ᵀ in the dtype of its adapters, float32 unless asked otherwise. float32 and
            float64 layers, and calls under autocast, are not concerned.

    Returns:
        Which layers the next call computes how, in the mode that each is in now.

    Raises:
        ValueError: ``model`` has no HiRA layer, or ``products`` is none of these.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}; got {products!r}")
    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], HiraLayer)]
    if not layers:
        raise ValueError(
            "model must have HiRA layers, as get_peft_model(model, HiraConfig(...)) makes them; it has none"
        )
    accelerated, kept = [], {}
    for name, layer in layers:
        reason = _reason_ever(layer)
        if reason is None:
            layer.__class__ = _CLASSES[products]
            reason = _reason_now(layer, layer.base_layer, _active(layer))
        if reason is None:
            accelerated.append(name)
        else:
            kept[name] = reason
    return HiraReport(tuple(accelerated), kept)


def restore(model: nn.Module) -> int:
    """Gives every layer of ``model`` that :func:`accelerate_hira` changed PEFT's own forward again.

    Nothing else of a layer was touched, so the model is the one it was, bit for bit.

    Returns:
        The number of layers given back.

    Raises:
        ValueError: ``fully_shard`` has given such a layer a class of its own since, which would be lost.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, AcceleratedLinear)]
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in _CLASSES.values()})
    if others:
        raise ValueError(f"accelerated layers were given other classes since, by fully_shard: {', '.join(others)}")
    for layer in layers:
        layer.__class__ = HiraLinear  # type: ignore[assignment]
    return len(layers)


def _active(layer: HiraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.hira_A]


def _reason_ever(layer: Any) -> str | None:
    """Why a layer is none that ``rlrr_linear`` computes, in whatever state; None where it is one."""
    base = layer.get_base_layer()
    if isinstance(layer, HiraLinear) and type(layer) not in (HiraLinear, *_CLASSES.values()):
        return f"its class was made {type(layer).__name__} before, by fully_shard perhaps: accelerate the model first"
    if not isinstance(layer, HiraLinear):
        return f"HiRA's {type(layer).__name__} on {type(base).__name__} is no linear layer"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: its weight is stored transposed"
    if type(base.weight) is not nn.Parameter:
        return f"its weight is {type(base.weight).__name__}, not a plain parameter"
    if has_replaced_forward(layer):
        return "another tool has replaced its forward"
    return None


def _reason_now(layer: HiraLinear, base: nn.Linear, names: list[str]) -> str | None:
    """Why a linear layer takes PEFT's path in the state it is in; None where it does not."""
    if type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}, not nn.Linear"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if not names:
        return "none of its adapters is active"
    for name in names:
        dropout: Any = layer.hira_dropout[name]
        if dropout.training and not isinstance(dropout, nn.Identity) and dropout.p:
            return f"dropout of adapter {name!r} in training mode; in eval mode it is accelerated"
    rank = sum([layer.r[name] for name in names])
    if rank > MAX_RANK:
        return f"rank {rank} is over {MAX_RANK}"
    if base.weight.requires_grad:
        return "its base weight is trained"
    if has_hooks(base):
        return "hooks on its base layer, or another forward"
    return None


def _fit(x: Tensor, weight: Tensor, *scales: Tensor) -> bool:
    """Whether x and the tensors of a layer go together as PEFT and the operator both take them."""
    if x.dtype != weight.dtype and not compute_dtype(x)[1]:
        return False  # PEFT's own error says so
    device, dtypes = x.device, (x.dtype, torch.float32)
    return all([t.device == device and t.dtype in dtypes for t in (weight, *scales)])  # noqa: C419 (faster)


def _in_float32(x: Tensor, weight: Tensor, row: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    wide = None if bias is None else bias.float()
    return rlrr_linear(x.float(), weight.float(), row.float(), col.float(), wide).to(x.dtype)


class _InFloat32(ReverseOnly):
    """The same, for which x, W and the scales are kept in their own dtypes and cast again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, row: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, row, col)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _in_float32(x, weight, row, col, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, col = ctx.saved_tensors
        backend = backends.resolve("auto", x.device, torch.float32)
        need_x, _, need_row, need_col, need_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            needs = need_x, need_row, need_col
            grads = differentiable_gradients(
                lambda x, row, col: _in_float32(x, weight, row, col, None), (x, row, col), needs, grad_y
            )
            grad_bias = grad_y.flatten(0, -2).float().sum(0).to(ctx.bias_dtype) if need_bias else None
            return grads[0], None, *grads[1:], grad_bias
        g, wide_x, wide_weight, wide_row, wide_col = (t.float() for t in (grad_y, x, weight, row, col))
        found = dispatch.backward(
            g, wide_x, wide_weight, wide_row, wide_col, True, backend, (need_x, need_row, need_col, need_bias)
        )
        dtypes = x.dtype, row.dtype, col.dtype, ctx.bias_dtype
        grads = [None if grad is None else grad.to(dtype) for grad, dtype in zip(found, dtypes, strict=True)]
        return grads[0], None, *grads[1:]
