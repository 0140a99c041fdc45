"""Global and shared memory that refuse what a GPU lets pass: every access outside of a tensor, and misaligned ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.values import UNSIGNED


def gather(memory: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """``size`` bytes at each of the aligned ``offsets`` into bytes: [n, size]."""
    if size in (1, 2, 4, 8):
        return memory.view(UNSIGNED[8 * size])[offsets // size][:, None].view(np.uint8)
    words = memory.view(np.uint64)[(offsets // 8)[:, None] + np.arange(size // 8)]
    return words.view(np.uint8)


def scatter(memory: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
    """Writes the bytes [n, size] to aligned offsets."""
    size = data.shape[1]
    if size in (1, 2, 4, 8):
        memory.view(UNSIGNED[8 * size])[offsets // size] = data.view(UNSIGNED[8 * size])[:, 0]
    else:
        memory.view(np.uint64)[(offsets // 8)[:, None] + np.arange(size // 8)] = data.view(np.uint64)


class GlobalMemory:
    """Copies of the tensors' storages with unmapped gaps between them; what was written goes back by ``write_back``.

    Args:
        storages: address and bytes of each.
    """

    BASE, GAP = 1 << 32, 4096

    def __init__(self, storages: Iterable[tuple[int, np.ndarray]]) -> None:
        self._storages: dict[int, tuple[int, np.ndarray]] = {}
        size = self.GAP
        for address, data in storages:
            if address not in self._storages:
                start = -(-size // 256) * 256 + address % 256  # aligned as the original is
                self._storages[address] = start, data
                size = start + data.size + self.GAP
        size = -(-size // 256) * 256
        self.bytes = np.full(size, 0xFF, np.uint8)
        self._mapped = np.zeros(size, bool)
        for start, data in self._storages.values():
            self.bytes[start : start + data.size] = data
            self._mapped[start : start + data.size] = True

    def address(self, storage: int) -> int:
        """Where a storage begins for the kernel."""
        return self.BASE + self._storages[storage][0]

    def offsets(self, addresses: np.ndarray, size: int, access: str) -> np.ndarray:
        """Indices into ``bytes`` of accesses of ``size`` bytes.

        Raises:
            Fault: one is misaligned, or not all of it is a tensor's.
        """
        offsets = addresses - self.BASE
        if (addresses % size).any():
            raise Fault(f"misaligned {access} of {size} bytes")
        outside = (offsets < 0) | (offsets + size > self.bytes.size)
        if outside.any() or not (self._mapped[offsets] & self._mapped[offsets + size - 1]).all():
            raise Fault(f"out of bounds: {access} of {size} bytes")
        return offsets

    def write_back(self) -> None:
        """Copies the contents back into the storages."""
        for start, data in self._storages.values():
            data[:] = self.bytes[start : start + data.size]


class SharedMemory:
    """The shared memory of several blocks, NaN at first.

    Copies and products by the asynchronous proxy are in order with what threads stored only after ``fence.proxy.async``
    of the thread that stored it; 16 bytes at a time know who wrote them last.
    """

    _CHUNK = 16

    def __init__(self, blocks: int, size: int, fences_count: bool) -> None:
        self.size = max(1024, -(-size // 1024) * 1024)
        self.bytes = np.full(blocks * self.size, 0xFF, np.uint8)
        self._writer = np.full(self.bytes.size // self._CHUNK, -1, np.int32) if fences_count else None

    def offsets(self, addresses: np.ndarray, size: int, blocks: np.ndarray, access: str = "access") -> np.ndarray:
        """Indices into ``bytes`` of accesses of ``size`` bytes, one of each of the threads of ``blocks``.

        Raises:
            Fault: one is misaligned, or outside.
        """
        if addresses.size and (addresses % size).any():
            raise Fault(f"misaligned {access} of {size} bytes of shared memory")
        if addresses.size and ((addresses < 0) | (addresses + size > self.size)).any():
            raise Fault(f"out of bounds: {access} of {size} bytes of shared memory")
        return addresses + blocks * self.size

    def store(self, offsets: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """What threads store themselves."""
        scatter(self.bytes, offsets, data)
        if self._writer is not None:
            self._writer[offsets // self._CHUNK] = threads

    def fence(self, threads: np.ndarray, all_threads: int) -> None:
        """``fence.proxy.async`` of some threads."""
        if self._writer is not None:
            fenced = np.zeros(all_threads + 1, bool)  # the last one: of what nobody wrote
            fenced[threads] = True
            self._writer[fenced[self._writer]] = -1

    def check_fenced(self, offsets: np.ndarray, access: str) -> None:
        """Refuses an access by the asynchronous proxy where a thread stored something without a fence."""
        if self._writer is not None and (self._writer[offsets // self._CHUNK] >= 0).any():
            raise Fault(f"{access} is not ordered after a store to shared memory by fence.proxy.async")
