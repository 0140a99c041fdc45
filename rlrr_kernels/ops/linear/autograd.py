"""The autograd of ``rlrr_linear``, and ``Call``: what calls with tensors of one layout share.

Three roads lead to the same ``forward`` and ``backward`` of dispatch.py:

* eager: ``_Linear``, an ``autograd.Function`` of the old style, the cheapest per call;
* while compiling or exporting, for tensor subclasses, and under a ``TorchDispatchMode``, which sees operators alone
  (FLOP counters, selective checkpointing): the operator ``rlrr_kernels::linear`` (library.py);
* inside ``torch.func`` transforms: ``_LinearFunctorch``, which knows ``vmap``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.activation import functions as activation
from rlrr_kernels.ops.checks import canonical, compute_dtype
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.replay import PLAIN_TYPES, Replays, layout, plain_layout
from rlrr_kernels.ops.linear import dispatch
from rlrr_kernels.ops.recompute import Recompute
from rlrr_kernels.ops.sampling.row_sample import RowSample, flatten_sample, unflatten_sample
from rlrr_kernels.ops.second_order import ReverseOnly, differentiable_gradients
from rlrr_kernels.reference import rescaled_weight_reference


class Call:
    """What calls of one layout do with tensors that were checked.

    Attributes:
        backend: resolved, never ``auto``.
        residual, input_activation: as given to ``rlrr_linear``.
        dtype: to which x is cast first; None leaves it.
        eager: whether all tensors are plain and no transform or mode is at work.
    """

    __slots__ = ("_replays", "backend", "dtype", "eager", "input_activation", "residual")

    def __init__(
        self,
        backend: str,
        residual: bool,
        input_activation: str | None = None,
        dtype: torch.dtype | None = None,
        eager: bool = False,
    ) -> None:
        self.backend, self.residual, self.input_activation = backend, residual, input_activation
        self.dtype, self.eager = dtype, eager
        self._replays = Replays()

    @property
    def replayed(self) -> bool:
        """Whether the next forward is a replay."""
        return "forward" in self._replays

    def forward(self, x: Tensor, weight: Tensor, scale_row, scale_col, bias: Tensor | None) -> Tensor:
        """y [..., N] of an x [..., K] that was cast."""
        tensors = x, weight, scale_row, scale_col, bias
        options = self.residual, self.backend, self.input_activation
        if not (self.eager and self.backend.startswith("triton")):
            return dispatch.forward(*tensors, *options)
        return self._replays.run(
            "forward",  # of tensors in the layout by which this call is known
            tensors,
            lambda: (x.new_empty((*x.shape[:-1], weight.shape[0])),),
            lambda: (dispatch.forward(*tensors, *options),),
        )[0]

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        scale_row,
        scale_col,
        needs: tuple[bool, bool, bool, bool],
        sample: RowSample | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Those of ∂x, ∂scale_row, ∂scale_col and ∂bias that ``needs`` asks for: see :func:`dispatch.backward`."""
        tensors = grad_y, x, weight, scale_row, scale_col
        options = self.residual, self.backend, needs, self.input_activation, sample
        if sample is not None or not self.backend.startswith("triton"):
            return dispatch.backward(*tensors, *options)
        # Of every tensor anew: a hook on saved tensors, ``.data`` or offloading may have moved it since the forward.
        of_tensors = layout(*tensors)
        return self._replays.run(
            None if of_tensors is None else (needs, of_tensors),
            tensors,
            lambda: empty_grads(*tensors, needs),
            lambda: dispatch.backward(*tensors, *options),
        )


class CallCache(dict[tuple, Call]):
    """The calls that are known, by all that they depend on.

    Calls that cannot be known again stay away from it: a compiler that traces a look-up guards every key, which takes
    seconds, and each new layout compiles again.
    """

    _MOST = 4096  # a model has a few dozen

    def keep(self, key: tuple, call: Call) -> None:
        """From now on ``call`` is the one of ``key``."""
        if len(self) >= self._MOST:
            self.clear()
        self[key] = call


def call_key(tensors: tuple[Tensor | None, ...], backend: str, *options: object) -> tuple | None:
    """All that an eager call depends on but the values in its tensors: x, W and others, and ``options``.

    None where a transform, a compiler or a mode that watches operators is at work, and for tensors that are no plain
    ones.
    """
    if torch.compiler.is_compiling() or private.transforms_active() or private.dispatch_modes():
        return None
    of_tensors = plain_layout(*tensors)
    if of_tensors is None:
        return None
    x, weight, *_ = tensors
    return (
        of_tensors, weight.requires_grad and torch.is_grad_enabled(),
        options, backend, backend == "auto" and backends.default_backend(), backends.INTERPRETING,
        private.any_autocast() and compute_dtype(x),
    )  # fmt: skip


