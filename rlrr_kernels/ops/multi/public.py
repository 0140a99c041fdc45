"""``rlrr_linear_multi``: the public function. It checks its arguments and resolves the backend, once a layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrr_kernels import backends
from rlrr_kernels.ops.checks import canonical, check_tensors
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.replay import PLAIN_TYPES
from rlrr_kernels.ops.linear.autograd import Call, CallCache, call_key, is_watched
from rlrr_kernels.ops.multi import dispatch, library  # noqa: F401  (registers torch.ops.rlrr_kernels.linear_multi)
from rlrr_kernels.ops.multi.autograd import Options, eager_linear_multi, linear_multi_function
from rlrr_kernels.ops.multi.checks import check_index_of, check_samples, check_stacks, check_values
from rlrr_kernels.ops.multi.task_index import TaskIndex, check_transforms


def rlrr_linear_multi(
    x: Tensor,
    weight: Tensor,
    scale_row: Tensor | None,
    scale_col: Tensor | None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor | TaskIndex,
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    """:func:`rlrr_kernels.rlrr_linear` where every sample of a batch has its own of T adapters of one frozen layer.

    y[s] = x[s] (W ⊙ (1 + s_r[t] s_c[t]))ᵀ + b + f[t] with t = index[s]; y[s] = x[s] Wᵀ + b where index[s] is -1. No W'
    is kept for a task. Adapters that no sample takes cost nothing but the zeros of their gradients.

    Args:
        x: [S, ..., K], S samples; dtypes and autocast as in ``rlrr_linear``.
        weight: [N, K], frozen; the dtype of x, or float32 beside a 16-bit x.
        scale_row: s_r, [T, N] or [T, N, r] with r ≤ 64; None stands for ones. float32 or the dtype of x.
        scale_col: s_c, [T, K] or [T, G, K] beside a 2-D ``scale_row``, [T, r, K] or [T, G, r, K] beside a 3-D one; None
            stands for ones. float32 or the dtype of x.
        bias: b, [N], shared by all samples; float32 or the dtype of x.
        shift: f, [T, N], added to b; float32 or the dtype of x.
        index: [S], int32 or int64 with values from -1 to T - 1, on the CPU or on the device of x (then it is copied to
            the host, which waits for the GPU); or a :class:`TaskIndex`, made once for the layers of a model.
        residual: whether W itself is added; ``False`` gives W' = W ⊙ (s_r s_c), but W for bare samples.
        backend: as in ``rlrr_linear``.

    Second derivatives work in eager mode, by the formula in plain torch, task by task. ``torch.func`` transforms and
    forward-mode derivatives are refused.

    Returns:
        y, [S, ..., N] in the dtype of x after autocast, computed as exactly as ``rlrr_linear`` computes each sample.

    Raises:
        TypeError: an argument is no tensor or has a dtype not named above.
        ValueError: a shape does not fit, devices differ, or as in ``rlrr_linear``.
        IndexError: ``index`` has a value below -1 or above T - 1.
        NotImplementedError: inside a ``torch.func`` transform.
    """
    key = call_key((x, weight, scale_row, scale_col, bias, shift), backend, residual)
    call = None if key is None else _calls.get(key)
    if call is None:
        dtype = check_tensors(x, weight, scale_row, scale_col, bias, shift=shift)
        check_transforms()
        check_samples(x, weight)
        check_stacks(weight, scale_row, scale_col, bias, shift)
        resolved = backends.resolve(backend, x.device, dtype)
        call = Call(resolved, residual, None, None if dtype == x.dtype else dtype, key is not None)
        if key is not None:
            _calls.keep(key, call)
    check_index_of(index, x)
    if call.dtype is not None:
        x = x.to(call.dtype)
    tasks = next(stack.shape[0] for stack in (scale_row, scale_col, shift) if stack is not None)
    row, col = canonical(scale_row, scale_col, weight, (tasks,))
    tensors, options = (x, weight, row, col, bias, shift), Options(residual, call.backend)
    values = index.index if isinstance(index, TaskIndex) else index
    if call.eager:
        run = eager_linear_multi
    elif torch.compiler.is_compiling() or type(x) not in PLAIN_TYPES or is_watched():
        run = None
    else:
        run = linear_multi_function
    if run is None or values.device.type == "meta":
        return torch.ops.rlrr_kernels.linear_multi(*tensors, values, *options)
    if not isinstance(index, TaskIndex):
        index = TaskIndex(index, x.device)
    check_values(index, tasks)
    if call.eager and not (torch.is_grad_enabled() or private.autograd_is_asked_for()):
        return dispatch.forward(*tensors, index, *options)
    return run(*tensors, index, options)


_calls = CallCache()
