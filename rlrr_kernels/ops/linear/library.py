"""``torch.ops.rlrr_kernels.linear`` and its backward: what compilers, exporters and tensor subclasses see.

Scales come in the long form, [N, r] and [G, r, K]; a sample of rows as its index, two counts and a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels.backends import default_backend, resolve
from rlrr_kernels.ops.activation import functions as activation
from rlrr_kernels.ops.checks import check_input, check_parameters
from rlrr_kernels.ops.flops import tell_counters
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.replay import PLAIN_TYPES, plain_layout
from rlrr_kernels.ops.linear import dispatch
from rlrr_kernels.ops.linear.autograd import NO_DOUBLE_BACKWARD, Call, CallCache, empty_grads, linear_function
from rlrr_kernels.ops.sampling.row_sample import check_sample, unflatten_sample

_library = torch.library.Library("rlrr_kernels", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor? bias=None, bool residual=True, "
    'str backend="auto", str? input_activation=None, Tensor? rows=None, SymInt kept=0, float row_weight=1.0, '
    "SymInt images=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor scale_row, Tensor scale_col, bool residual, "
    "str backend, bool[] needs, str? input_activation=None, Tensor? rows=None, SymInt kept=0, float row_weight=1.0, "
    "SymInt images=0) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_op(
    x, weight, scale_row, scale_col, bias=None, residual=True, backend="auto", input_activation=None, *sample
):
    _check_canonical(x, weight, scale_row, scale_col, bias, input_activation, *sample)
    backend = resolve(backend, x.device, x.dtype)
    return dispatch.forward(x, weight, scale_row, scale_col, bias, residual, backend, input_activation)


def _check_canonical(x, weight, scale_row, scale_col, bias, input_activation, *sample) -> None:
    if input_activation is not None:
        activation.check_name("input_activation", input_activation)
    if scale_row.dim() != 2 or scale_col.dim() != 3:
        raise ValueError(
            "torch.ops.rlrr_kernels.linear takes scale_row [N, r] and scale_col [G, r, K]; got shapes "
            f"{tuple(scale_row.shape)} and {tuple(scale_col.shape)}. rlrr_kernels.rlrr_linear takes the short forms"
        )
    check_input(x, weight)
    check_parameters(weight, scale_row, scale_col, bias)
    if (rows := unflatten_sample(*sample)) is not None:
        check_sample("rows", rows, x)


def _linear_fake(
    x, weight, scale_row, scale_col, bias=None, residual=True, backend="auto", input_activation=None, *sample
):
    _check_canonical(x, weight, scale_row, scale_col, bias, input_activation, *sample)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_autograd(
    x, weight, scale_row, scale_col, bias=None, residual=True, backend="auto", input_activation=None, *sample
):
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen: rlrr_kernels::linear computes no gradient for it")
    if private.transforms_active():
        raise NotImplementedError(
            "torch.ops.rlrr_kernels.linear does not work inside torch.func transforms, forward mode included; "
            "rlrr_kernels.rlrr_linear does (reverse mode and vmap)"
        )
    if _nobody_watches(x):
        tensors = x, weight, scale_row, scale_col, bias
        return _call_for(residual, input_activation, backend, *tensors, check=True).forward(*tensors)
    tell_counters()
    options = Call(backend, residual, input_activation), unflatten_sample(*sample), None, True
    return linear_function(x, weight, scale_row, scale_col, bias, options)


def _nobody_watches(x: Tensor) -> bool:
    """Whether a call is for its numbers alone, as compiled code makes it: then it is made as in eager mode."""
    return (
        type(x) in PLAIN_TYPES
        and not private.is_transformed(x)
        and not torch.is_grad_enabled()
        and not private.dispatch_modes()
    )


_calls = CallCache()


def _call_for(residual, input_activation, backend, *tensors: Tensor | None, check: bool) -> Call:
    """What calls with tensors of this layout share; the first tensor decides the backend."""
    of_tensors = plain_layout(*tensors)
    key = of_tensors and (of_tensors, residual, input_activation, backend, backend == "auto" and default_backend())
    call = None if key is None else _calls.get(key)
    if call is None:
        if check:
            _check_canonical(*tensors, input_activation)
        first = tensors[0]
        call = Call(resolve(backend, first.device, first.dtype), residual, input_activation, None, key is not None)
        if key is not None:
            _calls.keep(key, call)
    return call


def cast_by_autocast(library: torch.library.Library, name: str) -> None:
    """Has autocast cast the first argument of an operator as it would that of ``F.linear``."""
    for device_type in ("cpu", "cuda"):

        def cast(x, *arguments, device_type=device_type):
            if x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device_type))
            with torch.amp.autocast(device_type, enabled=False):
                return getattr(torch.ops.rlrr_kernels, name)(x, *arguments)

        library.impl(name, cast, f"Autocast{device_type.upper()}")


def _linear_backward_op(
    grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation=None, *sample
):
    backend = resolve(backend, grad_y.device, grad_y.dtype)
    grads = dispatch.backward(
        grad_y, x, weight, scale_row, scale_col, residual, backend, tuple(needs), input_activation,
        unflatten_sample(*sample),
    )  # fmt: skip
    return as_outputs(grad_y, grads)


def as_outputs(grad_y: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Gradients as an operator gives them back: an empty tensor for one that is not needed."""
    return tuple(grad_y.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _linear_backward_fake(grad_y, x, weight, scale_row, scale_col, residual, backend, needs, *options):
    return as_outputs(grad_y, empty_grads(grad_y, x, weight, scale_row, scale_col, needs))


def _linear_backward_autograd(grad_y, x, weight, scale_row, scale_col, *options):
    tensors = (grad_y, x, weight, scale_row, scale_col)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(NO_DOUBLE_BACKWARD)
    residual, backend, needs, input_activation, rows, *_ = *options, None, None
    if _nobody_watches(grad_y) and rows is None:
        call = _call_for(residual, input_activation, backend, *tensors, check=False)
        return as_outputs(grad_y, call.backward(*tensors, tuple(needs)))
    tell_counters()
    with private.BelowAutograd():
        return torch.ops.rlrr_kernels.linear_backward(*tensors, *options)


_library.impl("linear", _linear_op, "CompositeExplicitAutograd")
_library.impl("linear", _linear_autograd, "Autograd")
cast_by_autocast(_library, "linear")
_library.impl("linear_backward", _linear_backward_op, "CompositeExplicitAutograd")
_library.impl("linear_backward", _linear_backward_autograd, "Autograd")
torch.library.register_fake("rlrr_kernels::linear", _linear_fake, lib=_library)
torch.library.register_fake("rlrr_kernels::linear_backward", _linear_backward_fake, lib=_library)
