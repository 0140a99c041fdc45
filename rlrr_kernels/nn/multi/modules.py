"""A frozen module that computes each sample of a batch with what that sample's task has of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.nn.conv import split_padding
from rlrr_kernels.nn.multi.batch import ActiveBatch, TaskGroup
from rlrr_kernels.nn.scales import with_ones
from rlrr_kernels.ops.conv import matrix_shape, rlrr_conv2d
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.ops.multi.public import rlrr_linear_multi
from rlrr_kernels.ops.norm_rescale.public import fold_norm, norm_rescale, result_dtype

_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class Multi(nn.Module):
    """Stands in a model for ``plain``, with its parameters, buffers, submodules and state-dict names.

    Without an active batch, and for samples of the bare backbone, it computes what ``plain`` computes. A task that has
    the whole module of its own (a head) gets that; what else a task can have of it, subclasses know.

    Args:
        plain: any module; the batch must be the first dimension of its input, sample after sample.
        name: its state-dict name in the model, which the tensors of tasks go by.
        active: the batch that runs, shared by the modules of a model.
    """

    def __init__(self, plain: nn.Module, name: str, active: ActiveBatch) -> None:
        super().__init__()
        for key in _SHARED:  # the same dictionaries: what is set, moved or loaded in one of both is in the other
            vars(self)[key] = vars(plain)[key]
        vars(self).update(plain=plain, name=name, active=active)

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            if "plain" not in vars(self):
                raise
            return getattr(vars(self)["plain"], key)  # what models ask of a layer: in_features, normalized_shape

    def train(self, mode: bool = True) -> Multi:
        super().train(mode)
        self.plain.training = mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        """x [S ..., ...] of the S samples of the active batch, to what the tasks of these samples make of it.

        Raises:
            RuntimeError: the first dimension of x is no multiple of S.
        """
        x, batch = input, self.active.batch
        if batch is None or not any(self.name in group.form.modules for group in batch.groups):
            return self.plain(x)
        if x.dim() == 0 or x.shape[0] % batch.samples:
            raise RuntimeError(
                f"{self.name} must get the {batch.samples} samples of the batch in its first dimension; got shape "
                f"{tuple(x.shape)}: a layer that does not see samples apart has no adapter for each"
            )
        per_sample = x.shape[0] // batch.samples
        in_order = batch.is_sorted()
        if not in_order:
            x = batch.permuted(x)
        results = []
        for first, end, group in batch.parts():
            part = x[first * per_sample : end * per_sample]
            if group is None or self.name not in group.form.modules:
                results.append(self.plain(part))
            elif self.name in group.form.heads:
                results += self._owned(part, group)
            else:
                results.append(self._rescaled(part, group))
        y = results[0] if len(results) == 1 else torch.cat(_padded(results))
        if per_sample == 1 and any(self.name in group.form.heads for group in batch.groups):
            batch.widths = [result.shape[-1] for result in results for _ in range(result.shape[0])]
        return y if in_order else batch.permuted(y, back=True)

    def _owned(self, x: Tensor, group: TaskGroup) -> list[Tensor]:
        """What each task's own module makes of its rows."""
        per_sample = x.shape[0] // (group.end - group.first)
        results = []
        for task, first, end in group.segments:
            head = group.tasks[task].heads[self.name]
            if head.training != self.training:
                head.train(self.training)
            results.append(head(x[first * per_sample : end * per_sample]))
        return results

    def _rescaled(self, x: Tensor, group: TaskGroup) -> Tensor:
        """The frozen module's result for the rows of ``group`` under the vectors of their tasks."""
        raise NotImplementedError(f"{type(self.plain).__name__} has no rescaled form")


def _padded(results: list[Tensor]) -> list[Tensor]:
    """``results`` with as many classes each: the last dimension is filled up with -inf, a softmax's probability 0."""
    width = max(result.shape[-1] for result in results)
    return [
        result if result.shape[-1] == width else F.pad(result, (0, width - result.shape[-1]), value=float("-inf"))
        for result in results
    ]


