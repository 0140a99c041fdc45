"""Placeholder until the operator's own tests land: the layer equals the literal formula."""

import torch

from rlrr_kernels import RLRRLinear
from rlrr_kernels.reference import rlrr_linear_reference


def test_layer_equals_the_formula():
    layer = RLRRLinear(35, 33, rank=4, groups=3, dtype=torch.float64, scale_dtype=torch.float64)
    x = torch.randn(5, 35, dtype=torch.float64)
    expected = rlrr_linear_reference(x, layer.weight, layer.scale_row, layer.scale_col, layer.bias + layer.shift)
    torch.testing.assert_close(layer(x), expected)
