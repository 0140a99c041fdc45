"""Ways to estimate the scale gradients from a quarter of the patch tokens, by the variance each would add.

    python -m benchmarks.row_schemes --cache .cache --adapter runs/scale_grad_rows/rows-1/seed-1/adapter --image-size 84

A gradient of s_r and s_c is a sum over rows of x: a row's part is g ⊙ W (s_c ⊙ x) and x ⊙ Wᵀ (s_r ⊙ g). For DINOv2
ViT-S/14 on photographs of solar cells these parts are computed for every patch token, and of them the variance of every
scheme, in closed form where there is one: the total over all scales, beside that of the plain draw. The scheme that was
taken, the images' means of the drawn rows, is in ``rlrr_kernels/ops/sampling/row_sample.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels import RLRRLinear
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder
from rlrr_kernels.train.data.folders import ImageDataset, find_splits, make_loader
from rlrr_kernels.train.methods.files import load_trained
from rlrr_kernels.train.models.task import Task

SIDE = 2
"""One of every SIDE x SIDE patches, or of every SIDE² tokens, is drawn."""

PLAIN = "plain draw"


def row_parts(layer: RLRRLinear, x: Tensor, g: Tensor) -> Tensor:
    """What each row of x [B, P, K] with g [B, P, N] adds to all gradients of the scales: [B, P, N + G K], for r = 1."""
    parts, groups = [], layer.scale_col.shape[0]
    rows = zip(*(t.chunk(groups) for t in (layer.weight, layer.scale_row[:, 0])), g.chunk(groups, -1), strict=True)
    for col, (weight, row, grad) in zip(layer.scale_col[:, 0], rows, strict=True):
        parts += [grad * ((x * col) @ weight.t()), x * ((grad * row) @ weight)]
    return torch.cat(parts, -1)


def squares(t: Tensor) -> Tensor:
    """Squared length over the last dimension."""
    return t.square().sum(-1)


def blocks_of_tokens(t: Tensor) -> Tensor:
    """[B, P, D] as neighbours in token order, [B, P / SIDE², SIDE², D]."""
    return t.unflatten(1, (-1, SIDE**2))


def blocks_of_patches(t: Tensor) -> Tensor:
    """[B, P, D] of a square grid as SIDE x SIDE patches, [B, P / SIDE², SIDE², D]."""
    side = round(t.shape[1] ** 0.5) // SIDE
    grid = t.unflatten(1, (side, SIDE, side, SIDE))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def plain(parts: Tensor, drawn: int) -> Tensor:
    """Variance of ``drawn`` rows an image, every subset as likely as any other."""
    count = parts.shape[1]
    spread = squares(parts - parts.mean(1, keepdim=True)).sum() / (count - 1)
    return count**2 * (1 - drawn / count) / drawn * spread


def one_of_each(strata: Tensor) -> Tensor:
    """Variance of one row of every stratum [B, strata, size, D]."""
    return strata.shape[2] * squares(strata - strata.mean(2, keepdim=True)).sum()


def with_replacement(parts: Tensor, importance: Tensor, drawn: int) -> Tensor:
    """Variance of ``drawn`` rows an image, each drawn anew with probability ∝ ``importance`` [B, P]."""
    probability = importance / importance.sum(1, keepdim=True)
    lengths = squares(parts)
    weighted = torch.where(lengths > 0, lengths / probability, 0)  # patch tokens may have no gradient
    return (weighted.sum(1) - squares(parts.sum(1))).sum() / drawn


def by_means(layer: RLRRLinear, x: Tensor, g: Tensor, total: Tensor, drawn: int, draws: int = 3) -> Tensor:
    """Variance of P ḡ x̄ᵀ + (P - 1) S_gx, the scheme that was taken, by ``draws`` draws."""
    count, errors = x.shape[1], []
    for _ in range(draws):
        index = torch.rand(x.shape[:2]).topk(drawn).indices.unsqueeze(-1)
        xs, gs = (t.gather(1, index.expand(-1, -1, t.shape[-1])) for t in (x, g))
        centred = (count - 1) / (drawn - 1) * (gs - gs.mean(1, keepdim=True)) + count / drawn * g.mean(1, keepdim=True)
        errors.append(squares(row_parts(layer, xs, centred).sum((0, 1)) - total))
    return torch.stack(errors).mean()


@torch.no_grad()
def variances(layer: RLRRLinear, x: Tensor, g: Tensor) -> dict[str, float]:
    """By scheme, for the patch tokens x [B, P, K] and g [B, P, N] of one layer."""
    drawn = x.shape[1] // SIDE**2
    parts = row_parts(layer, x, g)
    centred = row_parts(layer, x - x.mean(1, keepdim=True), g)
    sizes, grads = x.norm(dim=-1), g.norm(dim=-1)
    found = {
        PLAIN: plain(parts, drawn),
        "images' means, of the drawn rows": by_means(layer, x, g, parts.sum((0, 1)), drawn),
        "one of every 4 tokens": one_of_each(blocks_of_tokens(parts)),
        "one of every 2 x 2 patches": one_of_each(blocks_of_patches(parts)),
        "images' means, of all rows of x": plain(centred, drawn),
        "the same, one of every 2 x 2 patches": one_of_each(blocks_of_patches(centred)),
        "the batch's mean": plain(row_parts(layer, x - x.mean((0, 1)), g), drawn),
        "with replacement": with_replacement(parts, torch.ones_like(sizes), drawn),
        "with replacement, ∝ ‖x‖": with_replacement(parts, sizes, drawn),
        "with replacement, ∝ ‖x‖ ‖g‖": with_replacement(parts, sizes * grads, drawn),
    }
    return {name: value.item() for name, value in found.items()}


def layer_rows(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[RLRRLinear, Tensor, Tensor]]:
    """Every rescaled layer with its x and g of one minibatch."""
    found: dict[RLRRLinear, list[Tensor]] = {}

    def keep(layer: RLRRLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        found[layer] = [inputs[0].detach()]
        output.register_hook(lambda g: found[layer].append(g))

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, RLRRLinear)]
    F.cross_entropy(model(images), labels).backward()
    for handle in handles:
        handle.remove()
    for layer, (x, g) in found.items():
        yield layer, x, g


def train_from_start(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Scales and head drawn anew and trained for a step a batch."""
    for module in model.modules():
        if isinstance(module, RLRRLinear):
            module.reset_parameters()
    nn.init.zeros_(model.get_classifier().weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where backbone and images are kept")
    parser.add_argument("--adapter", type=Path, required=True, help="an adapter folder of rlrr finetune")
    parser.add_argument("--image-size", type=int, default=84, help="pixels, a multiple of 28")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--start", type=int, default=0, help="train so many steps from the start instead")
    arguments = parser.parse_args()
    task = Task.of_adapter(arguments.adapter)
    preprocessing = dataclasses.replace(task.preprocessing, image_size=arguments.image_size)
    task = dataclasses.replace(task, preprocessing=preprocessing)
    model = task.backbone(backbone_file(arguments.cache))
    load_trained(model, arguments.adapter)
    model.train()
    torch.manual_seed(0)
    train = find_splits(elpv_folder(arguments.cache))["train"]
    shuffled = ImageDataset(train.subset(torch.randperm(len(train)).tolist()), preprocessing.transform())
    loader = make_loader(shuffled, arguments.batch_size)
    batches = [batch for batch, _ in zip(loader, range(arguments.start + arguments.batches), strict=False)]
    if arguments.start:
        train_from_start(model, batches[: arguments.start])
    totals: dict[str, float] = {}
    tokens = (arguments.image_size // 14) ** 2
    for batch in batches[arguments.start :]:
        for layer, x, g in layer_rows(model, *batch):
            for name, value in variances(layer, x[:, -tokens:], g[:, -tokens:]).items():
                totals[name] = totals.get(name, 0.0) + value
    for name, value in totals.items():
        print(f"{value / totals[PLAIN]:5.2f}  {name}")


if __name__ == "__main__":
    main()