class _MultiLayer(Multi):
    """A linear layer or convolution: W ⊙ (1 + s_r s_c), or without the 1, and b + f."""

    def _vectors(self, group: TaskGroup) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """s_r, s_c and f of the tasks of ``group``, stacked."""
        row, col, shift = (group.stacked(f"{self.name}.{part}") for part in ("scale_row", "scale_col", "shift"))
        return row, col, shift

    def _of_task(
        self, vectors: tuple[Tensor | None, Tensor | None, Tensor | None], task: int, rows: int, cols: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """s_r [N, r], s_c [G, r, K] and b + f of one of them, as an adapted layer has them."""
        row, col, shift = (None if stack is None else stack[task] for stack in vectors)
        bias = self.bias
        total = bias if shift is None else shift if bias is None else bias + shift
        return (*with_ones(row, col, rows, cols), total)


class MultiLinear(_MultiLayer):
    """y = x W'ᵀ + b + f with the s_r, s_c and f of the sample's task; all tasks in one call."""

    def _rescaled(self, x: Tensor, group: TaskGroup) -> Tensor:
        weight, residual, vectors = self.weight, group.form.residual, self._vectors(group)
        if len(group.tasks) == 1:  # what the adapted layer itself calls
            return rlrr_linear(x, weight, *self._of_task(vectors, 0, *weight.shape), residual=residual)
        row, col, shift = vectors
        if row is None and col is not None:
            col = col.squeeze(2)  # [T, G, 1, K] to [T, G, K], which is how the operator takes s_c alone
        x = _apart(x, group)
        return rlrr_linear_multi(x, weight, row, col, self.bias, shift, index=group.index, residual=residual).flatten(
            0, 1
        )


class MultiConv2d(_MultiLayer):
    """The convolution with the kernel W' and the bias b + f of the sample's task, task by task."""

    def _rescaled(self, x: Tensor, group: TaskGroup) -> Tensor:
        conv, layout, vectors = self.plain, group.form.conv_layout, self._vectors(group)
        per_sample = x.shape[0] // (group.end - group.first)
        edges, zeros = split_padding(conv)
        if any(edges):
            x = F.pad(x, edges, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        size = matrix_shape(conv.weight.shape, layout)
        options = {"stride": conv.stride, "padding": zeros, "dilation": conv.dilation, "groups": conv.groups}
        results = [
            rlrr_conv2d(
                x[first * per_sample : end * per_sample],
                conv.weight,
                *self._of_task(vectors, task, *size),
                layout=layout,
                residual=group.form.residual,
                **options,
            )
            for task, first, end in group.segments
        ]
        return results[0] if len(results) == 1 else torch.cat(results)


def _scale_and_shift(name: str, group: TaskGroup) -> tuple[Tensor, Tensor]:
    """γ and β [T, D] of SSF."""
    scale, shift = (group.stacked(f"{name}.{part}") for part in ("scale", "shift"))
    assert scale is not None
    assert shift is not None
    return scale, shift


class MultiLayerNorm(Multi):
    """γ ⊙ LayerNorm(x) + β with the γ and β of the sample's task."""

    def _rescaled(self, x: Tensor, group: TaskGroup) -> Tensor:
        scale, shift = _scale_and_shift(self.name, group)
        norm, per_sample = self.plain, x.shape[0] // (group.end - group.first)
        trained = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        if len(group.tasks) == 1 or trained:  # keeps x and the statistics alone for the backward
            results = [
                norm_rescale(x[first * per_sample : end * per_sample], norm.weight, norm.bias, scale[task],
                             shift[task], norm.eps)
                for task, first, end in group.segments
            ]  # fmt: skip
            return results[0] if len(results) == 1 else torch.cat(results)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (vectors.to(wide) for vectors in fold_norm(norm.weight, norm.bias, scale, shift))
        y = F.layer_norm(x.to(wide), norm.normalized_shape, None, None, norm.eps)
        weight, bias = (_beside(x, group.by_sample(vectors)) for vectors in (weight, bias))
        return torch.addcmul(bias, _apart(y, group), weight).flatten(0, 1).to(result_dtype(x))


class MultiTokens(Multi):
    """γ ⊙ x + β with the γ and β of the sample's task, where the plain module is the identity."""

    def _rescaled(self, x: Tensor, group: TaskGroup) -> Tensor:
        scale, shift = (_beside(x, group.by_sample(stack)) for stack in _scale_and_shift(self.name, group))
        return (_apart(x, group) * scale + shift).to(x.dtype).flatten(0, 1)


def _apart(x: Tensor, group: TaskGroup) -> Tensor:
    """x [S P, ...] as [S, P, ...]."""
    return x.unflatten(0, (group.end - group.first, -1))


def _beside(x: Tensor, vectors: Tensor) -> Tensor:
    """Vectors [S, D] in a shape that goes with ``_apart(x)`` [S, P, ..., D]."""
    return vectors.view(vectors.shape[0], *[1] * (x.dim() - 1), vectors.shape[1])


_KINDS: tuple[tuple[type[nn.Module], type[Multi]], ...] = (
    (nn.Linear, MultiLinear),
    (nn.Conv2d, MultiConv2d),
    (nn.LayerNorm, MultiLayerNorm),
    (nn.Identity, MultiTokens),
)


def multi_module(plain: nn.Module, name: str, active: ActiveBatch) -> Multi:
    """The :class:`Multi` that stands for ``plain``, called ``name``."""
    kind = next((multi for base, multi in _KINDS if isinstance(plain, base)), Multi)
    return kind(plain, name, active)
