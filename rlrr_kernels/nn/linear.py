"""``RLRRLinear``: ``nn.Linear`` with a frozen weight under a trained low-rank rescaling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.ops import linear_torch
from rlrr_kernels.ops.linear import MAX_RANK, rlrr_linear

INITS = ("paper", "identity", "normal")


class RLRRLinear(nn.Module):
    """y = x (W ⊙ (1 + s_r s_c))ᵀ + b + f with W and b frozen; s_r, s_c and the shift f are trained (CVPR 2024, Eq. 16).

    ``weight`` and ``bias`` carry ``nn.Linear``'s state-dict keys, so a checkpoint of the plain layer loads with
    ``strict=False`` and misses only the trained tensors.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a frozen bias [N].
        rank: r, 1 to 64; 1 is the paper's RLRR, more is the method called HiRA.
        groups: G, divides N; row n uses ``scale_col[n // (N / G)]``. 3 on a fused qkv keeps q, k, v apart.
        shift: whether a shift f [N] is trained; also without a bias.
        residual: ``False`` drops the 1: W' = W ⊙ (s_r s_c).
        init: how the scales start; see :meth:`reset_parameters`.
        scale_dtype: dtype of scale_row, scale_col and shift.
        device, dtype: of the frozen tensors, as in ``nn.Linear``.

    Attributes:
        weight: [N, K], frozen. bias: [N], frozen, or None.
        scale_row: [N, r]. scale_col: [G, r, K]. shift: [N] or None. (trained)

    Raises:
        TypeError: scale_dtype is not a floating-point dtype.
        ValueError: groups does not divide out_features, rank is not from 1 to 64, or init is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 1,
        groups: int = 1,
        shift: bool = True,
        residual: bool = True,
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__()
        self._adopt(linear, rank, groups, shift, residual, init, scale_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 1,
        groups: int = 1,
        shift: bool = True,
        residual: bool = True,
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
    ) -> RLRRLinear:
        """Wraps ``linear``: its parameter objects become this layer's (and are frozen); nothing is copied.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``.
            ValueError: as for the class.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear; got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear, rank, groups, shift, residual, init, scale_dtype)
        layer.train(linear.training)
        return layer

    def _adopt(self, linear, rank, groups, shift, residual, init, scale_dtype) -> None:
        rows, cols = linear.weight.shape
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank must be from 1 to {MAX_RANK}; got {rank}")
        if groups < 1 or rows % groups:
            raise ValueError(f"groups must divide out_features = {rows}; got {groups}")
        if not scale_dtype.is_floating_point:
            raise TypeError(f"scale_dtype must be a floating-point dtype; got {scale_dtype}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
        self.in_features, self.out_features = cols, rows
        self.rank, self.groups, self.residual, self.init = rank, groups, residual, init
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        options = {"dtype": scale_dtype, "device": linear.weight.device}
        self.scale_row = nn.Parameter(torch.empty(rows, rank, **options))
        self.scale_col = nn.Parameter(torch.empty(groups, rank, cols, **options))
        self.shift = nn.Parameter(torch.empty(rows, **options)) if shift else None
        self._merged: tuple[Tensor, Tensor | None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the scales anew; the frozen tensors stay. F = 1 + s_r s_c below is the factor W'/W.

        * ``paper``: s_c ~ U(±√(6/K)), s_r ~ U(±√(6/r)), the authors' ``kaiming_uniform_`` on [1, K] and [N, 1]. F has
          mean 1 and standard deviation 2/√K at any rank: 7 % for K = 768.
        * ``identity``: s_r = 0, s_c as in ``paper``. F = 1; in the first step only s_r has a gradient.
        * ``normal``: both N(0, 0.02). F has standard deviation 0.0004 √r.

        Without the residual F = s_r s_c starts near 1 too: the first pair of vectors is 1 plus U(±√(6/K)) for
        ``paper`` (standard deviation 2/√K), exactly 1 for ``identity``, 1 plus N(0, 0.02) for ``normal`` (0.028);
        further pairs start as they do with the residual. The shift starts at 0.
        """
        col_bound = math.sqrt(6 / max(self.in_features, 1))
        row_bound = math.sqrt(6 / self.rank)
        with torch.no_grad():
            if self.init == "normal":
                self.scale_row.normal_(std=0.02)
                self.scale_col.normal_(std=0.02)
            else:
                self.scale_col.uniform_(-col_bound, col_bound)
                if self.init == "paper":
                    self.scale_row.uniform_(-row_bound, row_bound)
                else:
                    self.scale_row.zero_()
            if not self.residual:
                first_row, first_col = self.scale_row[:, 0], self.scale_col[:, 0]
                if self.init == "paper":
                    first_row.mul_(col_bound / row_bound)
                elif self.init == "identity":
                    first_col.zero_()
                first_row.add_(1)
                first_col.add_(1)
            if self.shift is not None:
                self.shift.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N]; dtypes as in :func:`rlrr_kernels.rlrr_linear`.

        Raises:
            RuntimeError: the layer is merged and in training mode with gradients on: nothing would be trained.
        """
        if self._merged is not None:
            return self._merged_forward(x)
        return rlrr_linear(x, self.weight, self.scale_row, self.scale_col, self._total_bias(), residual=self.residual)

    def _total_bias(self) -> Tensor | None:
        if self.shift is None:
            return self.bias
        return self.shift if self.bias is None else self.bias + self.shift

    def _merged_forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("this RLRRLinear is merged, so its scales would not be trained; call unmerge() first")
        weight, bias = self._merged
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' [N, K] as a new tensor: computed in fp32 (fp64 for float64), rounded once to ``dtype`` (default: W's)."""
        return linear_torch.merge(self.weight, self.scale_row, self.scale_col, self.residual, dtype)

    @torch.no_grad()
    def merged_bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """b + f [N], rounded once to ``dtype`` (default: W's); None without a bias and a shift."""
        bias = self._total_bias()
        return None if bias is None else bias.to(dtype or self.weight.dtype, copy=True)

    @property
    def merged(self) -> bool:
        """Whether the forward uses a merged weight."""
        return self._merged is not None

    def merge(self) -> RLRRLinear:
        """Computes W' and b + f once and uses them from now on, as a plain linear layer; returns self.

        ``weight`` is neither written nor replaced (it may be shared): ``state_dict``, ``deepcopy`` and saving see the
        frozen tensors as before. Costs one more weight of memory until :meth:`unmerge`; :meth:`to_linear` does not.
        """
        self._merged = self.merged_weight(), self.merged_bias()
        return self

    def unmerge(self) -> RLRRLinear:
        """Goes back to the frozen weight, which was never touched; returns self."""
        self._merged = None
        return self

    @torch.no_grad()
    def merge_error(self, x: Tensor) -> float:
        """‖y_merged - y‖ / ‖y‖ for inputs x [..., K]: what rounding W' to the dtype of the weight costs."""
        layer = self.to_linear()
        y = rlrr_linear(x, self.weight, self.scale_row, self.scale_col, self._total_bias(), residual=self.residual)
        error = layer.to(x.dtype)(x).double() - y.double()
        return (error.norm() / y.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W' and b + f, sharing nothing with this layer. A shift makes it have a bias."""
        weight, bias = self.merged_weight(), self.merged_bias()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        return linear.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> RLRRLinear:
        super()._apply(fn, recurse)
        return self.merge() if self.merged else self  # a moved or cast layer merges its moved or cast tensors

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged:
            self.merge()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, groups={self.groups}, shift={self.shift is not None}, residual={self.residual}"
            + (", merged" if self.merged else "")
        )
