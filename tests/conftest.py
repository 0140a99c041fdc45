"""Settings and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

# Tiny problems: on a busy machine a second thread waits for its core ten times longer than it computes.
torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``torch.empty`` returns with NaN, so that memory no kernel wrote shows in the result."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
