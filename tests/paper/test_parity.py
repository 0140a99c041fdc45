"""Our adapted timm models against the paper's, written from its formulas: equal logits and gradients.

In float64 they agree to 1e-12. In fp32 both round: against float64, ours may be no less exact than the formulas are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.support.authors_models import AuthorsSwin, AuthorsViT, Oracle

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")

from rlrr_kernels import check_gradients, numerics
from rlrr_kernels.adapt.model import adapt_report
from rlrr_kernels.paper.authors import authors_shapes, load_authors_tensors
from rlrr_kernels.train.models.drop import set_drop

FLOAT64_LIMIT = 1e-12
WORST = 2.0
"""How many times as far from float64 as the formula in fp32, this tensor's or on average, a single tensor may be; all
of them together are held to RATIO."""


class ViT:
    """The oracle and our model of it."""

    image_size = 32

    def __init__(self, seed: int, drop: float = 0.0) -> None:
        self.oracle = AuthorsViT(seed=seed, drop=drop)
        options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}
        self.model = timm.create_model("vit_tiny_patch16_224", **options).eval()
        missing, unexpected = self.model.load_state_dict(self.oracle.timm_state(), strict=False)
        assert (sorted(missing), unexpected) == (["head.bias", "head.weight"], [])
        load_authors_tensors(self.model, {name: tensor.detach() for name, tensor in self.oracle.trained.items()})
        if drop:
            set_drop(self.model.train(), drop, "branch")


class Swin:
    image_size = 112

    def __init__(self, seed: int) -> None:
        self.oracle = AuthorsSwin(depths=(2, 2, 2), heads=(2, 4, 8), seed=seed)
        options = {"depths": (2, 2, 2), "num_heads": (2, 4, 8), "embed_dim": 16, "img_size": 112, "num_classes": 5}
        self.model = timm.create_model("swin_tiny_patch4_window7_224", **options, drop_path_rate=0.0).eval()
        # Microsoft's files have a stage's patch merging at its end, timm at the start of the next.
        frozen = {re.sub(r"(\d+)\.downsample", lambda n: f"{int(n[1]) + 1}.downsample", name): tensor
                  for name, tensor in self.oracle.frozen.items()}  # fmt: skip
        missing, unexpected = self.model.load_state_dict(frozen, strict=False)
        assert (sorted(missing), unexpected) == (["head.fc.bias", "head.fc.weight"], [])
        load_authors_tensors(self.model, {name: tensor.detach() for name, tensor in self.oracle.trained.items()})
        report = adapt_report(self.model)
        assert {layer.groups for layer in report.layers} == {1}
        assert "layers.2.downsample.reduction" in {layer.name for layer in report.layers}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of our parameters under the names of the oracle's."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    sources = authors_shapes({name: tuple(gradient.shape) for name, gradient in ours.items()})
    found = {}
    for name, theirs in sources.items():
        found |= dict(zip(theirs, ours[name].chunk(len(theirs)), strict=True))
    return found


def loss(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def of_oracle(oracle: Oracle, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and the gradient of every trained tensor, by name."""
    oracle = oracle.to(dtype)
    torch.manual_seed(11)
    logits = oracle(images.to(dtype))
    found = torch.autograd.grad(loss(logits), list(oracle.trained.values()))
    return {"logits": logits, **dict(zip(oracle.trained, found, strict=True))}


def of_ours(pair: ViT | Swin, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model = pair.model.to(dtype)
    torch.manual_seed(11)
    logits = model(images.to(dtype))
    loss(logits).backward()
    check_gradients(model)
    return {"logits": logits, **gradients(model)}


def distances(found: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of each tensor over all draws, relative to the exact one: a draw on which that nearly cancels counts for little.

    Relative to the query's for the key's shift, which no softmax sees and which is zero.
    """

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(sum(tensor.norm().item() ** 2 for tensor in tensors))

    return {
        name: norm(
            ours[name].double().reshape(tensors[name].shape) - tensors[name]
            for ours, tensors in zip(found, exact, strict=True)
        )
        / norm(tensors[name.replace("key.shift_bias", "query.shift_bias")] for tensors in exact)
        for name in exact[0]
    }


def images_of(pair: ViT | Swin, seed: int) -> Tensor:
    shape = (3, 3, pair.image_size, pair.image_size)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


on_all = pytest.mark.parametrize("make", [ViT, lambda seed: ViT(seed, drop=0.4), Swin], ids=("vit", "drop", "swin"))


@on_all
def test_float64(make):
    pair = make(0)
    images = images_of(pair, 0)
    exact = of_oracle(pair.oracle, images, torch.float64)
    ours = distances([of_ours(pair, images, torch.float64)], [exact])
    assert max(ours.values()) <= FLOAT64_LIMIT, {name: error for name, error in ours.items() if error > FLOAT64_LIMIT}


@on_all
def test_float32(make):
    exact, formula, ours = [], [], []
    for seed in range(numerics.SEEDS):
        pair = make(seed)
        images = images_of(pair, seed)
        exact.append(of_oracle(pair.oracle, images, torch.float64))
        formula.append(of_oracle(pair.oracle, images, torch.float32))
        ours.append(of_ours(pair, images, torch.float32))
    formula, ours = distances(formula, exact), distances(ours, exact)
    average = math.sqrt(sum(error**2 for error in formula.values()) / len(formula))
    for name, error in ours.items():
        assert error <= WORST * max(formula[name], average), name
    assert math.hypot(*ours.values()) <= numerics.RATIO * math.hypot(*formula.values())
