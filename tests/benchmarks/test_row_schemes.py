"""``python -m benchmarks.row_schemes``: the parts of the rows, and the variances in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm", reason="the command needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from benchmarks import row_schemes
from rlrr_kernels import RLRRLinear

DRAWS = 4000


def tokens(images: int = 2, count: int = 16) -> tuple[RLRRLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = RLRRLinear(6, 9, groups=3, dtype=torch.float64, scale_dtype=torch.float64)
    x = torch.randn(images, 1, 6, dtype=torch.float64) + torch.randn(images, count, 6, dtype=torch.float64)
    return layer, x, torch.randn(images, count, 9, dtype=torch.float64)


def test_the_parts_of_the_rows_add_up_to_the_gradients():
    layer, x, g = tokens()
    layer(x).backward(g)
    row, col = layer.scale_row.grad[:, 0].chunk(3), layer.scale_col.grad[:, 0]
    expected = torch.cat([part for pair in zip(row, col, strict=True) for part in pair])
    torch.testing.assert_close(row_schemes.row_parts(layer, x, g).sum((0, 1)), expected)


def simulated(parts: Tensor, scheme: str) -> float:
    """The variance over many draws of 4 of 16 rows an image."""
    errors = []
    for image in parts:
        if scheme == "plain":
            index = torch.rand(DRAWS, 16).topk(4).indices
        elif scheme == "tokens":
            index = torch.arange(0, 16, 4) + torch.randint(4, (DRAWS, 4))
        else:
            index = torch.randint(16, (DRAWS, 4))
        errors.append((4 * image[index].sum(1) - image.sum(0)).square().sum(1).mean())
    return sum(errors).item()


@pytest.mark.parametrize("scheme", ["plain", "tokens", "replacement"])
def test_closed_forms(scheme: str):
    parts = row_schemes.row_parts(*tokens())
    closed = {
        "plain": lambda: row_schemes.plain(parts, 4),
        "tokens": lambda: row_schemes.one_of_each(row_schemes.blocks_of_tokens(parts)),
        "replacement": lambda: row_schemes.with_replacement(parts, torch.ones(2, 16), 4),
    }[scheme]()
    assert simulated(parts, scheme) == pytest.approx(closed.item(), rel=0.06)


def test_patches_of_a_block_are_neighbours():
    grid = torch.arange(16.0).view(1, 16, 1)
    assert row_schemes.blocks_of_patches(grid)[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_every_scheme_of_a_layer():
    layer, x, g = tokens()
    x = x + 3  # tokens that are alike: the means take most of the variance away
    g[:, :4] = 0
    found = row_schemes.variances(layer, x, g)
    assert all(0 < value < float("inf") for value in found.values())
    assert found["images' means, of all rows of x"] < 0.5 * found[row_schemes.PLAIN]
    assert found["images' means, of the drawn rows"] < 0.8 * found[row_schemes.PLAIN]
    assert found["with replacement, ∝ ‖x‖ ‖g‖"] < found["with replacement"]
