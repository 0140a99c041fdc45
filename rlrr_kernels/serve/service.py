"""``Service``: from the bytes of an image and the name of an adapter to the probabilities of its classes."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from rlrr_kernels.bank import AdapterBank, HeldAdapter
from rlrr_kernels.serve.batcher import Batcher
from rlrr_kernels.serve.config import ServeConfig
from rlrr_kernels.serve.images import decode
from rlrr_kernels.serve.logs import log
from rlrr_kernels.serve.metrics import Metrics
from rlrr_kernels.serve.store import AdapterStore, Changes, classes_of, first_task
from rlrr_kernels.train.models.backbones import HUB, create_model


class OverloadedError(RuntimeError):
    """More requests are open than may be.

    Attributes:
        retry_after: whole seconds after which it may be otherwise.
    """

    def __init__(self, open_requests: int, retry_after: int) -> None:
        super().__init__(f"{open_requests} requests are open, as many as may be; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Answer:
    """An image's probabilities.

    Attributes:
        classes: names, in label order. probabilities: of each.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Service:
    """A backbone, its adapters, and the threads that read images and compute batches of them.

    Args:
        config: of the server.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for
            :func:`rlrr_kernels.train.models.backbones.create_model`; or there is no adapter that can be served, or no
            model is named.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.metrics = config, Metrics()
        task = first_task(config.adapters)
        name = config.model or (task and task.model)
        if not name:
            raise ValueError(f"no adapter in {config.adapters} says which backbone it is for; name it with --model")
        size = config.image_size or (task.preprocessing.image_size if task else None)
        weights = config.weights or (task.own_weights() if task else HUB)
        model, preprocessing = create_model(name, 1, image_size=size, weights=weights)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
        budget = None if config.memory_mb is None else int(config.memory_mb * 1e6)
        self.model_name = name
        self.bank = AdapterBank(model.to(self.device).eval(), memory_budget=budget)
        self.store = AdapterStore(self.bank, config.adapters, preprocessing)
        changes = self.rescan()
        if not changes.added:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in changes.failed.items())
            raise ValueError(f"no adapter in {config.adapters} can be served by {name}{reasons or ': there is none'}")
        self._open, self._lock = 0, threading.Lock()
        self._readers: Batcher[tuple[str, bytes]] = Batcher(
            lambda items: [self._read(*item) for item in items],
            batch_size=1,
            latency=0.0,
            threads=config.readers,
            name="rlrr-reader",
        )
        self._batcher: Batcher[tuple[HeldAdapter, Tensor]] = Batcher(
            self._run, batch_size=config.batch_size, latency=config.latency_ms / 1e3, observe=self._observe
        )

    def rescan(self) -> Changes:
        """Looks at the folder of adapters again; see :meth:`rlrr_kernels.serve.store.AdapterStore.rescan`."""
        changes = self.store.rescan()
        for name, reason in changes.failed.items():
            log(logging.ERROR, "adapter not served", adapter=name, reason=reason)
        log(logging.INFO, "adapters", added=len(changes.added), swapped=len(changes.swapped),
            removed=len(changes.removed), failed=len(changes.failed), served=len(self.bank))  # fmt: skip
        self.metrics.adapters.set(len(self.bank))
        self.metrics.adapter_bytes.set(self.bank.nbytes)
        return changes

    # ------------------------------------------------------------ one request

    def enter(self) -> None:
        """Counts a request as open until :meth:`leave`.

        Raises:
            OverloadedError: too many are.
        """
        with self._lock:
            if self._open >= self.config.queue:
                raise OverloadedError(self._open, self.retry_after())
            self._open += 1
            self.metrics.open.set(self._open)

    def retry_after(self) -> int:
        """Whole seconds in which what is open now would be computed."""
        return self._batcher.seconds_for(self._open)

    def leave(self) -> None:
        """Ends what :meth:`enter` began."""
        with self._lock:
            self._open -= 1
            self.metrics.open.set(self._open)

    def read(self, name: str, data: bytes, timeout: float) -> Future[tuple[HeldAdapter, Tensor]]:
        """The adapter and the input of the model that an image becomes for it, in a reader's thread.

        Raises, in the future:
            TimeoutError: no reader was free within ``timeout`` seconds.
            UnknownAdapterError, MisfitError, FileNotFoundError, ValueError: as for
                :meth:`rlrr_kernels.serve.store.AdapterStore.hold`.
            UnknownFormatError, TooManyPixelsError, ImageError: as for :func:`rlrr_kernels.serve.images.decode`.
        """
        return self._readers.submit((name, data), timeout)

    def is_stuck(self) -> bool:
        """Whether every reader has been at one image for longer than a request may take."""
        return self._readers.busy_for() > self.config.timeout

    def _read(self, name: str, data: bytes) -> tuple[HeldAdapter, Tensor]:
        held, most = self.store.hold(name), self.config.pixels_mp * 1e6
        return held, self.store.input_of(held.info, decode(data, most), most)

    def classify(self, held: HeldAdapter, image: Tensor, timeout: float) -> Future[Answer]:
        """The answer to come for an input of the model; the version of the adapter is the one that was held."""
        return self._batcher.submit((held, image), timeout)

    # ------------------------------------------------------------ a batch

    def _run(self, batch: Sequence[tuple[HeldAdapter, Tensor]]) -> list[Answer]:
        self.metrics.batch_adapters.observe(len({id(held.task) for held, _ in batch}))
        images = torch.stack([image for _, image in batch]).to(self.device)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = self.bank(images, [held for held, _ in batch])
        return [
            Answer(classes_of(held.info), tuple(row.float().softmax(0).tolist()))
            for (held, _), row in zip(batch, logits, strict=True)
        ]

    def _observe(self, size: int, waited: float, computed: float) -> None:
        self.metrics.batch_images.observe(size)
        self.metrics.waiting_seconds.observe(waited)
        self.metrics.batch_seconds.observe(computed)
        self.metrics.adapter_bytes.set(self.bank.nbytes)

    def close(self) -> bool:
        """Finishes what was accepted, and ends the threads; whether that was done in time."""
        end = time.monotonic() + self.config.shutdown_timeout
        read = self._readers.close(self.config.shutdown_timeout)
        return self._batcher.close(max(0.0, end - time.monotonic())) and read
