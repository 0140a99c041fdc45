"""A CUDA GPU that is pretended: tensors meant for it lie on the CPU, and what only a GPU has answers with constants.

What a run on a GPU does is then done on a CPU, in code that a CPU's own run would skip. The arithmetic is the CPU's or,
with ``TRITON_INTERPRET=1``, the interpreter's, and nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


class _DevicesOnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple(map(_on_cpu, args))
        return function(*args, **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


class Stream:
    """Stands for a CUDA stream."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def is_capturing(self) -> bool:
        return False


class Graph:
    """Stands for a CUDA graph; nothing is replayed."""

    def replay(self) -> None:
        pass


class Event:
    """Stands for a CUDA event: a millisecond passes between any two."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@contextmanager
def pretended_gpu() -> Iterator[list[bool]]:
    """Makes every use of ``cuda`` within the block the CPU's; yields what is not empty while a graph is captured."""
    capturing: list[bool] = []

    @contextmanager
    def capture(graph: Graph, pool: object = None) -> Iterator[None]:
        capturing.append(True)
        try:
            yield
        finally:
            capturing.pop()

    properties = SimpleNamespace(
        L2_cache_size=1 << 16, major=9, minor=0, multi_processor_count=132, name="Pretended", gcnArchName="",
    )  # fmt: skip
    memory = iter(range(0, 1 << 40, 512))
    answers = {
        "is_available": lambda: True, "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: "Pretended",
        "current_device": lambda: 0, "memory_allocated": lambda device=None: next(memory),
        "max_memory_allocated": lambda device=None: next(memory), "reset_peak_memory_stats": lambda device=None: None,
        "Stream": Stream, "current_stream": lambda device=None: Stream(), "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph, "graph": capture, "Event": Event,
        "graph_pool_handle": lambda: (0, 1), "_sleep": lambda cycles: None,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    autocast = torch.autocast
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(torch, "autocast", lambda device, *args, **options: autocast("cpu", *args, **options)),
        mock.patch.object(torch.accelerator, "current_stream", Stream),
        mock.patch.object(torch, "compile", lambda function, **options: function),
        mock.patch.object(torch, "Generator", _Generator),
        _DevicesOnCpu(),
    ):
        yield capturing
