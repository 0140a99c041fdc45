"""``Batcher``: gathers what several threads hand in and computes it in batches, in threads of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass(eq=False)
class _Waiting(Generic[Item]):
    item: Item
    since: float
    until: float
    future: Future[Any]


class ClosedError(RuntimeError):
    """The batcher takes nothing any more."""


class Batcher(Generic[Item]):
    """Computes items in batches; an error in a batch is the error of those items alone that raise it by themselves.

    Args:
        run: results of a batch, in its order.
        batch_size: most items a batch.
        latency: seconds that an item waits for others, at most, while the thread is free; items that came while it
            was busy are its next batch.
        observe: is told each batch's size, the seconds that its oldest item waited and those that it was computed.
        threads: compute batches side by side; more than one need ``batch_size`` 1.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Any]],
        *,
        batch_size: int,
        latency: float,
        observe: Callable[[int, float, float], None] = lambda size, waited, computed: None,
        threads: int = 1,
        name: str = "rlrr-batches",
    ) -> None:
        assert threads == 1 or batch_size == 1
        self._run, self._batch_size, self._latency, self._observe = run, batch_size, latency, observe
        self._changed = threading.Condition()
        self._queue: deque[_Waiting[Item]] = deque()
        self._closing = False
        self._per_item = 0.0  # seconds, a running mean
        self._began: dict[int, float] = {}  # thread → when it began the batch that it computes
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, item: Item, timeout: float) -> Future[Any]:
        """The result to come of ``item``; ``TimeoutError`` unless it is computed from within ``timeout`` seconds on.

        Cancelled, it waits no longer.

        Raises:
            ClosedError: after :meth:`close`.
        """
        now = time.monotonic()
        waiting = _Waiting(item, now, now + timeout, Future())
        with self._changed:
            if self._closing:
                raise ClosedError("the server is stopping")
            self._queue.append(waiting)
            self._changed.notify()
        waiting.future.add_done_callback(lambda future: self._drop(waiting) if future.cancelled() else None)
        return waiting.future

    def _drop(self, waiting: _Waiting[Item]) -> None:
        with self._changed, contextlib.suppress(ValueError):  # a thread has taken it
            self._queue.remove(waiting)

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._queue)

    def seconds_for(self, items: int) -> int:
        """Whole seconds, at least one, in which ``items`` would be computed at the pace of late."""
        return max(1, math.ceil(items * self._per_item))

    def busy_for(self) -> float:
        """Seconds for which no thread has been free or has begun another batch."""
        began = list(self._began.values())
        return time.monotonic() - max(began) if len(began) == len(self._threads) else 0.0

    def close(self, timeout: float | None = None) -> bool:
        """Takes nothing more, computes what waits, and ends the threads; whether that was done within ``timeout`` s.

        What was not done then does not keep the process from ending.
        """
        begin = time.monotonic()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if timeout is None else max(0.0, begin + timeout - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while batch := self._next():
            now = time.monotonic()
            live = []
            for waiting in batch:
                if not waiting.future.set_running_or_notify_cancel():
                    continue
                if now > waiting.until:
                    waiting.future.set_exception(TimeoutError("it waited longer than it may"))
                else:
                    live.append(waiting)
            if not live:
                continue
            self._began[threading.get_ident()] = now
            self._compute(live)
            del self._began[threading.get_ident()]

    def _next(self) -> list[_Waiting[Item]]:
        """The next batch; empty when all is done and nothing more will come."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            while self._queue and len(self._queue) < self._batch_size and not self._closing:
                left = self._queue[0].since + self._latency - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._batch_size))]

    def _compute(self, batch: list[_Waiting[Item]]) -> None:
        begin = time.monotonic()
        try:
            results = self._run([waiting.item for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for waiting in batch:
                self._compute([waiting])
            return
        seconds = time.monotonic() - begin
        mean = seconds / len(batch)
        self._per_item = 0.9 * self._per_item + 0.1 * mean if self._per_item else mean
        self._observe(len(batch), begin - batch[0].since, seconds)  # before its answers are out
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.set_result(result)
