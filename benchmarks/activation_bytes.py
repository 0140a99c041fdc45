"""Bytes that a ViT keeps between forward and backward, counted and measured on a CPU: what each way of training needs.

    python -m benchmarks.activation_bytes [--dim 768] [--heads 12] [--dtype bfloat16] [--peak]

Measured: all storages that autograd saves, parameters left out, by ``saved_tensors_hooks``. Blocks and tokens are
varied, so that what belongs to a token of a block, and what belongs to a block whatever it is given, come out apart.
Counted: a formula for each variant (:func:`counted`). The two are compared; a difference is an error. Under
``torch.compile``, where Inductor's partitioner chooses what is saved, they are measured alone. ``--peak``: instead, the
most that torch's allocator holds in a step of twelve blocks, AdamW included, beyond what it held before.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.support.baselines import PEFT_TARGETS, peft_config, peft_module, peft_reason, use_reference
from benchmarks.support.common import kept_bytes, peak_bytes
from rlrr_kernels import NormRescale, RLRRConfig, adapt_model, recompute_activations

LORA_RANK = 8

VARIANTS = ("reference", "lora", "rlrr", "rlrr + mlp", "rlrr + mlp + norms", "frozen")
"""``reference``: the paper's recipe by the literal formula. ``lora``: PEFT's, rank 8, on the same layers. ``rlrr``: the
paper's recipe by our operators; ``+ mlp``: GELU's result computed again; ``+ norms``: the normalised inputs too, which
together is :func:`rlrr_kernels.recompute_activations`. ``frozen``: the backward runs through the model and trains
nothing in it; none of the other variants keeps less."""


TOKENS = (32 // 8) ** 2 + 1
"""Of an image of 32 px in patches of 8: enough, because bytes a token do not depend on their number."""


class Kept(NamedTuple):
    """Bytes a block keeps: for each token, and beside that."""

    token: float
    block: float


def counted(variant: str, dim: int, heads: int, size: int) -> Kept:
    """What a pre-norm block with an MLP of 4 D keeps, D = ``dim`` values of ``size`` bytes.

    Every variant keeps what norm1 and norm2 take (2 D), q, k and v (3 D), the attention's result, which is also what
    proj takes (D), the pre-activation h (4 D), four statistics of the norms, which plain ones hold in the dtype of
    their input, and the logarithm of the attention's sum in float32 for each head.
    """
    least = 10 * dim
    values = {
        "reference": least + 8 * dim,  # what the norms return, before scale and shift; z of qkv and fc1; GELU's result
        "lora": least + 6 * dim + 4 * LORA_RANK,  # z of qkv and fc1; GELU's result; A x of four layers
        "rlrr": least + 6 * dim,  # z of qkv and fc1; GELU's result
        "rlrr + mlp": least + 2 * dim,
        "rlrr + mlp + norms": least,
        "frozen": least,
    }[variant]
    statistics = 4 * (4 if variant.startswith("rlrr") else size)
    # W' of all four layers, and W ⊙ s_c of the three that have one group.
    weights = (12 + 9) * dim * dim if variant == "reference" else 0
    return Kept(size * values + statistics + 4 * heads, size * weights)


def build(variant: str, depth: int, dim: int, heads: int, dtype: torch.dtype) -> nn.Module:
    """A ViT on images of 32 px in patches of 8, prepared as the variant says."""
    import timm

    model = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, depth=depth, embed_dim=dim, num_heads=heads, num_classes=3
    ).to(dtype)
    if variant == "frozen":
        return model.requires_grad_(False)
    if variant == "lora":
        return peft_module().get_peft_model(model, peft_config("lora", PEFT_TARGETS), autocast_adapter_dtype=False)
    adapt_model(model, RLRRConfig(recipe="paper", scale_dtype=dtype if variant == "reference" else torch.float32))
    if variant == "reference":
        use_reference(model)
    elif variant != "rlrr":
        recompute_activations(model)
        for module in model.modules():
            if isinstance(module, NormRescale):
                module.keep_output = variant == "rlrr + mlp"
    return model


def measured(variant: str, dim: int, heads: int, dtype: torch.dtype, compiled: bool = False) -> Kept:
    """What a block keeps, measured on one and two blocks and one and two images."""
    models = [build(variant, depth, dim, heads, dtype) for depth in (1, 2)]
    one, two = ((_kept(models[1], images, compiled) - _kept(models[0], images, compiled)) for images in (1, 2))
    return Kept((two - one) / TOKENS, 2 * one - two)


def _kept(model: nn.Module, images: int, compiled: bool) -> int:
    # The gradient of the images is asked for, so that a frozen model has a backward too.
    dtype = next(model.parameters()).dtype
    x = torch.randn(images, 3, 32, 32, dtype=dtype, requires_grad=True)
    forward = model.train()
    if compiled:
        torch._dynamo.reset()
        # Inductor's decompositions and partition; its code would save the same.
        forward = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
        forward(x)
    return kept_bytes(lambda: forward(x), [x, *model.parameters()])


def peak(variant: str, depth: int, dim: int, heads: int, dtype: torch.dtype, images: int) -> int:
    """Bytes that a step of training takes at most, beyond parameters and what AdamW remembers."""
    model = build(variant, depth, dim, heads, dtype).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = torch.randn(images, 3, 32, 32, dtype=dtype, requires_grad=not trained)
    labels = torch.zeros(images, dtype=torch.long)
    optimizer = torch.optim.AdamW(trained or [x], fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x).float(), labels).backward()
        optimizer.step()

    return peak_bytes(step)


def table(dim: int, heads: int, dtype: torch.dtype, compiled: bool = False) -> str:
    """Markdown: bytes of each variant, measured.

    Raises:
        ArithmeticError: a formula gives another number than was measured in eager mode.
    """
    mode = "compiled" if compiled else "eager"
    lines = [f"| {mode} | bytes a token and block | of eager LoRA's | beside that, a block |", "|---|---|---|---|"]
    lora = counted("lora", dim, heads, dtype.itemsize).token
    for variant in VARIANTS:
        reason = peft_reason("lora") if variant == "lora" else None
        if reason:
            lines.append(f"| {variant} | not measured: {reason} | | |")
            continue
        found = measured(variant, dim, heads, dtype, compiled)
        expected = counted(variant, dim, heads, dtype.itemsize)
        if found != expected and not compiled:
            raise ArithmeticError(f"{variant} keeps {found}; the formula gives {expected}")
        beside = f"{found.block / 2**20:.1f} MiB" if found.block else "0"
        lines.append(f"| {variant} | {found.token:,.0f} | {found.token / lora:.2f} | {beside} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dim", type=int, default=768, help="width of the model; ViT-B's by default")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of weights and images")
    parser.add_argument("--peak", action="store_true", help="of a step on 93 images, 1,581 tokens, instead")
    arguments = parser.parse_args()
    if arguments.peak:
        for variant in VARIANTS:
            if variant != "lora" or not peft_reason("lora"):
                found = peak(variant, 12, arguments.dim, arguments.heads, getattr(torch, arguments.dtype), 93)
                print(f"{variant}: {found / 2**20:.0f} MiB", flush=True)
        return
    for compiled in (False, True):
        print(table(arguments.dim, arguments.heads, getattr(torch, arguments.dtype), compiled), end="\n\n")


if __name__ == "__main__":
    main()