def is_watched() -> bool:
    """Whether a mode wants to see every operator, which Python that starts kernels is not."""
    return private.dispatch_modes() > 0 and not private.transforms_active()


def empty_grads(grad_y, x, weight, scale_row, scale_col, needs) -> tuple[Tensor | None, ...]:
    """Those of ∂x, ∂scale_row, ∂scale_col and ∂bias that are needed, without values."""
    need_x, need_row, need_col, need_bias = needs
    return (
        grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])) if need_x else None,
        torch.empty_like(scale_row) if need_row else None,
        torch.empty_like(scale_col) if need_col else None,
        grad_y.new_empty(weight.shape[0], dtype=accumulate_dtype(grad_y.dtype)) if need_bias else None,
    )


def linear(
    x: Tensor, weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None, call: Call,
    sample: RowSample | None, recompute: Recompute | None,
) -> Tensor:  # fmt: skip
    """y [..., N] of checked tensors, differentiable; ``recompute`` says how x is computed again."""
    options = call.residual, call.backend, call.input_activation, *flatten_sample(sample)
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TYPES or is_watched():
        scale_row, scale_col = canonical(scale_row, scale_col, weight)
        return torch.ops.rlrr_kernels.linear(x, weight, scale_row, scale_col, bias, *options)
    if private.transforms_active():
        return _LinearFunctorch.apply(x, weight, scale_row, scale_col, bias, *options)
    return _Linear.apply(x, weight, scale_row, scale_col, bias, (call, sample, recompute, False))


# ---------------------------------------------------------------- eager, and the operator's autograd


class _Linear(ReverseOnly):
    """Saves only what the gradients asked for will read: x or rows of it for the scales, the weight for x and them.

    For an x that can be computed again, the tensors that this takes instead. ``options`` are call, sample, recompute
    and through_op in one argument: each argument, gradient and attribute of ctx costs host time.
    """

    @staticmethod
    def forward(ctx, x, weight, scale_row, scale_col, bias, options):
        call, sample, recompute, through_op = options
        need_x, _, need_row, need_col, need_bias, _ = ctx.needs_input_grad
        need_scales = need_row or need_col
        if not need_scales:
            sample = None
        if need_scales or need_x:
            reads_x = need_scales or call.input_activation is not None
            recompute = recompute if reads_x else None
            reads_x = reads_x and recompute is None
            kept = x if reads_x else None
            if reads_x and sample is not None:
                kept = dispatch.rows_for_backward(x, sample, call.input_activation)
            index, ingredients = sample[:1] if sample else (), recompute.tensors if recompute else ()
            ctx.save_for_backward(kept, weight, scale_row, scale_col, *index, *ingredients)
        needs = need_x, need_row, need_col, need_bias
        counts, compute_x = sample and sample[1:], recompute and recompute.compute
        ctx.options = call, needs, need_bias and bias.dtype, counts, compute_x, through_op
        if through_op:
            # The forward has no use for the sample. But what no output needs, a compiled backward draws anew: then g is
            # of other rows than x.
            with private.BelowAutograd():
                return torch.ops.rlrr_kernels.linear(
                    x, weight, scale_row, scale_col, bias, call.residual, call.backend, call.input_activation,
                    *flatten_sample(sample),
                )  # fmt: skip
        return call.forward(x, weight, scale_row, scale_col, bias)

    @staticmethod
    def backward(ctx, grad_y):
        call, needs, bias_dtype, counts, compute_x, through_op = ctx.options
        if torch.is_grad_enabled() or _is_batch(grad_y):  # the former: create_graph=True
            return _backward_by_formula(ctx, grad_y)
        x, weight, scale_row, scale_col, *others = ctx.saved_tensors or (None, None, None, None)
        sample = None
        if counts:
            index, *others = others
            sample = RowSample(index, *counts)
        if others:
            x = dispatch.rows_for_backward(compute_x(grad_y.dtype, *others), sample, call.input_activation)
        if weight is None:
            grad_x = grad_row = grad_col = None
            grad_bias = dispatch.flattened(grad_y).sum(0, dtype=accumulate_dtype(grad_y.dtype))
        elif through_op or private.transforms_active() or is_watched():
            vmapped = private.transforms_active() and not through_op  # vmap over autograd.grad
            run = _LinearBackwardFunctorch.apply if vmapped else torch.ops.rlrr_kernels.linear_backward
            scales, options = canonical(scale_row, scale_col, weight), (call.residual, call.backend, needs)
            grads = run(grad_y, x, weight, *scales, *options, call.input_activation, *flatten_sample(sample))
            grad_x, grad_row, grad_col, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
            if not through_op:  # whose scales have the long form themselves
                grad_row = None if grad_row is None else grad_row.view_as(scale_row)
                grad_col = None if grad_col is None else grad_col.view_as(scale_col)
        else:
            grad_x, grad_row, grad_col, grad_bias = call.backward(
                grad_y, x, weight, scale_row, scale_col, needs, sample
            )
        if grad_bias is not None and grad_bias.dtype != bias_dtype:
            grad_bias = grad_bias.to(bias_dtype)
        return grad_x, None, grad_row, grad_col, grad_bias, None


