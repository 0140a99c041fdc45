"""``RLRRPeftLinear``: an ``nn.Linear`` under any number of named RLRR adapters, with the manners of a PEFT layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from rlrr_kernels.adapt.arithmetic import LAYER_PARTS
from rlrr_kernels.adapt.config import WITH_BIAS, RLRRConfig
from rlrr_kernels.nn.rescaled import check_plain, frozen, has_hooks
from rlrr_kernels.nn.scales import concatenate_scales, draw_scales, with_ones
from rlrr_kernels.ops.checks import compute_dtype
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.ops.linear.public import rlrr_linear
from rlrr_kernels.reference import rescaled_weight_reference

BASE = "__base__"
"""What PEFT calls no adapter in ``adapter_names``."""


class Rescaling(NamedTuple):
    """One rescaling of the layer: s_r [N, r], s_c [G, r, K], f [N] or None, and whether the 1 is there."""

    scale_row: Tensor
    scale_col: Tensor
    shift: Tensor | None
    residual: bool


class RLRRPeftLinear(nn.Module, BaseTunerLayer):
    """y = x (W ⊙ (1 + Σ s_r s_c))ᵀ + b + Σ f, summed over the active adapters; W and b are the frozen base layer's.

    Args:
        base_layer: a plain ``nn.Linear``.
        adapter_name, adaptation, random_shift, inference_mode: the first adapter, see :meth:`update_layer`.

    Attributes:
        rlrr_scale_row: adapter → [N, r]. rlrr_scale_col: adapter → [G, r, K]. rlrr_shift: adapter → [N].
        residual: adapter → whether the 1 is there.

    Raises:
        TypeError: the base layer is no plain ``nn.Linear``.
        ValueError: as for :meth:`update_layer`.
    """

    adapter_layer_names = tuple(f"rlrr_{part}" for part in LAYER_PARTS)
    other_param_names = ("residual",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, adaptation: RLRRConfig, **options: Any) -> None:
        super().__init__()
        check_plain("base_layer", base_layer, nn.Linear)
        self.base_layer = base_layer
        weight: Any = base_layer.weight
        self.out_features, self.in_features = weight.shape
        self.rlrr_scale_row, self.rlrr_scale_col = nn.ParameterDict(), nn.ParameterDict()
        self.rlrr_shift = nn.ParameterDict()
        self.residual: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, adaptation, **options)

    def update_layer(
        self, adapter_name: str, adaptation: RLRRConfig, *, random_shift: bool = False, inference_mode: bool = False
    ) -> None:
        """Adds an adapter.

        Args:
            adapter_name: of the adapter.
            adaptation: rank, groups, shift, residual, sides and init of this layer.
            random_shift: whether the shift starts at random instead of 0.
            inference_mode: whether nothing is trained.

        Raises:
            ValueError: the groups do not divide ``out_features``.
        """
        rows, cols, rank, groups = self.out_features, self.in_features, adaptation.rank, adaptation.groups_of("")
        if rows % groups:
            raise ValueError(f"groups must divide out_features = {rows}; got {groups}")
        row = None if adaptation.sides == "right" else torch.empty(rows, rank)
        col = None if adaptation.sides == "left" else torch.empty(groups, rank, cols)
        draw_scales(row, col, cols, adaptation.init, adaptation.residual)
        shifted = adaptation.shift is True or (adaptation.shift == WITH_BIAS and self._frozen()[1] is not None)
        shift = torch.zeros(rows) if shifted else None
        if shift is not None and random_shift:
            shift.normal_(std=0.1)
        for tensors, tensor in ((self.rlrr_scale_row, row), (self.rlrr_scale_col, col), (self.rlrr_shift, shift)):
            if tensor is not None:
                tensors[adapter_name] = nn.Parameter(tensor)
        self.residual[adapter_name] = adaptation.residual
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def tensors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """``scale_row``, ``scale_col`` and ``shift`` of one adapter, as far as it has them."""
        found = {part: getattr(self, f"rlrr_{part}").get(adapter_name) for part in LAYER_PARTS}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def rescaling(self, adapter_name: str) -> Rescaling:
        """The tensors of one adapter, with ones for a side that is not trained."""
        row, col = (tensors.get(adapter_name) for tensors in (self.rlrr_scale_row, self.rlrr_scale_col))
        scales = with_ones(row, col, self.out_features, self.in_features)
        return Rescaling(*scales, self.rlrr_shift.get(adapter_name), self.residual[adapter_name])

    def _summed(self, adapter_names: Iterable[str]) -> Rescaling | None:
        """The sum of the adapters that this layer has: of a concatenation of their vectors. None: it has none."""
        terms = [self.rescaling(name) for name in adapter_names if name in self.residual]
        if len(terms) < 2:
            return terms[0] if terms else None
        without = [term for term in terms if not term.residual]
        if len(without) > 1:
            raise ValueError("only one adapter with residual=False can be active or merged at a time: W has one factor")
        scales = concatenate_scales([(term.scale_row, term.scale_col) for term in terms])
        shifts = [term.shift for term in terms if term.shift is not None]
        return Rescaling(*scales, sum(shifts[1:], shifts[0]) if shifts else None, not without)

    def _rescaled(self, x: Tensor, by: Rescaling) -> Tensor:
        base: Any = self.base_layer
        weight, bias = base.weight, base.bias
        if by.shift is not None:
            bias = by.shift if bias is None else bias + by.shift
        if not compute_dtype(x)[1]:
            x = self._cast_input_dtype(x, weight.dtype)
        weight = frozen(weight) if weight.requires_grad else weight
        hooked = has_hooks(base)
        if not hooked and private.tracing_state() is None:
            return rlrr_linear(x, weight, by.scale_row, by.scale_col, bias, residual=by.residual)
        wide = accumulate_dtype(weight.dtype)
        scales = by.scale_row.to(wide), by.scale_col.to(wide)
        merged = rescaled_weight_reference(weight.to(wide), *scales, residual=by.residual).to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if hooked:  # they are to see a call, of W'
            tensors: dict[str, Any] = {"weight": merged, "bias": bias}
            return functional_call(base, tensors, (x,))
        return F.linear(x, merged, bias)  # torch.jit.trace could neither save nor move what an autograd.Function does

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """x [..., K] to y [..., N] in the dtype of W (under autocast: autocast's).

        Args:
            x: the input.
            adapter_names: the adapter of each element of x's first dimension, ``__base__`` for none.

        Raises:
            ValueError: ``adapter_names`` has another length than x, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        by = None if self.merged else self._summed(self.active_adapters)
        return self.base_layer(x, *args, **kwargs) if by is None else self._rescaled(x, by)

    def _check_forward_args(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """Each element of the batch under its own adapter, the elements of one adapter together."""
        if not adapter_names:
            return self.base_layer(x)
        where: dict[str, list[int]] = {}
        for index, name in enumerate(adapter_names):
            where.setdefault(name if name in self.residual else BASE, []).append(index)
        parts = []
        for name, indices in where.items():
            part = x[indices]
            parts.append(self.base_layer(part) if name == BASE else self._rescaled(part, self.rescaling(name)))
        order = torch.tensor([index for indices in where.values() for index in indices], device=x.device)
        return torch.cat(parts)[order.argsort()]

    # ------------------------------------------------------------ merging

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W [N, K] of one adapter, as a new tensor in the dtype of W."""
        row, col, _, residual = self.rescaling(adapter)
        weight = self._frozen()[0]
        delta = linear_torch.merge(weight, row, col, False)
        return delta if residual else delta - weight

    @torch.inference_mode(False)  # its tensors could not be trained or saved for a backward
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Gives the base layer W' and b + f, computed from W and all merged adapters and rounded once.

        They are parameters of their own: another layer that shares W keeps it. W and b are kept until :meth:`unmerge`,
        which puts them back bit for bit: one more weight of memory.

        Args:
            safe_merge: whether to refuse a result that is not finite; the layer is then as it was.
            adapter_names: what to merge; None: the active adapters.

        Raises:
            ValueError: ``safe_merge``, and the merged weight or bias is not finite; or two of the adapters to be merged
                have no residual.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.residual]
        by = self._summed([*self.merged_adapters, *names]) if names else None
        if by is None:
            return
        kept = self._frozen()
        weight, bias = linear_torch.merge(kept[0], by.scale_row, by.scale_col, by.residual), kept[1]
        if by.shift is not None:
            total = by.shift if bias is None else bias + by.shift
            bias = total.to(weight.dtype if bias is None else bias.dtype, copy=True)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        base: Any = self.base_layer
        if self._unmerged is None:
            self._unmerged = base.weight, base.bias
        base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.merged_adapters.extend(names)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the frozen weight and bias back."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.base_layer
        weight, bias = self._frozen()
        self._unmerged[0].data = weight
        if self._unmerged[1] is not None and bias is not None:
            self._unmerged[1].data = bias
        base.weight, base.bias = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        """W and b without any adapter, where the base layer is now: the model may have been moved or cast since."""
        base: Any = self.base_layer
        weight, bias = (base.weight, base.bias) if self._unmerged is None else self._unmerged
        frozen_bias = None if bias is None else bias.data.to(base.bias.device, base.bias.dtype)
        return weight.data.to(base.weight.device, base.weight.dtype), frozen_bias

    def __repr__(self) -> str:
        return f"rlrr.{super().__repr__()}"
