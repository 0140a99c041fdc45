"""``rlrr_linear``: the public function, its autograd, and its registration as a torch operator.

Three roads lead to the same ``compute_linear`` and ``compute_gradients`` (linear_compute.py):

* eager: ``_Linear``, an ``autograd.Function`` of the old style, the cheapest per call;
* while compiling or exporting, and for tensor subclasses: the operator ``rlrr_kernels::linear``;
* inside ``torch.func`` transforms: ``_LinearFunctorch``, which knows ``vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlrr_kernels import backends
from rlrr_kernels.ops.activation import functions as activation
from rlrr_kernels.ops.checks import (
    autocast_input,
    canonical,
    check_dtypes,
    check_input,
    check_parameters,
    check_tensors,
)
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import call as linear_call
from rlrr_kernels.ops.host.call import PLAIN_TYPES, Call
from rlrr_kernels.ops.linear.dispatch import compute_gradients, compute_linear, rows_for_backward
from rlrr_kernels.ops.recompute import Recipe, recipe_of
from rlrr_kernels.ops.sampling.row_sample import RowSample, check_sample, flatten_sample, unflatten_sample


def rlrr_linear(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    bias: Tensor | None = None,
    *,
    residual: bool = True,
    input_activation: str | None = None,
    backend: str = "auto",
    scale_grad_rows: RowSample | None = None,
) -> Tensor:
    """y = x W'ᵀ + b with W' = W ⊙ (1 + s_r s_c): a frozen linear layer under a low-rank rescaling.

    Eq. 16 of "Low-Rank Rescaled Vision Transformer Fine-Tuning" (CVPR 2024) for rank 1; any rank is the method called
    HiRA. W' never outlives the call. Between forward and backward only x and the parameters are kept. With
    g = ∂L/∂y and G = gᵀx: ∂x = g W', ∂s_r = (G ⊙ W) s_cᵀ, ∂s_c = s_rᵀ (G ⊙ W), ∂b = Σ g.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64. Under autocast it is cast as ``F.linear`` would cast it.
        weight: [N, K], frozen; the dtype of x, or float32 beside a 16-bit x (cast tile by tile, never as a whole).
        scale_row: s_r, [N] or [N, r] with r ≤ 64; None stands for ones. float32 or the dtype of x.
        scale_col: s_c, [K] or [G, K] beside a 1-D ``scale_row``, [r, K] or [G, r, K] beside a 2-D one; None stands for
            ones. Row n of W uses group n // (N / G). float32 or the dtype of x.
        bias: [N], float32 or the dtype of x.
        residual: whether W itself is added; ``False`` gives W' = W ⊙ (s_r s_c).
        input_activation: a function of :data:`rlrr_kernels.ops.activation.functions.ACTIVATIONS` applied to x first:
            y = act(x) W'ᵀ + b. Only x is kept; the backward computes act(x) again. None: x as it is.
        backend: ``auto``, ``triton``, ``triton.one_pass``, ``triton.merge``, ``cpp`` or ``torch``; ``auto`` asks
            :func:`rlrr_kernels.use_backend`, then the environment variable ``RLRR_BACKEND``, then the device.
        scale_grad_rows: an estimate instead of the exact ∂s_r and ∂s_c: G from these rows alone, see
            :class:`rlrr_kernels.RowSample`. y, ∂x and ∂b stay exact. Of x only these rows are kept for the backward;
            all of it with an ``input_activation``, whose derivative ∂x needs, and inside ``torch.func`` transforms.

    Returns:
        y, [..., N] in the dtype of x after autocast. 1 + s_r s_c and all sums are fp32 (fp64 for float64); float32
        products obey :func:`torch.get_float32_matmul_precision`.

    Raises:
        TypeError: an argument is no tensor or has a dtype not named above, or ``scale_grad_rows`` is no RowSample.
        ValueError: a shape does not fit, devices differ, G does not divide N, the rank is over 64, ``weight`` requires
            a gradient, the activation is unknown, or the backend cannot run here.
        IndexError: a row of ``scale_grad_rows`` is not in x (on a GPU: a device-side assertion).
    """
    recipe = recipe_of(x)
    if input_activation is not None:
        activation.check_name("input_activation", input_activation)
    layout = _eager_layout(x, weight, scale_row, scale_col, bias, residual, backend)
    call = None if layout is None else linear_call.known(layout)
    if call is None:
        check_tensors(x, weight, scale_row, scale_col, bias)
        dtype = x.dtype
        x, autocast = autocast_input(x)
        check_dtypes(x.dtype, weight.dtype, scale_row, scale_col, bias, autocast)
        check_input(x, weight)
        check_parameters(weight, scale_row, scale_col, bias)
        call = Call(backends.resolve(backend, x.device.type, x.dtype), residual, None if x.dtype == dtype else x.dtype)
        linear_call.remember(layout, call, x, weight, scale_row, scale_col, bias)
    elif call.dtype is not None:
        x = x.to(call.dtype)
    if scale_grad_rows is not None:
        check_sample("scale_grad_rows", scale_grad_rows, x)
    return _linear(x, weight, scale_row, scale_col, bias, call, input_activation, scale_grad_rows, recipe)


def checked_linear(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    bias: Tensor | None,
    residual: bool,
    backend: str,
    input_activation: str | None,
    sample: RowSample | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """:func:`rlrr_linear` of arguments that were checked, with a resolved backend; ``recipe`` is that of x."""
    layout = _eager_layout(x, weight, scale_row, scale_col, bias, residual, backend)
    call = None if layout is None else linear_call.known(layout)
    if call is None:
        call = Call(backend, residual)
        linear_call.remember(layout, call, x, weight, scale_row, scale_col, bias)
    return _linear(x, weight, scale_row, scale_col, bias, call, input_activation, sample, recipe)


def _eager_layout(x, weight, scale_row, scale_col, bias, residual, backend) -> tuple | None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    layout = linear_call.layout_of(x, weight, scale_row, scale_col, bias, residual, backend)
    return None if layout is None or _is_wrapped(x) else layout  # wrapped: left over from a transform that has ended


def _linear(x, weight, scale_row, scale_col, bias, call: Call, input_activation, sample, recipe) -> Tensor:
    if not call.eager:
        options = call.residual, call.backend, input_activation, *flatten_sample(sample)
        if torch.compiler.is_compiling() or type(x) not in PLAIN_TYPES:
            scale_row, scale_col = canonical(scale_row, scale_col, weight)
            return torch.ops.rlrr_kernels.linear(x, weight, scale_row, scale_col, bias, *options)
        if torch._C._are_functorch_transforms_active():
            return _LinearFunctorch.apply(x, weight, scale_row, scale_col, bias, *options)
    apply = _apply if call.eager else _Linear.apply
    return apply(x, weight, scale_row, scale_col, bias, (call, input_activation, False, sample, recipe))


# ---------------------------------------------------------------- eager, and the operator's autograd


class _Linear(torch.autograd.Function):
    """Saves only what the gradients asked for will read: x or rows of it for the scales, the weight for x and them.

    For an x with a recipe, the tensors that the recipe takes instead. ``options`` is call, input_activation,
    through_op, sample and recipe in one argument: each argument, gradient and attribute of ctx costs host time.
    """

    @staticmethod
    def forward(ctx, x, weight, scale_row, scale_col, bias, options):
        call, input_activation, through_op, sample, recipe = options
        need_x, _, need_row, need_col, need_bias, _ = ctx.needs_input_grad
        need_scales = need_row or need_col
        if not need_scales:
            sample = None
        if need_scales or need_x:
            reads_x = need_scales or input_activation is not None
            recipe = recipe if reads_x else None
            kept = rows_for_backward(x, sample, input_activation) if reads_x and recipe is None else None
            index, ingredients = sample[:1] if sample else (), recipe.tensors if recipe else ()
            ctx.save_for_backward(kept, weight, scale_row, scale_col, *index, *ingredients)
        needs = need_x, need_row, need_col, need_bias
        counts, compute_x = sample and sample[1:], recipe and recipe.compute
        ctx.options = call, input_activation, through_op, needs, need_bias and bias.dtype, counts, compute_x
        if through_op:
            # The forward has no use for the sample. But what no output needs, a compiled backward draws anew: then g is
            # of other rows than x.
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.rlrr_kernels.linear(
                    x, weight, scale_row, scale_col, bias, call.residual, call.backend, input_activation,
                    *flatten_sample(sample),
                )  # fmt: skip
        if input_activation is None:
            return call.forward(x, weight, scale_row, scale_col, bias)
        return compute_linear(x, weight, scale_row, scale_col, bias, call.residual, call.backend, input_activation)

    @staticmethod
    def backward(ctx, grad_y):
        # Gradients are on under create_graph=True alone: only then the guard, which costs a microsecond, has a task.
        return _gradients_once(ctx, grad_y) if torch.is_grad_enabled() else _gradients(ctx, grad_y)


_apply = super(torch.autograd.Function, _Linear).apply
"""``_Linear.apply`` but for what ``torch.func`` transforms need there, 2 µs of Python before PyTorch 2.15."""

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _gradients(ctx, grad_y):
    call, input_activation, through_op, needs, bias_dtype, counts, compute_x = ctx.options
    x, weight, scale_row, scale_col, *others = ctx.saved_tensors or (None, None, None, None)
    sample = None
    if counts:
        index, *others = others
        sample = RowSample(index, *counts)
    if others:
        x = rows_for_backward(compute_x(grad_y.dtype, *others), sample, input_activation)
    if weight is None:
        grad_x = grad_row = grad_col = None
        grad_bias = grad_y.flatten(0, -2).sum(0, dtype=accumulate_dtype(grad_y.dtype))
    elif through_op:
        grads = torch.ops.rlrr_kernels.linear_backward(
            grad_y, x, weight, scale_row, scale_col, call.residual, call.backend, needs, input_activation,
            *flatten_sample(sample),
        )  # fmt: skip
        grad_x, grad_row, grad_col, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    elif sample is None and input_activation is None:
        grad_x, grad_row, grad_col, grad_bias = call.gradients(grad_y, x, weight, scale_row, scale_col, needs)
    else:
        grad_x, grad_row, grad_col, grad_bias = compute_gradients(
            grad_y, x, weight, scale_row, scale_col, call.residual, call.backend, needs, input_activation, sample
        )
    if grad_bias is not None and grad_bias.dtype != bias_dtype:
        grad_bias = grad_bias.to(bias_dtype)
    return grad_x, None, grad_row, grad_col, grad_bias, None


_gradients_once = once_differentiable(_gradients)


# ---------------------------------------------------------------- torch.func


class _LinearFunctorch(torch.autograd.Function):
    """The same under ``torch.func``: rows of a batched x are folded into one call, batched parameters are looped.

    So are calls with sampled rows, which count within one x. All of x is saved: here only inputs and results may be.
    """

    @staticmethod
    def forward(x, weight, scale_row, scale_col, bias, residual, backend, input_activation, *sample):
        return compute_linear(x, weight, scale_row, scale_col, bias, residual, backend, input_activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scale_row, scale_col, bias, residual, backend, input_activation, index, *ctx.counts = inputs
        ctx.options = residual, backend, input_activation
        ctx.save_for_backward(x, weight, scale_row, scale_col, index)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_y):
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
        *tensors, index = ctx.saved_tensors
        grads = _LinearBackwardFunctorch.apply(grad_y, *tensors, *ctx.options, needs, index, *ctx.counts)
        grad_x, grad_row, grad_col, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, grad_row, grad_col, grad_bias, *(None,) * 7

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_JVP)

    @staticmethod
    def vmap(info, in_dims, *args):
        index = args[8]
        if index is None and all(dim is None for dim in in_dims[1:5]):
            return _LinearFunctorch.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return torch.stack([_LinearFunctorch.apply(*_select(args, in_dims, i)) for i in range(info.batch_size)]), 0


class _LinearBackwardFunctorch(torch.autograd.Function):
    @staticmethod
    def forward(grad_y, x, weight, scale_row, scale_col, residual, backend, input_activation, needs, *sample):
        sample = unflatten_sample(*sample)
        x = rows_for_backward(x, sample, input_activation)
        grads = compute_gradients(
            grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation, sample
        )
        return tuple(grad_y.new_empty(0) if grad is None else grad for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_JVP)

    @staticmethod
    def vmap(info, in_dims, *args):
        parts = [_LinearBackwardFunctorch.apply(*_select(args, in_dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(grads) for grads in zip(*parts, strict=True)), (0, 0, 0, 0)


_NO_JVP = (
    "rlrr_linear has no forward-mode derivative; use reverse mode, or "
    "rlrr_kernels.reference.rlrr_linear_reference, which is differentiable in every mode"
)
_NO_DOUBLE_BACKWARD = (
    "rlrr_linear can be differentiated only once; for second derivatives use "
    "rlrr_kernels.reference.rlrr_linear_reference, which is differentiable any number of times"
)


def _select(args, in_dims, index: int):
    return tuple(
        arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
        for arg, dim in zip(args, in_dims, strict=True)
    )


# ---------------------------------------------------------------- torch.ops.rlrr_kernels

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
    backend = backends.resolve(backend, x.device.type, x.dtype)
    return compute_linear(x, weight, scale_row, scale_col, bias, residual, backend, input_activation)


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
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.ops.rlrr_kernels.linear does not work inside torch.func transforms, forward mode included; "
            "rlrr_kernels.rlrr_linear does (reverse mode and vmap)"
        )
    if _nobody_watches(x) and input_activation is None:
        tensors = x, weight, scale_row, scale_col, bias
        layout = "operator", linear_call.layout_of(*tensors, residual, backend)
        call = linear_call.known(layout)
        if call is None:
            _check_canonical(*tensors, None, *sample)
            call = _remembered(layout, backend, residual, tensors)
        return call.forward(*tensors)
    options = Call(backend, residual), input_activation, True, unflatten_sample(*sample), None
    return _Linear.apply(x, weight, scale_row, scale_col, bias, options)


def _nobody_watches(x: Tensor) -> bool:
    """Whether a call is for its numbers alone, as compiled code makes it: then it is made as in eager mode."""
    plain = type(x) in PLAIN_TYPES and not _is_wrapped(x)
    return plain and not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()


def _remembered(layout: tuple, backend: str, residual: bool, tensors: tuple[Tensor | None, ...]) -> Call:
    call = Call(backends.resolve(backend, tensors[0].device.type, tensors[0].dtype), residual)
    linear_call.remember(layout if all(layout) else None, call, *tensors)
    return call


def _linear_autocast(device_type: str):
    def cast(x, *arguments):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device_type))
        with torch.amp.autocast(device_type, enabled=False):
            return torch.ops.rlrr_kernels.linear(x, *arguments)

    return cast


def _linear_backward_op(
    grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation=None, *sample
):
    backend = backends.resolve(backend, grad_y.device.type, grad_y.dtype)
    grads = compute_gradients(
        grad_y,
        x,
        weight,
        scale_row,
        scale_col,
        residual,
        backend,
        tuple(needs),
        input_activation,
        unflatten_sample(*sample),
    )
    return _as_outputs(grad_y, grads)


def _as_outputs(grad_y: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(grad_y.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _linear_backward_fake(
    grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation=None, *sample
):
    need_x, need_row, need_col, need_bias = needs
    empty = grad_y.new_empty
    return (
        empty(*grad_y.shape[:-1], weight.shape[1]) if need_x else empty(0),
        empty(scale_row.shape, dtype=scale_row.dtype) if need_row else empty(0),
        empty(scale_col.shape, dtype=scale_col.dtype) if need_col else empty(0),
        empty(weight.shape[0], dtype=accumulate_dtype(grad_y.dtype)) if need_bias else empty(0),
    )


def _linear_backward_autograd(grad_y, x, weight, scale_row, scale_col, *options):
    tensors = (grad_y, x, weight, scale_row, scale_col)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)
    residual, backend, needs, input_activation, rows, *_ = *options, None, None
    if _nobody_watches(grad_y) and input_activation is None and rows is None:
        of_x = "without x" if x is None else (type(x), x.shape, x.dtype, x.device)
        layout = of_x, linear_call.layout_of(grad_y, *tensors[2:], None, residual, backend)
        call = linear_call.known(layout) or _remembered(layout, backend, residual, tensors)
        return _as_outputs(grad_y, call.gradients(*tensors, tuple(needs)))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.rlrr_kernels.linear_backward(*tensors, *options)


_library.impl("linear", _linear_op, "CompositeExplicitAutograd")
_library.impl("linear", _linear_autograd, "Autograd")
_library.impl("linear", _linear_autocast("cpu"), "AutocastCPU")
_library.impl("linear", _linear_autocast("cuda"), "AutocastCUDA")
_library.impl("linear_backward", _linear_backward_op, "CompositeExplicitAutograd")
_library.impl("linear_backward", _linear_backward_autograd, "Autograd")
torch.library.register_fake("rlrr_kernels::linear", _linear_fake, lib=_library)
torch.library.register_fake("rlrr_kernels::linear_backward", _linear_backward_fake, lib=_library)