_is_batch = private.is_batch
"""Whether a gradient stands for a batch of them, as ``is_grads_batched=True`` and vectorized jacobians have it."""

linear_function = _Linear.apply
eager_linear = super(torch.autograd.Function, _Linear).apply
"""``_Linear.apply`` but for what ``torch.func`` transforms need there, 2 µs of Python before PyTorch 2.15."""


def _backward_by_formula(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients by the formula, which autograd can differentiate again and for a batch of ``grad_y``."""
    call, needs, bias_dtype, counts, compute_x, through_op = ctx.options
    if through_op or counts or compute_x:
        raise NotImplementedError(NO_DOUBLE_BACKWARD)
    x, weight, scale_row, scale_col = ctx.saved_tensors or (None, None, None, None)
    grads = [None, None, None]
    if weight is not None:
        if x is None:  # ∂x alone is asked for, and y is linear in x: any x gives it
            x = weight.new_zeros(*grad_y.shape[:-1], weight.shape[1], dtype=grad_y.dtype).requires_grad_()

        def formula(x: Tensor, scale_row: Tensor | None, scale_col: Tensor | None) -> Tensor:
            wide = accumulate_dtype(x.dtype)
            row, col = canonical(scale_row, scale_col, weight)
            merged = rescaled_weight_reference(weight.to(wide), row.to(wide), col.to(wide), residual=call.residual)
            a = x if call.input_activation is None else activation.forward(x, call.input_activation)
            return F.linear(a, merged.to(a.dtype))

        grads = differentiable_gradients(formula, (x, scale_row, scale_col), needs[:3], grad_y)
    grad_bias = None
    if needs[3]:  # by a sum over all rows that a batch of grad_y has a rule for
        grad_bias = grad_y.to(accumulate_dtype(grad_y.dtype))
        grad_bias = grad_bias.sum(tuple(range(grad_y.dim() - 1))) if grad_y.dim() > 1 else grad_bias
    return grads[0], None, grads[1], grads[2], None if grad_bias is None else grad_bias.to(bias_dtype), None


# ---------------------------------------------------------------- torch.func


class _LinearFunctorch(ReverseOnly):
    """The same under ``torch.func``: rows of a batched x are folded into one call, batched parameters are looped.

    So are calls with sampled rows, which count within one x. All of x is saved: here only inputs and results may be.
    """

    @staticmethod
    def forward(x, weight, scale_row, scale_col, bias, residual, backend, input_activation, *sample):
        return dispatch.forward(x, weight, scale_row, scale_col, bias, residual, backend, input_activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scale_row, scale_col, bias, residual, backend, input_activation, index, *ctx.counts = inputs
        ctx.options = residual, backend, input_activation
        ctx.save_for_backward(x, weight, scale_row, scale_col, index)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_y):
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
        x, *tensors, index = ctx.saved_tensors
        residual, backend, input_activation = ctx.options
        x = dispatch.rows_for_backward(x, unflatten_sample(index, *ctx.counts), input_activation)
        grads = _LinearBackwardFunctorch.apply(
            grad_y, x, *tensors, residual, backend, needs, input_activation, index, *ctx.counts
        )
        grad_x, grad_row, grad_col, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, grad_row, grad_col, grad_bias, *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, *args):
        index = args[8]
        if index is None and all(dim is None for dim in in_dims[1:5]):
            return _LinearFunctorch.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return torch.stack([_LinearFunctorch.apply(*_select(args, in_dims, i)) for i in range(info.batch_size)]), 0


class _LinearBackwardFunctorch(ReverseOnly):
    @staticmethod
    def forward(grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation, *sample):
        grads = dispatch.backward(
            grad_y, x, weight, scale_row, scale_col, residual, backend, needs, input_activation,
            unflatten_sample(*sample),
        )  # fmt: skip
        return tuple(grad_y.new_empty(0) if grad is None else grad for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(NO_DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, *args):
        parts = [_LinearBackwardFunctorch.apply(*_select(args, in_dims, i)) for i in range(info.batch_size)]
        return tuple(torch.stack(grads) for grads in zip(*parts, strict=True)), (0, 0, 0, 0)


NO_DOUBLE_BACKWARD = (
    "rlrr_linear can be differentiated only once, and by one gradient at a time, in compiled code, inside torch.func, "
    "with scale_grad_rows and where its input is recomputed; for second derivatives there use "
    "rlrr_kernels.reference.rlrr_linear_reference, which is differentiable any number of times"
)


def _select(args, in_dims, index: int):
    return tuple(
        arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
        for arg, dim in zip(args, in_dims, strict=True)
    )
