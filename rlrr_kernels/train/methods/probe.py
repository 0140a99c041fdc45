"""The linear probe: logistic regression on a frozen backbone's features, the baseline every fine-tuning has to beat."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, make_loader
from rlrr_kernels.train.evaluate import Scores, evaluate
from rlrr_kernels.train.loop.distributed import make_accelerator
from rlrr_kernels.train.models.attention import fastest_attention
from rlrr_kernels.train.output.memory import peak_memory, reset_peak_memory

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Scores by split; the penalty chosen on the validation images; trained parameters; seconds; peak bytes."""

    scores: dict[str, Scores]
    penalty: float
    trained: int
    seconds: float
    peak_memory: int


def linear_probe(
    model: nn.Module,
    sets: Mapping[str, ImageDataset],
    *,
    batch_size: int = 64,
    cpu: bool = False,
    track: Callable[[Iterable, int, str], Iterable] = lambda batches, total, name: batches,
) -> ProbeResult:
    """Fits a linear classifier on standardised features of ``model``, one pass over the images, no augmentation.

    The multinomial logistic regression is solved by L-BFGS for every L2 penalty of :data:`PENALTIES` (times
    ‖W‖²); the best on the validation images is kept. Convex, so no seed plays a part.

    Args:
        model: a timm model; its features are what its head would get (``forward_head(..., pre_logits=True)``).
        sets: ``train``, ``val`` and any others to score; deterministic transforms.
        batch_size: of the pass.
        cpu: leave a GPU alone.
        track: wraps the batches of a split to show progress.
    """
    start = time.monotonic()
    reset_peak_memory()
    accelerator = make_accelerator(TrainConfig(), cpu=cpu)
    model = model.to(accelerator.device).eval()
    features = {name: _features(model, data, batch_size, accelerator, track, name) for name, data in sets.items()}
    classes = len(sets["train"].samples.classes)
    mean, std = features["train"][0].mean(0), features["train"][0].std(0).clamp_min(1e-6)
    loaders = {
        name: [(chunk, labels) for chunk, labels in zip(((x - mean) / std).split(4096), y.split(4096), strict=True)]
        for name, (x, y) in features.items()
    }
    best = None
    for penalty in PENALTIES:
        probe = _solve((features["train"][0] - mean) / std, features["train"][1], classes, penalty)
        scores = evaluate(probe, loaders["val"], classes, accelerator)
        if best is None or (scores.accuracy, -scores.loss) > best[0]:
            best = (scores.accuracy, -scores.loss), penalty, probe
    _, penalty, probe = best
    return ProbeResult(
        scores={name: evaluate(probe, loader, classes, accelerator) for name, loader in loaders.items()},
        penalty=penalty,
        trained=sum(p.numel() for p in probe.parameters()),
        seconds=time.monotonic() - start,
        peak_memory=peak_memory(),
    )


@torch.no_grad()
def _features(model, dataset, batch_size, accelerator, track, name) -> tuple[Tensor, Tensor]:
    """(features [M, D], labels [M]) of all images."""
    loader = make_loader(dataset, batch_size)
    device = accelerator.device
    pairs = []
    for images, labels in track(loader, len(loader), name):
        with fastest_attention(model, accelerator, images.shape[-1]), accelerator.autocast():
            tokens = model.forward_features(images.to(device))
            pairs.append((model.forward_head(tokens, pre_logits=True).float(), labels.to(device)))
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels)


def _solve(x: Tensor, y: Tensor, classes: int, penalty: float) -> nn.Linear:
    """The classifier of least cross-entropy on x [M, D], y [M] plus ``penalty`` · ‖W‖²."""
    probe = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(probe(x), y) + penalty * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe
