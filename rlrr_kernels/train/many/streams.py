"""Random states of runs that take turns in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rlrr_kernels.train.loop import checkpoint


class RandomStream:
    """The states of all random generators as one run left them: it draws what it would draw alone in its process."""

    def __init__(self) -> None:
        """The states are those of now."""
        self._state = checkpoint.rng_state()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the generators go on with this stream; afterwards with what they did before."""
        before = checkpoint.rng_state()
        checkpoint.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = checkpoint.rng_state()
            checkpoint.set_rng_state(before)
