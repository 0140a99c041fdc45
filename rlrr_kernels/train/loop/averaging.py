"""Exponential moving average of what is trained; the frozen backbone has no copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """``decay`` · average + (1 - ``decay``) · value after every update, starting at the values given."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """``parameters``: by name; read at every update."""
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self.tensors = {name: tensor.clone() for name, tensor in self.parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Takes the parameters' present values in."""
        self._average(list(self.tensors.values()), list(self.parameters.values()), None)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from the averages ``tensors``."""
        _copy(tensors, self.tensors)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters hold their averages."""
        values = {name: tensor.clone() for name, tensor in self.parameters.items()}
        _copy(self.tensors, self.parameters)
        try:
            yield
        finally:
            _copy(values, self.parameters)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
