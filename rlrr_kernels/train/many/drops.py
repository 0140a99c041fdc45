"""Dropout and stochastic depth in a batch of several tasks: each task draws at its own rate from its own stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlrr_kernels.train.many.streams import RandomStream


class TaskDrops:
    """Puts, in ``model``, the tasks' own drop modules in the places where any task's model drops something.

    Args:
        model: of the batch; changed in place.
        models: name of each task → its own model, whose places have the same names.
        streams: name of each task → what it draws from.
    """

    def __init__(self, model: nn.Module, models: Mapping[str, nn.Module], streams: Mapping[str, RandomStream]) -> None:
        self.streams = streams
        self.segments: Sequence[tuple[str, int]] = ()
        places = {name for own in models.values() for name, module in own.named_modules() if _drops(module)}
        for place in sorted(places):
            parent, _, child = place.rpartition(".")
            own = {task: getattr(own.get_submodule(parent), child) for task, own in models.items()}
            setattr(model.get_submodule(parent), child, _TaskDrop(self, own))


class _TaskDrop(nn.Module):
    """Stands where the tasks' models have ``own``, which stay theirs and are no submodules of this."""

    def __init__(self, drops: TaskDrops, own: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        vars(self).update(drops=drops, own=own)

    def forward(self, x: Tensor) -> Tensor:
        """x [S P, ...] of S samples, those of a task adjacent, with what their tasks drop set to 0."""
        segments: Sequence[tuple[str, int]] = self.drops.segments
        per_sample = x.shape[0] // sum(count for _, count in segments)
        parts = list(x.split([count * per_sample for _, count in segments]))
        for number, (task, _) in enumerate(segments):
            module = self.own[task]
            if module is not None and _drops(module):
                with self.drops.streams[task].in_use():
                    parts[number] = module(parts[number])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` is PyTorch's dropout or timm's ``DropPath``, of whatever kind, at a rate above 0."""
    rate = getattr(module, "drop_prob", getattr(module, "p", 0))
    return isinstance(rate, float | int) and rate > 0 and next(module.children(), None) is None
