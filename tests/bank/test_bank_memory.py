"""A bank's memory budget and eviction, and batches beside additions, swaps and removals in other threads."""

from __future__ import annotations

import random
import shutil
import threading

import pytest
import torch

from rlrr_kernels import AdapterBank, RLRRConfig, adapt_model, save_adapter
from rlrr_kernels.adapt.folder.save_load import trained_tensors
from rlrr_kernels.bank import AdapterState, UnknownAdapterError
from tests.support.tiny_models import disturb, tiny_model

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")


def marked(mark: int) -> torch.nn.Module:
    """A model whose logits all are ``mark``, whatever the image."""
    model = tiny_model("vit")
    adapt_model(model, RLRRConfig(recipe="paper"))
    torch.manual_seed(mark)
    disturb(model)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(mark)
    return model


def state(mark):
    return AdapterState(RLRRConfig(recipe="paper"), trained_tensors(marked(mark))[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(marked(mark), root / str(mark)) for mark in range(6)]


def resident(bank):
    return [name for name in bank.names if bank.info(name).nbytes]


def answers(bank, names):
    with torch.no_grad():
        return [row[0].item() for row in bank(torch.randn(len(names), 3, 32, 32), names)]


def test_the_least_recently_used_are_evicted_and_read_again(folders):
    size = AdapterBank(tiny_model("vit")).add("0", folders[0]).nbytes
    assert size == sum(t.nbytes for t in trained_tensors(marked(0))[0].values())
    bank = AdapterBank(tiny_model("vit"), memory_budget=3 * size + 1)
    for mark in range(4):
        bank.add(str(mark), folders[mark])
    assert (resident(bank), bank.nbytes) == (["1", "2", "3"], 3 * size)
    assert answers(bank, ["1"]) == [1]
    bank.add("4", folders[4])
    assert resident(bank) == ["1", "3", "4"]  # 2 was the one used longest ago
    assert answers(bank, ["0", "2", "0"]) == [0, 2, 0]
    assert (resident(bank), bank.nbytes) == (["0", "2", "4"], 3 * size)
    assert answers(bank, ["4", "3", "2", "1", "0"]) == [4, 3, 2, 1, 0]  # more than there is room for
    assert bank.nbytes <= 3 * size
    bank.remove("0")
    bank.swap("1", folders[5])
    assert answers(bank, ["1", "2"]) == [5, 2]


@pytest.mark.parametrize("whole_again", [True, False])
def test_an_evicted_adapter_whose_files_are_being_replaced_is_read_once_more(
    folders, tmp_path, monkeypatch, whole_again
):
    folder = shutil.copytree(folders[0], tmp_path / "0")
    size = AdapterBank(tiny_model("vit")).add("0", folder).nbytes
    bank = AdapterBank(tiny_model("vit"), memory_budget=size + 1)
    bank.add("0", folder)
    bank.add("1", folders[1])  # evicts the first
    tensors = folder / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])  # a copy that has not ended
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if whole_again and len(waited) == 2:
            shutil.copytree(folders[0], folder, dirs_exist_ok=True)

    monkeypatch.setattr("rlrr_kernels.bank.bank.time.sleep", sleep)
    if whole_again:
        assert answers(bank, ["0", "1"]) == [0, 1]
    else:
        with pytest.raises(ValueError, match=r"adapter\.safetensors"):
            answers(bank, ["0"])
    assert len(waited) == 2


@pytest.mark.parametrize("use", ["hold", "save", "trainable"])
def test_what_was_read_is_described_as_it_was_read(folders, tmp_path, monkeypatch, use):
    """While one thread reads an adapter for which there is no room, its folder changes and another reads it again."""
    other = tiny_model("vit")
    other.reset_classifier(7)
    adapt_model(other, RLRRConfig(rank=2))
    folder = shutil.copytree(folders[0], tmp_path / "0")
    bank = AdapterBank(tiny_model("vit"), memory_budget=0)
    bank.add("0", folder, load=False)
    load, read = AdapterBank._load, []

    def twice(bank, entry):
        found = load(bank, entry)
        if not read:
            read.append(entry)
            save_adapter(other, folder, metadata={"version": 2})
            bank.hold("0")
        return found

    monkeypatch.setattr(AdapterBank, "_load", twice)
    if use == "hold":
        held = bank.hold("0")
        assert (held.info.classes, held.info.config, held.info.metadata) == (5, RLRRConfig(recipe="paper"), {})
        assert bank(torch.randn(1, 3, 32, 32), [held])[0].tolist() == [0] * 5
    elif use == "save":
        bank.save("0", tmp_path / "saved")
        info = bank.examine(tmp_path / "saved")
        assert (info.classes, info.config, info.metadata) == (5, RLRRConfig(recipe="paper"), {})
    else:
        monkeypatch.setattr(bank, "memory_budget", None)
        assert bank.trainable("0")(torch.randn(1, 3, 32, 32)).tolist() == [[0] * 5]


