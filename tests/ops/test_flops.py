"""A FLOP counter sees of the operators what it would see of the same matrix products."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from rlrr_kernels import RLRRConv2d, RLRRLinear, RowSample, adapt_model, backends, rlrr_linear, rlrr_mlp, use_backend
from tests.support.tiny_models import disturb, tiny_images, tiny_model

BACKENDS = ("torch", *(("cpp",) if backends.CPP_FAILURE is None else ()))
M, K, N = 5, 8, 6
PRODUCT = 2 * M * N * K


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tensors() -> tuple[torch.Tensor, ...]:
    return torch.randn(M, K), torch.randn(N, K), torch.randn(N, 1), torch.randn(1, 1, K)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("short", [True, False])
def test_eager_calls_count_their_products(backend, short):
    x, weight, row, col = tensors()
    if short:
        row, col = row[:, 0], col[0, 0]
    for leaves, products in (((), 1), ((x,), 2), ((row,), 2), ((x, row, col), 3), ((col, x), 3)):
        for tensor in (x, row, col):
            tensor.requires_grad_(False).grad = None
        for tensor in leaves:
            tensor.requires_grad_()
        with use_backend(backend):
            expected = rlrr_linear(x, weight, row, col)
            grads = torch.autograd.grad(expected.square().sum(), leaves) if leaves else ()

            def run(leaves=leaves, expected=expected, grads=grads):
                y = rlrr_linear(x, weight, row, col)
                assert torch.equal(y, expected)
                if leaves:
                    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), grads, strict=True):
                        torch.testing.assert_close(ours, theirs)

            assert count(run) == products * PRODUCT
            if leaves:  # the backward alone
                y = rlrr_linear(x, weight, row, col).square().sum()
                assert count(lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves)) == (products - 1) * PRODUCT


def test_one_side_sampled_rows_and_activations():
    x, weight, row, _ = tensors()
    x.requires_grad_()
    row.requires_grad_()
    sample = RowSample(torch.tensor([0, 3]), 0, M / 2)
    assert count(lambda: rlrr_linear(x, weight, row, None).sum().backward()) == 3 * PRODUCT
    run = rlrr_linear(x, weight, row, None, scale_grad_rows=sample)
    assert count(lambda: run.sum().backward()) == PRODUCT + PRODUCT * 2 // M
    assert count(lambda: rlrr_linear(x, weight, row, None, input_activation="gelu").sum().backward()) == 3 * PRODUCT
    second = torch.randn(4, N), torch.randn(4), torch.randn(N)
    first = weight, row[:, 0], torch.randn(K)
    assert count(lambda: rlrr_mlp(x, *first, None, *second, None)) == PRODUCT + 2 * M * N * 4


def test_a_model_counts_as_the_plain_one_and_the_products_of_its_scales():
    model, images = tiny_model("vit"), tiny_images("vit")
    forward = count(lambda: model(images))
    with FlopCounterMode(display=False, depth=None) as plain:
        model(images)
    adapt_model(model)
    disturb(model)
    assert count(lambda: model(images)) == forward
    with FlopCounterMode(display=False, depth=None) as counter:
        model(images)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp", "blocks.0"):
        key = f"{type(model).__name__}.{name}"
        assert sum(counter.flop_counts[key].values()) == sum(plain.flop_counts[key].values()) > 0


def test_convolutions_and_operators_called_by_name():
    conv, images = RLRRConv2d(3, 4, 3, bias=False, shift=False), torch.randn(2, 3, 6, 6, requires_grad=True)
    product = 2 * 2 * 4 * 3 * 3 * 3 * 4 * 4
    assert count(lambda: conv(images).sum().backward()) == 3 * product
    x, weight, row, col = tensors()
    assert count(lambda: torch.ops.rlrr_kernels.linear(x, weight, row, col)) == PRODUCT
    with torch.no_grad():
        assert count(lambda: torch.ops.rlrr_kernels.linear(x, weight, row, col)) == PRODUCT


def test_a_counter_made_before_the_import_counts_too():
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
from rlrr_kernels import RLRRLinear
layer, x = RLRRLinear(8, 6), torch.randn(5, 8)
with counter:
    layer(x).sum().backward()
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * PRODUCT


def test_selective_checkpointing_may_keep_a_layer_s_result():
    layer, x = nn.Sequential(RLRRLinear(K, N), nn.GELU()), torch.randn(M, K, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    layer.zero_grad()
    operator = torch.ops.rlrr_kernels.linear.default

    def run():
        y = checkpoint(
            layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts([operator])
        )
        y.square().sum().backward()

    assert count(run) == 3 * PRODUCT  # the forward is not computed again
    for p, grad in zip((p for p in layer.parameters() if p.requires_grad), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
