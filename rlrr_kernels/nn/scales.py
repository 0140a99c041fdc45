"""Scale vectors without a layer around them: how they start, and those of a sum of rescalings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def draw_scales(scale_row: Tensor | None, scale_col: Tensor | None, cols: int, init: str, residual: bool) -> None:
    """Fills s_r [N, r] and s_c [G, r, K], or the one that is trained, as ``Rescaled.reset_parameters`` describes.

    Args:
        scale_row, scale_col: None for the side that is not trained.
        cols: K.
        init: ``paper``, ``identity`` or ``normal``.
        residual: whether the 1 is there.
    """
    if scale_row is not None and scale_col is not None:
        _draw_both(scale_row, scale_col, init, residual)
        return
    for scale in (scale_row, scale_col):
        if scale is not None:
            _draw_one(scale, cols, init, residual)


def _bound(size: int) -> float:
    return math.sqrt(6 / max(size, 1))


def _draw_both(scale_row: Tensor, scale_col: Tensor, init: str, residual: bool) -> None:
    col_bound, row_bound = _bound(scale_col.shape[2]), _bound(scale_row.shape[1])
    if init == "normal":
        scale_row.normal_(std=0.02)
        scale_col.normal_(std=0.02)
    else:
        scale_col.uniform_(-col_bound, col_bound)
        if init == "paper":
            scale_row.uniform_(-row_bound, row_bound)
        else:
            scale_row.zero_()
    if not residual:
        first_row, first_col = scale_row[:, 0], scale_col[:, 0]
        if init == "paper":
            first_row.mul_(col_bound / row_bound)
        elif init == "identity":
            first_col.zero_()
        first_row.add_(1)
        first_col.add_(1)


def _draw_one(scale: Tensor, cols: int, init: str, residual: bool) -> None:
    if init == "normal":
        scale.normal_(std=0.02)
    elif init == "paper":
        scale.uniform_(-_bound(cols), _bound(cols))
    else:
        scale.zero_()
    if not residual:
        scale.add_(1)


def with_ones(scale_row: Tensor | None, scale_col: Tensor | None, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """s_r [N, r] and s_c [G, r, K] with ones, which share one element, for the side that is None; not both are."""
    if scale_row is not None and scale_col is not None:
        return scale_row, scale_col
    if scale_col is not None:
        return scale_col.new_ones(()).expand(rows, 1), scale_col
    assert scale_row is not None
    return scale_row, scale_row.new_ones(()).expand(1, 1, cols)


def concatenate_scales(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """s_r [N, Σr] and s_c [G, Σr, K] whose product is exactly the sum of those of ``terms``, each [N, r] and [G, r, K].

    G is the least common multiple of the terms' groups. A single term comes back as it is.
    """
    if len(terms) == 1:
        return terms[0]
    groups = math.lcm(*(col.shape[0] for _, col in terms))
    row = torch.cat([row for row, _ in terms], 1)
    return row, torch.cat([col.repeat_interleave(groups // col.shape[0], 0) for _, col in terms], 1)
