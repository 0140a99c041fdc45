"""``AdapterBank``: a backbone that runs every sample of a batch with the adapter of its own task."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlrr_kernels.adapt.config import RLRRConfig
from rlrr_kernels.adapt.folder.save_load import save_adapter
from rlrr_kernels.adapt.model import adapter_parameters, check_not_distributed, is_adapted
from rlrr_kernels.adapt.modules import find_module, named_modules, named_tensors, replace_submodules, unwrap
from rlrr_kernels.bank.source import Adapter, AdapterState, Backbone, Layout
from rlrr_kernels.nn.multi.batch import ActiveBatch, Form, TaskBatch, TaskTensors
from rlrr_kernels.nn.multi.modules import Multi, multi_module

PAUSES = (0.05, 0.2)
"""Seconds before an evicted adapter that could not be read is read once more, and again."""


class UnknownAdapterError(LookupError):
    """A bank has no adapter called ``name``; the message names the nearest of those that are ``present``."""

    def __init__(self, name: str, present: Collection[str]) -> None:
        super().__init__(name, tuple(present))

    def __str__(self) -> str:
        """Made when it is asked for: to compare thousands of names takes longer than a batch may wait for the bank."""
        name, present = self.args
        near = difflib.get_close_matches(str(name), present, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; it has {len(present)} adapters"
        return f"the bank has no adapter {name!r}{hint}"


@dataclasses.dataclass(frozen=True)
class BankedAdapter:
    """What a bank knows of one of its adapters.

    Attributes:
        name: its name in the bank.
        config: how the backbone is adapted for it.
        metadata: of its folder, or as given.
        classes: outputs of its head; None where it has no head of its own.
        folder: where it is read from again, or None.
        nbytes: of its tensors in memory; 0 while they are not there.
        trainable: whether :meth:`AdapterBank.trainable` was asked for it.
    """

    name: str
    config: RLRRConfig
    metadata: Mapping[str, Any]
    classes: int | None
    folder: Path | None
    nbytes: int
    trainable: bool


@dataclasses.dataclass(frozen=True, eq=False)
class HeldAdapter:
    """One version of an adapter with its tensors, which are kept while this is: what a bank takes in place of a name.

    Attributes:
        info: what the bank knew of it.
        task: its tensors.
    """

    info: BankedAdapter
    task: TaskTensors


class _Entry:
    """One version of an adapter: another one of the same name is another entry."""

    def __init__(
        self,
        adapter: Adapter,
        task: TaskTensors | None,
        folder: Path | None = None,
        recipe: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.adapter, self.task, self.folder, self.recipe, self.model = adapter, task, folder, recipe, model
        self.nbytes = 0 if task is None else task.nbytes
        self.loading = threading.Lock()

    @property
    def evictable(self) -> bool:
        return self.folder is not None and self.model is None


class AdapterBank:
    """Many adapters over one frozen backbone; samples of different tasks share a batch.

    Every adapter is checked against the backbone when it is added, as :func:`rlrr_kernels.load_adapter` checks it.
    Samples are sorted by task once, at the entry of the model; the frozen products of one form of adapters (the same
    rank, groups, layers, ...) are one call of :func:`rlrr_kernels.rlrr_linear_multi` over all of them. Heads may have
    different numbers of classes. Without a batch of tasks, ``model`` computes what it computed before.

    Adapters can be added, swapped and removed by one thread while others run batches: a batch takes all its adapters
    in one moment and keeps them until it ends.

    Args:
        model: the plain backbone, with a head; on the device and in the mode (``eval()``) in which it is to run. Its
            layers are replaced, as far as adapters need it, by modules with the same parameters and state-dict names.
            All parameters are frozen. The batch must be the first dimension of its inputs and of those of its layers.
        memory_budget: bytes that the adapters' tensors may take; the least recently used ones that lie in folders are
            evicted, and read again when they are asked for. A batch keeps what it uses beyond that. None: no limit.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is adapted already, wrapped by DDP or FSDP, or the budget is negative.
    """

    def __init__(self, model: nn.Module, *, memory_budget: int | None = None) -> None:
        plain = unwrap(model)
        check_not_distributed(model)
        if is_adapted(model):
            raise ValueError("model is adapted already; a bank takes the plain backbone: merge_adapter(model) first")
        if any(isinstance(module, Multi) for module in plain.modules()):
            raise ValueError("model belongs to a bank already")
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget must be a number of bytes of at least 0; got {memory_budget}")
        self.model, self.memory_budget = model, memory_budget
        self._backbone = Backbone(plain)
        self._active = ActiveBatch()
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[_Entry, None] = OrderedDict()  # those in memory, the least recently used first
        self._nbytes = 0
        self._ready: set[Form] = set()  # for whose adapters the modules are replaced
        plain.register_forward_pre_hook(_Enter(self._active), with_kwargs=True)
        plain.register_forward_hook(_Leave(self._active))

    # ------------------------------------------------------------ what is in it

    def add(
        self,
        name: str,
        source: str | os.PathLike[str] | AdapterState,
        *,
        recipe: str | None = None,
        load: bool = True,
    ) -> BankedAdapter:
        """Adds an adapter.

        Args:
            name: any text that is not empty.
            source: a folder written by :func:`rlrr_kernels.save_adapter` or ``rlrr finetune``, or by PEFT; or an
                :class:`AdapterState`, which is copied and never evicted.
            recipe: of a PEFT folder, see :func:`rlrr_kernels.peft.load_peft`.
            load: ``False`` reads only what one of our folders says about its adapter, and its tensors at its first use.

        Returns:
            What the bank knows of it.

        Raises:
            ValueError: there is one of that name; the adapter does not fit the backbone (all that is wrong is named);
                or the budget is too small for it.
            FileNotFoundError, ValueError, ImportError: as for :func:`rlrr_kernels.load_adapter`.
        """
        return self._install(name, source, recipe, load, replace=False)

    def examine(self, source: str | os.PathLike[str] | AdapterState, *, recipe: str | None = None) -> BankedAdapter:
        """What the bank would know of an adapter, whose name is empty here, if :meth:`add` took it; nothing is added.

        Of one of our folders only what it says about its adapter is read, as with ``load=False``.

        Raises:
            FileNotFoundError, ValueError, ImportError: as for :meth:`add`.
        """
        adapter, task = self._backbone.read(source, recipe, False)
        return _describe("", _Entry(adapter, task, None if isinstance(source, AdapterState) else Path(source)))

    def swap(
        self, name: str, source: str | os.PathLike[str] | AdapterState, *, recipe: str | None = None, load: bool = True
    ) -> BankedAdapter:
        """Replaces an adapter, in one step: batches that run end with the old one, later ones take the new one.

        Raises:
            UnknownAdapterError: there is none of that name.
            FileNotFoundError, ValueError, ImportError: as for :meth:`add`; the old one stays.
        """
        self.info(name)
        return self._install(name, source, recipe, load, replace=True)

    def remove(self, name: str) -> None:
        """Takes an adapter out; batches that run end with it.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            self._forget(self._entry(name))
            del self._entries[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        with self._lock:
            return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters' tensors that are in memory, without those that running batches alone still keep."""
        return self._nbytes

    def info(self, name: str) -> BankedAdapter:
        """What the bank knows of an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            return _describe(name, self._entry(name))

    def hold(self, name: str) -> HeldAdapter:
        """An adapter as it is now, read again if it was evicted; swapping or removing the name does not change it.

        Raises:
            UnknownAdapterError, FileNotFoundError, ValueError: as for :meth:`tasks`.
        """
        return self._take([name])[name]

    def __repr__(self) -> str:
        budget = "" if self.memory_budget is None else f" of {self.memory_budget / 1e6:.1f}"
        return (
            f"AdapterBank({type(unwrap(self.model)).__name__}, {len(self)} adapters, {len(self._recent)} of them in "
            f"memory: {self.nbytes / 1e6:.1f}{budget} MB)"
        )

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownAdapterError(name, self._entries)
        return entry

    def _install(
        self,
        name: str,
        source: str | os.PathLike[str] | AdapterState,
        recipe: str | None,
        load: bool,
        replace: bool,
    ) -> BankedAdapter:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a text that is not empty; got {name!r}")
        if not replace and name in self:
            raise ValueError(f"the bank has an adapter {name!r} already; swap() replaces it")
        adapter, task = self._backbone.read(source, recipe, load)  # files are read before anything is locked
        folder = None if isinstance(source, AdapterState) else Path(source)
        entry = _Entry(adapter, task, folder, recipe)
        self._put(name, entry, replace)
        return _describe(name, entry)

    def _put(self, name: str, entry: _Entry, replace: bool) -> None:
        with self._lock:
            old = self._entries.get(name)
            if (old is not None) != replace:
                raise ValueError(f"the adapter {name!r} was {'removed' if replace else 'added'} by another thread")
            if entry.task is not None and not self._keep(entry, instead_of=old):
                raise ValueError(
                    f"memory_budget = {self.memory_budget} bytes is too small for the adapter {name!r} of "
                    f"{entry.nbytes} bytes beside what cannot be evicted"
                )
            self._replace_modules(self._backbone.layout(entry.adapter.config))
            if old is not None:
                self._forget(old)
            self._entries[name] = entry

    def _replace_modules(self, layout: Layout) -> None:
        if layout.form in self._ready:
            return
        plain = unwrap(self.model)
        present, needed = dict(named_modules(plain)), layout.form.modules
        missing = [name for name in present if name in needed and not isinstance(present[name], Multi)]
        for name in layout.plan.patched:
            attention: Any = present[name.rpartition(".")[0]]
            attention.qkv_bias_separate = True
        if missing:
            replace_submodules(plain, missing, lambda name, module: multi_module(module, name, self._active))
        self._ready.add(layout.form)

    # ------------------------------------------------------------ memory

    def _keep(self, entry: _Entry, instead_of: _Entry | None = None) -> bool:
        """Counts ``entry`` as in memory, evicting others for it; ``False`` where the budget has no room for it."""
        room = self.memory_budget
        if room is not None:
            freed = instead_of.nbytes if instead_of is not None and instead_of in self._recent else 0
            others = [e for e in self._recent if e.evictable and e is not instead_of]
            if self._nbytes - freed - sum(e.nbytes for e in others) + entry.nbytes > room:
                return False
            for other in others:
                if self._nbytes - freed + entry.nbytes <= room:
                    break
                self._forget(other)
        assert entry.task is not None
        self._recent[entry] = None
        self._nbytes += entry.nbytes
        return True

    def _forget(self, entry: _Entry) -> None:
        """Drops the tensors of ``entry``; a batch that runs keeps them until it ends."""
        if entry in self._recent:
            del self._recent[entry]
            self._nbytes -= entry.nbytes
        if entry.evictable:
            entry.task = None

    def _take(self, names: Sequence[str | HeldAdapter | None]) -> dict[str, HeldAdapter]:
        """The adapters called ``names``, as they all are in one moment."""
        wanted = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        read: dict[_Entry, tuple[Adapter, TaskTensors]] = {}
        while True:
            with self._lock:
                entries = {name: self._entry(name) for name in wanted}
                missing = [e for e in entries.values() if e.task is None and e not in read]
                if not missing:
                    for entry in entries.values():
                        if entry in self._recent:
                            self._recent.move_to_end(entry)
                    return {name: _held(name, entry, read.get(entry)) for name, entry in entries.items()}
            for entry in missing:
                read[entry] = self._load(entry)

    def _load(self, entry: _Entry) -> tuple[Adapter, TaskTensors]:
        with entry.loading:
            with self._lock:
                if entry.task is not None:
                    return entry.adapter, entry.task
            adapter, task = self._read_again(entry)
            with self._lock:
                self._replace_modules(self._backbone.layout(adapter.config))
                entry.adapter, entry.nbytes = adapter, task.nbytes
                if any(entry is present for present in self._entries.values()):
                    entry.task = task
                    if not self._keep(entry):
                        entry.task = None
            return adapter, task

    def _read_again(self, entry: _Entry) -> tuple[Adapter, TaskTensors]:
        """What the folder of an evicted adapter holds; its files may be replaced, one after another, right now."""
        assert entry.folder is not None
        for seconds in (*PAUSES, None):
            try:
                adapter, task = self._backbone.read(entry.folder, entry.recipe)
                break
            except (OSError, ValueError):
                if seconds is None:
                    raise
                time.sleep(seconds)
        assert task is not None
        return adapter, task

    # ------------------------------------------------------------ running

    @contextlib.contextmanager
    def tasks(self, names: Sequence[str | HeldAdapter | None]) -> Iterator[TaskBatch]:
        """Within, this thread's calls of ``bank.model`` take samples of these tasks.

        ``bank.model(x)`` then gives what the model gives, for all samples: where heads have different numbers of
        classes, logits [S, C] with the largest C, and -inf where a task has fewer. The backward of a checkpointed model
        computes its forward again: it must be inside, too.

        Args:
            names: the adapter of each of the S samples, by name or as :meth:`hold` gave it; None: the bare backbone,
                with the head of ``model``.

        Raises:
            UnknownAdapterError: a name is not in the bank; the nearest that are are named.
            FileNotFoundError, ValueError: an evicted adapter cannot be read again, see :meth:`add`.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of names, one a sample; got the text {names!r}")
        taken = self._take(names)
        held = [taken[name] if isinstance(name, str) else name for name in names]
        batch = TaskBatch([None if adapter is None else adapter.task for adapter in held])
        with self._active.running(batch):
            yield batch

    def __call__(self, x: Tensor, names: Sequence[str | HeldAdapter | None]) -> list[Tensor]:
        """The logits of each sample under its own adapter.

        Args:
            x: [S, ...] input of the model.
            names: the adapter of each of the S samples, as for :meth:`tasks`.

        Returns:
            For each sample its logits [C], C being the number of classes of its adapter's head, in the order of x.

        Raises:
            ValueError: there are not S names.
            UnknownAdapterError, FileNotFoundError, ValueError: as for :meth:`tasks`.
            TypeError: the model returns something else than logits [S, C], in a tensor or as ``.logits``.
        """
        if len(names) != x.shape[0]:
            raise ValueError(f"names must name the adapter of each of the {x.shape[0]} samples; got {len(names)} names")
        with self.tasks(names) as batch:
            outputs = self.model(x)
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise TypeError(
                f"the model must return logits [S, C]; got {type(outputs).__name__}"
                + (f" {list(logits.shape)}" if isinstance(logits, Tensor) else "")
                + "; call bank.model within `with bank.tasks(names):` for other outputs"
            )
        widths = batch.widths or [logits.shape[1]] * batch.samples
        return [row[:width] for row, width in zip(logits, widths, strict=True)]

    # ------------------------------------------------------------ training

    def trainable(self, name: str, config: RLRRConfig | None = None, *, classes: int | None = None) -> nn.Module:
        """An adapted model of one task, whose trained parameters the bank's batches use.

        It has the backbone's frozen parameters themselves and trained ones of its own, and is what
        :func:`rlrr_kernels.adapt_model` makes: ``parameter_groups(model, ...)``, ``save_adapter(model, ...)`` or
        ``model(x)`` work as on any. Mixed batches (:meth:`tasks`, or calling the bank) stack the parameters of their
        tasks at each forward, so that a loss's gradients reach each task's own parameters, each exactly. It stays in
        memory until :meth:`freeze`.

        Args:
            name: of an adapter in the bank; or of a new one, for which ``config`` is given.
            config: of a new adapter, drawn as ``adapt_model`` draws it.
            classes: of a new adapter's head; None: as many as the backbone's.

        Raises:
            UnknownAdapterError: there is none of that name and no ``config``.
            ValueError: there is one, and a ``config``; another thread swaps or removes it meanwhile; or as for
                :func:`rlrr_kernels.adapt_model`.
        """
        metadata: dict[str, Any] = {}
        if config is not None:
            if name in self:
                raise ValueError(f"the bank has an adapter {name!r} already; trainable(name) trains it on")
            entry, model = None, self._backbone.adapted(config, None, classes)
        else:
            with self._lock:
                entry = self._entry(name)
                if entry.model is not None:
                    return entry.model
            held = self.hold(name)
            config, metadata = held.info.config, dict(held.info.metadata)
            model = self._backbone.adapted(config, _named(held.task))
        form = self._backbone.layout(config).form
        task = TaskTensors(form, _Trained(model), {head: find_module(model, head) for head in form.heads})
        shapes = {key: tuple(tensor.shape) for key, tensor in _named(task).items()}
        adapter = Adapter(config, metadata, self._backbone.classes(config, shapes))
        with self._lock:
            now = self._entries.get(name)
            if now is not entry:
                if entry is not None and now is not None and now.model is not None:
                    return now.model
                raise ValueError(f"the adapter {name!r} was added, swapped or removed by another thread")
            self._put(name, _Entry(adapter, task, model=model), replace=entry is not None)
        return model

    def freeze(self, name: str) -> BankedAdapter:
        """Ends the training of an adapter: later batches use the values that its parameters have now.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.model is not None:
                assert entry.task is not None
                state = AdapterState(entry.adapter.config, _named(entry.task), entry.adapter.metadata)
                self._install(name, state, None, load=True, replace=True)
            return self.info(name)

    def save(self, name: str, folder: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
        """Writes an adapter as :func:`rlrr_kernels.save_adapter` writes it.

        Args:
            name: of the adapter.
            folder: as for ``save_adapter``.
            metadata: as for ``save_adapter``; None: what :meth:`info` says.

        Raises:
            UnknownAdapterError: there is none of that name.
            ValueError, TypeError, OSError, ImportError: as for ``save_adapter``.
        """
        with self._lock:
            entry = self._entry(name)
            model, own = entry.model, entry.adapter.metadata
        if model is None:
            held = self.hold(name)
            model, own = self._backbone.adapted(held.info.config, _named(held.task)), held.info.metadata
        return save_adapter(model, folder, metadata=own if metadata is None else metadata)


class _Trained(Mapping[str, Tensor]):
    """A model's vectors by name, as they are now: ``load_state_dict(assign=True)`` puts others in their place."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(named_modules(model))
        places = [(name, *name.rpartition(".")[::2]) for name in adapter_parameters(model)]
        self._places = {name: (modules[module], key) for name, module, key in places}

    def __getitem__(self, name: str) -> Tensor:
        module, key = self._places[name]
        tensor: Tensor = getattr(module, key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _describe(name: str, entry: _Entry, adapter: Adapter | None = None) -> BankedAdapter:
    adapter = adapter or entry.adapter
    return BankedAdapter(
        name=name,
        config=adapter.config,
        metadata=adapter.metadata,
        classes=adapter.classes,
        folder=entry.folder,
        nbytes=0 if entry.task is None else entry.nbytes,
        trainable=entry.model is not None,
    )


def _held(name: str, entry: _Entry, read: tuple[Adapter, TaskTensors] | None) -> HeldAdapter:
    """What is in memory, else what was ``read``: the folder may hold another version since, which others have read."""
    adapter, task = (entry.adapter, entry.task) if read is None or entry.task is not None else read
    assert task is not None
    return HeldAdapter(_describe(name, entry, adapter), task)


def _named(task: TaskTensors) -> dict[str, Tensor]:
    """The tensors of ``task`` as an adapter folder names them."""
    named = task.named_vectors()
    for head, module in task.heads.items():
        named |= dict(named_tensors(module, head))
    return named


class _Enter:
    """A hook before the model that sorts the samples of its inputs."""

    def __init__(self, active: ActiveBatch) -> None:
        self.active = active

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        batch = self.active.batch
        return None if batch is None else batch.enter((args, kwargs))


class _Leave(_Enter):
    """A hook after the model that puts the samples of its outputs back."""

    def __call__(self, model: nn.Module, args: Any, outputs: Any) -> Any:
        batch = self.active.batch
        return None if batch is None else batch.leave(outputs)
