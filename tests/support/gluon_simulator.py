"""Runs the source of a Gluon kernel for Hopper on NumPy, with everything asynchronous late and in a random order.

Gluon has no interpreter, and what goes wrong in a kernel scheduled by hand is mostly order: a tile that is read before
it has come or overwritten while a product reads it, a barrier that never opens. :class:`Simulation` executes the source
text of a kernel's module, with the names it imports from Triton replaced by those below. The partitions of
``warp_specialize`` are threads of which one runs at a time; at every operation the scheduler draws what goes on from
the partitions that can and the copies and products under way. A seed is an interleaving; one that cannot go on is a
:class:`Deadlock`. Layouts are ignored. A :class:`Fault` is raised where the hardware's result would be undefined:

- shared memory is NaN until it is written, and again from the start of a copy into it until that copy ends;
- what a product or a copy out reads must be the same at its start and at its end;
- the result of a product cannot be used before ``warpgroup_mma_wait`` has seen it end, and the registers it reads must
  be among that wait's ``deps``;
- a copy out of what was stored needs ``fence_async_shared`` in between, and so do new barriers before they are used;
- a barrier may not count more arrivals or bytes than it waits for; no copy may be under way at the end;
- pointers are followed within their array only.
"""

from __future__ import annotations

import builtins
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


class Fault(Exception):
    """Something whose outcome on hardware is undefined."""


class Deadlock(Exception):
    """Every partition waits for another."""


class _Stopped(BaseException):
    """Ends the partitions that are left when one has failed."""


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise Fault(message)


class Tensor(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype) -> Tensor:
        return self.astype(dtype)


def _tensor(values) -> Tensor:
    return np.array(values).view(Tensor)


class Pointer:
    """A pointer, or a tensor of them, into an array."""

    def __init__(self, array: np.ndarray, offsets=0) -> None:
        self.array, self.offsets = array.reshape(-1), offsets

    def __add__(self, offsets) -> Pointer:
        return Pointer(self.array, self.offsets + offsets)


class Descriptor:
    """A matrix in global memory that is copied in blocks of a shape."""

    layout = None

    def __init__(self, array: np.ndarray, block: tuple[int, int]) -> None:
        self.array, self.block, self.dtype = array, block, array.dtype
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)) * array.itemsize)

    def part(self, corner: tuple[int, int]) -> tuple[np.ndarray, tuple[slice, ...]]:
        """What of a block lies in the matrix, and where in the block that is: none of it lies before the first row."""
        inside = self.array[tuple(slice(first, first + size) for first, size in zip(corner, self.block, strict=True))]
        return inside, tuple(slice(size) for size in inside.shape)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes expected in it have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int, expected: int) -> None:
        """Counts arrivals, and bytes that are expected from now on (negative: that have come)."""
        _check(self.count > 0, "a barrier is used before it is initialised")
        self.missing -= arrivals
        self.bytes += expected
        _check(self.missing >= 0 and self.bytes >= 0, "a barrier counts more than it waits for")
        if self.missing == self.bytes == 0:
            self.missing = self.count
            self.phase += 1


class Shared:
    """Shared memory, or a view of some."""

    def __init__(self, run: _Run, array: np.ndarray) -> None:
        self.run, self.array, self.dtype = run, array, array.dtype

    def index(self, index) -> Any:
        _check(0 <= index < len(self.array), f"index {index} of {len(self.array)} tiles")
        view = self.array[int(index)]
        return view[0] if self.dtype == object else Shared(self.run, view)

    def permute(self, order) -> Shared:
        return Shared(self.run, self.array.transpose(order))

    def reshape(self, shape) -> Shared:
        return Shared(self.run, self.array.reshape(shape))

    def contents(self) -> np.ndarray:
        _check(not np.isnan(self.array).any(), "shared memory is read that nothing was written to")
        return self.array.copy()

    def load(self, layout) -> Tensor:
        self.run.pause()
        return _tensor(self.contents())

    def store(self, value: Tensor) -> None:
        self.run.pause()
        _check(value.shape == self.array.shape and value.dtype == self.dtype, "a store of another shape or dtype")
        self.array[...] = value
        self.run.unfenced.append((self.run.current, self.array))


class Event:
    """Something under way. ``end`` is what happens when it ends."""

    done = False

    def __init__(self, owner: int, kind: str, end: Callable[[], None]) -> None:
        self.owner, self.kind, self.end = owner, kind, end