def test_what_was_added_is_described_though_another_thread_removed_it_at_once(folders, monkeypatch):
    bank, put = AdapterBank(tiny_model("vit")), AdapterBank._put
    monkeypatch.setattr(AdapterBank, "_put", lambda *args: (put(*args), bank.remove("0")))
    assert bank.add("0", folders[0]).classes == 5
    assert not bank.names


@pytest.mark.parametrize("other", ["swap", "remove", "trainable"])
def test_an_adapter_that_another_thread_changes_while_it_is_made_trainable(folders, monkeypatch, other):
    bank, made = AdapterBank(tiny_model("vit")), []
    bank.add("0", folders[0])
    adapted = type(bank._backbone).adapted

    def meanwhile(*args):
        if not made:
            made.append(None)
            made[0] = {"swap": lambda: bank.swap("0", folders[1]), "remove": lambda: bank.remove("0")}.get(
                other, lambda: bank.trainable("0")
            )()
        return adapted(*args)

    monkeypatch.setattr(type(bank._backbone), "adapted", meanwhile)
    if other == "trainable":
        assert bank.trainable("0") is made[0]
    else:
        with pytest.raises(ValueError, match="by another thread"):
            bank.trainable("0")
        assert (answers(bank, ["0"]) if other == "swap" else list(bank.names)) == ([1] if other == "swap" else [])


def test_what_has_no_folder_is_never_evicted_and_must_fit(folders):
    size = AdapterBank(tiny_model("vit")).add("0", folders[0]).nbytes
    bank = AdapterBank(tiny_model("vit"), memory_budget=2 * size)
    bank.add("memory", state(1))
    bank.add("folder", folders[0])
    bank.add("memory too", state(2))
    assert resident(bank) == ["memory", "memory too"]
    for call in (lambda: bank.add("third", state(3)), lambda: bank.add("third", folders[3])):
        with pytest.raises(ValueError, match=f"memory_budget = {2 * size} bytes is too small for the adapter 'third'"):
            call()
    assert answers(bank, ["folder", "memory too", "memory"]) == [0, 2, 1]
    bank.swap("memory", state(4))  # in the place of the old one
    assert answers(bank, ["folder", "memory too", "memory"]) == [0, 2, 4]


def test_adding_without_loading_reads_at_first_use(folders, tmp_path):
    bank = AdapterBank(tiny_model("vit"))
    info = bank.add("later", folders[2], load=False)
    assert (info.nbytes, info.classes, info.config.recipe) == (0, 5, "paper")
    assert answers(bank, ["later"]) == [2]
    gone = shutil.copytree(folders[1], tmp_path / "gone")
    bank.add("gone", gone, load=False)
    shutil.rmtree(gone)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        answers(bank, ["gone", "later"])
    assert answers(bank, ["later"]) == [2]
    with torch.inference_mode():  # what is read within can still be trained on
        bank.add("for inference", folders[3])
    bank.trainable("for inference")(torch.randn(1, 3, 32, 32)).sum().backward()


def test_a_held_adapter_outlives_its_name(folders):
    bank = AdapterBank(tiny_model("vit"), memory_budget=1)
    bank.add("a", folders[1], load=False)
    held = bank.hold("a")
    assert (held.info.name, held.info.folder) == ("a", folders[1])
    bank.swap("a", folders[2], load=False)
    assert answers(bank, [held, "a", held, None])[:3] == [1, 2, 1]
    bank.remove("a")
    assert answers(bank, [held]) == [1]


@pytest.mark.parametrize("slots", [2, 100])
def test_threads_run_batches_while_adapters_come_and_go(folders, slots):
    """Every batch sees one version of each adapter, and nobody gets another's answer."""
    size = AdapterBank(tiny_model("vit")).add("0", folders[0]).nbytes
    bank = AdapterBank(tiny_model("vit"), memory_budget=slots * size)
    for mark in range(3):
        bank.add(str(mark), folders[mark])
    bank.add("swapped", folders[3])
    stop, failures, batches = threading.Event(), [], [0]

    def serve(seed):
        draw = random.Random(seed)
        try:
            while not stop.is_set():
                names = [draw.choice(["0", "1", "2", "swapped", "swapped", "comes"]) for _ in range(4)]
                try:
                    got = answers(bank, names)
                except UnknownAdapterError as error:
                    assert "'comes'" in str(error)  # noqa: PT017
                    continue
                wanted = {"0": {0}, "1": {1}, "2": {2}, "swapped": {3, 4}, "comes": {5}}
                assert all(mark in wanted[name] for name, mark in zip(names, got, strict=True)), (names, got)
                assert len({mark for name, mark in zip(names, got, strict=True) if name == "swapped"}) <= 1
                batches[0] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(15):
        bank.swap("swapped", folders[3 + turn % 2])
        bank.add("comes", folders[5], load=turn % 2 == 0)
        bank.remove("comes")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert batches[0]
    assert bank.nbytes == sum(bank.info(name).nbytes for name in bank.names) <= slots * size
