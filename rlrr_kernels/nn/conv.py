"""``RLRRConv2d``: ``nn.Conv2d`` with a frozen kernel under a trained low-rank rescaling."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.nn.rescaled import Rescaled, check_plain, frozen
from rlrr_kernels.ops.checks import check_operands, compute_dtype
from rlrr_kernels.ops.conv import CONV_LAYOUTS, matrix_shape, merge_kernel, rlrr_conv2d
from rlrr_kernels.reference import rlrr_conv2d_reference

_ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class RLRRConv2d(Rescaled):
    """y = conv2d(x, W ⊙ (1 + s_r s_c)) + b + f with kernel and b frozen; s_r, s_c and f are trained (RLRR, CVPR 2024).

    ``weight`` and ``bias`` carry ``nn.Conv2d``'s state-dict keys. x [B, in, H, W] (or without B) to y [B, out, H', W'].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in ``nn.Conv2d``; ``groups`` are the convolution's.
        rank: r, 1 to 64; the paper's CNN appendix has 1 and 10.
        layout: how the kernel [out, in / groups, kh, kw] is seen as the matrix W [R, C]: ``out,in*kh*kw`` (a row is an
            output channel) or ``out*kh,in*kw`` (a row is a kernel row of an output channel, a column a kernel column of
            an input channel; the authors' choice, with fewer columns and more rows).
        shift: whether a shift f [out] is trained; also without a bias.
        residual: ``False`` drops the 1: W' = W ⊙ (s_r s_c).
        sides: ``left`` trains s_r alone (s_c = 1), ``right`` s_c alone (s_r = 1); rank 1.
        init: how the scales start; see :meth:`reset_parameters`, with K = C.
        scale_dtype: dtype of scale_row, scale_col and shift.

    Attributes:
        weight: [out, in / groups, kh, kw], frozen. bias: [out], frozen, or None.
        scale_row: [R, r], None on the right side alone. scale_col: [1, r, C], None on the left side alone.
        shift: [out] or None. (trained)

    Raises:
        TypeError: scale_dtype is not a floating-point dtype.
        ValueError: rank is not from 1 to 64 (or not 1 for one side), or layout, init or sides is unknown.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        rank: int = 1,
        layout: str = CONV_LAYOUTS[0],
        shift: bool = True,
        residual: bool = True,
        sides: str = "both",
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        super().__init__()
        self._adopt_conv(
            conv, layout, rank=rank, shift=shift, residual=residual, sides=sides, init=init, scale_dtype=scale_dtype
        )

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        rank: int = 1,
        layout: str = CONV_LAYOUTS[0],
        shift: bool = True,
        residual: bool = True,
        sides: str = "both",
        init: str = "paper",
        scale_dtype: torch.dtype = torch.float32,
    ) -> RLRRConv2d:
        """Wraps ``conv``: its parameter objects become this layer's (and are frozen); nothing is copied.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or not a plain one: its class has a forward of its own, or
                its weight or bias is parametrized, pruned, quantised or sharded.
            ValueError: as for the class.
        """
        check_plain("conv", conv, nn.Conv2d)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt_conv(
            conv, layout, rank=rank, shift=shift, residual=residual, sides=sides, init=init, scale_dtype=scale_dtype
        )
        return layer.train(conv.training)

    def _adopt_conv(self, conv: nn.Conv2d, layout: str, **options: Any) -> None:
        rows, cols = matrix_shape(conv.weight.shape, layout)
        self.layout = layout
        for name in _ATTRIBUTES:
            setattr(self, name, getattr(conv, name))
        self._edges, self._zeros = split_padding(conv)
        self._adopt(conv, rows, cols, col_groups=1, **options)

    def _padded(self, x: Tensor) -> Tensor:
        if not any(self._edges):
            return x
        check_operands(x)
        return F.pad(x, self._edges, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _rescaled(self, x: Tensor) -> Tensor:
        return rlrr_conv2d(
            self._padded(x),
            frozen(self.weight) if self.weight.requires_grad else self.weight,
            *self.scales(),
            self._total_bias(),
            stride=self.stride,
            padding=self._zeros,
            dilation=self.dilation,
            groups=self.groups,
            layout=self.layout,
            residual=self.residual,
        )

    def _formula(self, x: Tensor) -> Tensor:
        x = self._padded(x.to(compute_dtype(x)[0]))
        return rlrr_conv2d_reference(
            x, *self._wide_tensors(), self._total_bias(),
            layout=self.layout, residual=self.residual,
            stride=self.stride, padding=self._zeros, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(self._padded(x), weight, bias, self.stride, self._zeros, self.dilation, self.groups)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' [out, in / groups, kh, kw] as a new tensor: fp32 (fp64), rounded once to ``dtype`` (default: W's)."""
        return merge_kernel(self.weight, *self.scales(), self.layout, self.residual, dtype)

    def to_conv(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with W' and b + f, sharing nothing with this layer. A shift makes it have a bias."""
        return self._merged_into(
            nn.Conv2d(**{name: getattr(self, name) for name in _ATTRIBUTES}, bias=False, device="meta")
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_mode={self.padding_mode!r}, layout={self.layout!r}, {self._extra_repr()}"
        )


def split_padding(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, int]]:
    """What is to be padded beforehand, as ``F.pad`` counts it, and what the convolution pads with zeros."""
    if conv.padding == "same":
        both = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    elif isinstance(conv.padding, str):  # "valid"
        both = [0, 0]
    else:
        both = [2 * size for size in conv.padding]
    if conv.padding_mode == "zeros" and not any(size % 2 for size in both):
        return (0, 0, 0, 0), (both[0] // 2, both[1] // 2)
    top, left = both[0] // 2, both[1] // 2  # an odd one more at the end, as torch has it
    return (left, both[1] - left, top, both[0] - top), (0, 0)