class Product(Event):
    """acc + a b; no value until it was waited for."""

    __array_ufunc__ = None

    def __init__(self, run: _Run, a: Tensor, b: Shared, acc) -> None:
        before = b.contents()
        super().__init__(run.current, "product", lambda: self._finish(b.array, before))
        self.a, self.acc, self.value = a, acc, None

    def _unfinished(self, *args) -> None:
        raise Fault("the result of a product is used before it was waited for")

    __add__ = __radd__ = __mul__ = __rmul__ = to = _unfinished

    def _finish(self, b: np.ndarray, before: np.ndarray) -> None:
        _check(np.array_equal(b, before), "a product's operand is overwritten before it ends")
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = _tensor(acc + self.a.astype(np.float32) @ before.astype(np.float32))


class _Run:
    """One program, its shared memory and its partitions."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.random = random.Random(f"{seed} {program}")
        # Who is slow is drawn once, so that runs differ by more than jitter.
        self.pace = {name: self.random.choice((0.001, 1.0, 20.0)) for name in (0, 1, 2, 3, "load", "store", "product")}
        self.current, self.events = -1, []
        self.products: dict[int, list[Product]] = {}  # of each partition, those that it has not waited for
        self.unfenced: list[tuple[int, Any]] = []  # what was written or initialised, and by whom, without a fence yet

    # ------------------------------------------------ scheduling

    def pause(self, ready: Callable[[], bool] | None = None, what: str = "") -> None:
        """Lets others go on, until ``ready``."""
        if self.current < 0:  # before warp_specialize there is one partition
            return
        mine = self.current
        self.waiting[mine] = ready, what
        self.back.release()
        self.turns[mine].acquire()
        if self.failure:
            raise _Stopped
        self.waiting[mine] = None, ""

    def specialize(self, partitions, worker_num_warps, worker_num_regs) -> None:
        _check(
            len(worker_num_warps) == len(worker_num_regs) == len(partitions) - 1, "partitions and their warps differ"
        )
        _check(not self.unfenced, "barriers without a fence after they are initialised")
        self.turns = [threading.Semaphore(0) for _ in partitions]
        self.back, self.failure = threading.Semaphore(0), None
        self.waiting: list[Any] = [(None, "")] * len(partitions)
        threads = [
            threading.Thread(target=self._partition, args=(index, *partition), daemon=True)
            for index, partition in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        alive = set(range(len(partitions)))
        while alive and not self.failure:
            self._next(alive)
            alive = {index for index in alive if self.waiting[index] is not None}
        for turn in self.turns:
            turn.release()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        _check(not self.events, "the program ends before its copies")

    def _next(self, alive: set[int]) -> None:
        """One partition goes on to its next pause, or something under way ends."""
        heads = {}  # products of one partition end in order
        choices: list[tuple[Any, float]] = []
        for event in self.events:
            if event.kind != "product" or heads.setdefault(event.owner, event) is event:
                choices.append((event, self.pace[event.kind]))
        for index in alive:
            ready, _ = self.waiting[index]
            if ready is None or ready():
                choices.append((index, self.pace[index]))
        if not choices:
            self.failure = Deadlock("; ".join(f"partition {index}: {self.waiting[index][1]}" for index in alive))
            return
        chosen = self.random.choices(*zip(*choices, strict=True))[0]
        if isinstance(chosen, Event):
            self.events.remove(chosen)
            try:
                chosen.end()
            except Exception as error:
                self.failure = error
            chosen.done = True
        else:
            self.current = chosen
            self.turns[chosen].release()
            self.back.acquire()

    def _partition(self, index: int, function: Callable, arguments: tuple) -> None:
        self.turns[index].acquire()
        try:
            if not self.failure:
                function(*arguments)
                pending = [event.kind for event in self.events if event.owner == index and event.kind != "load"]
                _check(not pending, f"a partition ends before its {', '.join(pending)}")
        except _Stopped:
            pass
        except Exception as error:
            self.failure = error
        self.waiting[index] = None
        self.back.release()

    def start(self, event: Event) -> None:
        self.events.append(event)
        self.pause()

    # ------------------------------------------------ what kernels call

    def allocate(self, dtype, shape, layout) -> Shared:
        if layout == "barriers":
            return Shared(self, np.frompyfunc(lambda _: Barrier(), 1, 1)(np.empty(shape)))
        return Shared(self, np.full(shape, np.nan, dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count
        self.unfenced.append((self.current, barrier))

    def fence(self) -> None:
        self.pause()
        self.unfenced = [(owner, what) for owner, what in self.unfenced if owner != self.current]

    def wait(self, barrier: Barrier, phase) -> None:
        _check(barrier.count > 0, "a barrier is used before it is initialised")
        self.pause(lambda: barrier.phase & 1 != phase, f"waits for a barrier's phase {phase}, it has {barrier.phase}")

    def arrive(self, barrier: Barrier) -> None:
        self.pause()
        barrier.change(1, 0)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        self.pause()
        barrier.change(0, nbytes)
        barrier.change(1, 0)

    def load_tile(self, descriptor: Descriptor, corner, barrier: Barrier, tile: Shared) -> None:
        _check(tile.array.shape == descriptor.block and tile.dtype == descriptor.dtype, "a tile of another shape")
        tile.array[...] = np.nan

        def end() -> None:
            part, place = descriptor.part(corner)
            tile.array[...] = 0
            tile.array[place] = part
            barrier.change(0, -descriptor.block_type.nbytes)

        self.start(Event(self.current, "load", end))

    def store_tile(self, descriptor: Descriptor, corner, tile: Shared) -> None:
        unfenced = any(np.may_share_memory(what, tile.array) for _, what in self.unfenced)
        _check(not unfenced, "a copy out of what was stored without a fence")
        before = tile.contents()

        def end() -> None:
            _check(np.array_equal(tile.array, before), "a tile is overwritten before its copy has left")
            part, place = descriptor.part(corner)
            part[...] = before[place]

        self.start(Event(self.current, "store", end))

    def store_wait(self, pendings: int) -> None:
        mine = self.current
        self.pause(lambda: sum(e.kind == "store" and e.owner == mine for e in self.events) <= pendings, "store_wait")

    def multiply(self, a: Tensor, b: Shared, acc, is_async: bool) -> Product:
        _check(is_async, "products are asynchronous here")
        _check(a.dtype == b.dtype, "operands of two dtypes")
        product = Product(self, a, b, acc)
        self.products.setdefault(self.current, []).append(product)
        self.start(product)
        return product

    def multiply_wait(self, outstanding: int, deps) -> Any:
        products = self.products.get(self.current, [])
        ending = products[: max(0, len(products) - outstanding)]
        del products[: len(ending)]
        for product in ending:
            _check(any(dep is product.a for dep in deps), "a product's registers are not among the deps of its wait")
        self.pause(lambda: all(product.done for product in ending), "warpgroup_mma_wait")
        found = tuple(dep.value if any(dep is product for product in ending) else dep for dep in deps)
        return found[0] if len(found) == 1 else found

    def load(self, pointer: Pointer, mask=True, other=0.0) -> Tensor:
        self.pause()
        offsets, mask = np.broadcast_arrays(pointer.offsets, mask)
        _check(((offsets >= 0) & (offsets < pointer.array.size) | ~mask).all(), "a pointer leaves its array")
        return _tensor(np.where(mask, pointer.array[np.where(mask, offsets, 0)], other).astype(pointer.array.dtype))


class Simulation:
    """The kernels of a module's source file.

    Args:
        path: the file.
        changes: (old, new) text to replace, each old one once: a fault to be found.
    """

    def __init__(self, path: Path, *changes: tuple[str, str]) -> None:
        source = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)
        self.run: Any = None
        names = {"__builtins__": {**vars(builtins), "__import__": self._import}, "__name__": path.stem}
        exec(compile(source, str(path), "exec"), names)
        self.names = names

    def launch(self, kernel: str, programs: int, seed: int, **arguments) -> None:
        """Runs the programs of a kernel, one after another."""
        for program in range(programs):
            self.run = _Run(program, programs, seed)
            self.names[kernel](**arguments)

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        return (
            self._triton() if name.startswith("triton") else builtins.__import__(name, globals, locals, fromlist, level)
        )

    def _triton(self) -> SimpleNamespace:
        """What kernels use of Gluon, all in one place."""

        def call(name: str) -> Callable:
            return lambda *args, **kwargs: getattr(self.run, name)(*args, **kwargs)

        layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout")
        language = SimpleNamespace(
            constexpr=lambda value: value, static_range=range, float32=np.dtype("float32"), int64=np.dtype("int64"),
            program_id=lambda axis: self.run.program, num_programs=lambda axis: self.run.programs,
            arange=lambda start, end, layout: _tensor(np.arange(start, end)), expand_dims=np.expand_dims,
            zeros=lambda shape, dtype, layout: _tensor(np.zeros(shape, dtype)), load=call("load"),
            allocate_shared_memory=call("allocate"), warp_specialize=call("specialize"),
            **dict.fromkeys(layouts, lambda *args: None),
        )  # fmt: skip
        barrier = {name: call(name) for name in ("init", "expect", "wait", "arrive")}
        copies = {"async_load": "load_tile", "async_store": "store_tile", "store_wait": "store_wait"}
        return SimpleNamespace(
            gluon=SimpleNamespace(jit=lambda function: function), language=language,
            mbarrier=SimpleNamespace(MBarrierLayout=lambda: "barriers", **barrier),
            tma=SimpleNamespace(**{name: call(method) for name, method in copies.items()}),
            fence_async_shared=call("fence"), warpgroup_mma=call("multiply"), warpgroup_mma_wait=call("multiply_wait"),
        )  # fmt: skip
