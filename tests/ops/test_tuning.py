"""The tuner and the user's file of tiles, with a timer that is told the times: no GPU is needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.matmul_precision import TF32_SWITCHES
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.host import cache, launch
from rlrr_kernels.ops.tuning import path as path_tuning
from rlrr_kernels.ops.tuning import tiles as tuning

pytestmark = pytest.mark.interpreted

CPU = torch.device("cpu")
FASTER = Tiles(16, 16, 32, 4, 1)

needs_interpreter = pytest.mark.skipif(not backends.INTERPRETING, reason="runs the kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.delenv(store.SWITCH_VARIABLE, raising=False)
    store.forget()
    yield tmp_path
    store.forget()


def chosen(kernel="forward", rows=8, dtype=torch.float32, rank=1, stride=64) -> Tiles:
    x, weight = torch.empty_strided((rows, 64), (stride, 1), dtype=dtype), torch.empty(64, 64, dtype=dtype)
    return store.choose_tiles(kernel, devices.gpu_of(CPU), matmul_precision(), x, weight, dtype, rank)


def keep(tiles: Tiles = FASTER, kernel: str = "forward", precision: str = "float32") -> None:
    name = store.entry_name("interpreter", kernel, precision, 0)
    store.write(store.cache_file(), {name: tiles._asdict() | {"us": 1.0, "shipped_us": 2.0}})


def timer(times: dict[Tiles, float], default: float = 10.0):
    """Tells the time of a call by the tiles that it launches."""

    def microseconds(call) -> float:
        call()
        return times.get(launched(call), default)

    return microseconds


def launched(call) -> Tiles:
    meta = call.__defaults__[0][0].plan.meta
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return Tiles(*(meta[name] for name in names))


# ---------------------------------------------------------------- the file


def test_tiles_in_the_file_are_used_for_what_they_were_measured_for():
    shipped = chosen()
    keep()
    assert chosen() == FASTER
    assert chosen(rows=5000) == FASTER  # the interpreter's table has one class
    for other in ({"kernel": "grad_x"}, {"dtype": torch.float16}, {"rank": 2}, {"stride": 67}):
        assert chosen(**other) == shipped, other
    with TF32_SWITCHES["new, of cuBLAS"]():
        assert chosen() == shipped


def test_another_gpu_and_another_triton_are_not_served(monkeypatch: pytest.MonkeyPatch):
    keep()
    monkeypatch.setattr(store, "gpu_name", lambda device: "another GPU")
    store.forget()
    assert chosen() != FASTER
    monkeypatch.undo()
    monkeypatch.setattr(store.triton, "__version__", "3.0.0")
    store.forget()
    assert chosen() != FASTER


def test_the_off_switch(monkeypatch: pytest.MonkeyPatch):
    keep()
    monkeypatch.setenv(store.SWITCH_VARIABLE, "off")
    store.forget()
    assert chosen() != FASTER
    monkeypatch.setenv(store.SWITCH_VARIABLE, "sometimes")
    store.forget()
    with pytest.raises(ValueError, match="RLRR_TUNING must be on or off; got 'sometimes'"):
        chosen()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 99, "entries": {}}',
        '{"format": 1, "entries": {"a": {"block_m": 16}}}',
        json.dumps({"format": 1, "entries": {"a": FASTER._replace(block_m=17)._asdict()}}),
        json.dumps({"format": 1, "entries": {"a": FASTER._replace(block_m="16")._asdict()}}),
        json.dumps({"format": 1, "entries": {"a": FASTER._replace(warps=0)._asdict()}}),
    ],
)
def test_a_damaged_file_is_named_and_ignored_and_replaced(folder: Path, content: str):
    shipped = chosen()
    path = folder / "tiles.json"
    path.write_text(content)
    store.forget()
    with pytest.warns(UserWarning, match=r"tuned tiles are ignored: .*tiles\.json (is damaged|has format 99)"):
        assert chosen() == shipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(rows=9) == shipped, "the file is read once"
    with pytest.warns(UserWarning, match="it is replaced"):
        keep()
    assert chosen() == FASTER


def test_writing_keeps_other_entries_and_removes_what_is_none(folder: Path):
    keep()
    keep(kernel="grad_x")
    path = store.cache_file()
    assert len(store.read(path)) == 2
    store.write(path, {store.entry_name("interpreter", "forward", "float32", 0): None})
    assert len(store.read(path)) == 1
    assert chosen() != FASTER
    assert chosen("grad_x") == FASTER
    assert [file.name for file in folder.iterdir()] == ["tiles.json"]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert store.cache_file() == tmp_path / "tiles.json"
    monkeypatch.delenv(cache.DIRECTORY_VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert store.cache_file() == Path("/somewhere/rlrr_kernels/tiles.json")


def test_tiles_whose_schedule_no_gpu_has_proven_serve_when_asked_for_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a process that only finds the file they must not serve."""
    monkeypatch.setattr(store, "gpu_name", lambda device: "this GPU")

    def schedule(gpu: str, rows: int = 1023) -> str:
        x, y = (torch.empty(rows, width, dtype=torch.bfloat16) for width in (64, 128))
        return store.choose_tiles("grad_scales", devices.typical(gpu), "ieee", x, y, torch.bfloat16, 1).schedule

    name = store.entry_name("this GPU", "grad_scales", "bfloat16", 0)
    entry = Tiles(64, 128, 128, 8, 4, schedule="persistent")._asdict()
    store.write(store.cache_file(), {name: entry})
    assert [schedule(gpu) for gpu in ("sm_90", "sm_100")] == ["persistent", "tiled"]
    entries = store.read(store.cache_file())
    assert store.unproven(entries, devices.typical("sm_100")) == [name]
    assert store.unproven(entries, devices.typical("sm_90")) == []
    monkeypatch.setenv(store.EXPERIMENTAL_VARIABLE, "on")
    store.forget()
    assert schedule("sm_100") == "persistent"
    assert (schedule("sm_100", 255), schedule("sm_100", 256)) == ("tiled", "persistent"), "TMA_MIN_ROWS"
    monkeypatch.setenv(store.EXPERIMENTAL_VARIABLE, "maybe")
    store.forget()
    with pytest.raises(ValueError, match="RLRR_EXPERIMENTAL must be on or off; got 'maybe'"):
        schedule("sm_100")


@needs_interpreter
def test_tiles_of_a_schedule_that_is_gone_serve_nothing_and_spoil_nothing(folder: Path):
    keep()
    content = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
    gone = store.entry_name("interpreter", "grad_x", "float32", 0)
    content["entries"][gone] = Tiles(256, 128, 64, 4, 3, schedule="gluon")._asdict()
    (folder / "tiles.json").write_text(json.dumps(content), encoding="utf-8")
    store.forget()
    assert (chosen(), chosen("grad_x").schedule) == (FASTER, "tiled")
    assert gone not in store.read(folder / "tiles.json")


def test_forcing_tiles_ends_with_the_block():
    before = chosen()
    with store.only_tiles("forward", FASTER):
        assert chosen() == FASTER
        assert chosen("grad_x") == before
    assert chosen() == before


# ---------------------------------------------------------------- the tuner


@needs_interpreter
def test_the_fastest_is_kept_and_used(folder: Path):
    options = {"dtype": torch.float32, "device": "cpu", "kernels": ["forward"]}
    seen = []
    (result,) = tuning.tune([(32, 64)], [5], timer=timer({FASTER: 4.0}), report=seen.append, **options)
    assert seen == [result]
    assert (result.tiles, result.kept, result.rejected) == (FASTER, True, {})
    assert (round(result.us, 6), round(result.shipped_us, 6)) == (4.0, 10.0)
    assert chosen() == FASTER
    (result,) = tuning.tune([(32, 64)], [5], timer=timer({FASTER: 9.9}), **options)
    assert not result.kept
    assert chosen() != FASTER, "a gain of noise is not kept, and what was kept before goes"
    assert store.read(folder / "tiles.json") == {}


@needs_interpreter
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_what_is_inexact_or_does_not_run_is_never_chosen(kernel: str, monkeypatch: pytest.MonkeyPatch):
    wrong, broken = Tiles(16, 16, 16, 4, 1), Tiles(32, 16, 16, 4, 1)
    monkeypatch.setattr(tuning, "INTERPRETED_CANDIDATES", [wrong, broken])
    run = launch.Launch.run

    def run_wrongly(launch) -> None:
        meta = launch.plan.meta
        if meta.get("BLOCK_M") == 32:
            raise RuntimeError("out of resource")
        run(launch)
        if meta.get("BLOCK_N") == 16:
            launch.tensors[-1].mul_(1.01)

    monkeypatch.setattr(launch.Launch, "run", run_wrongly)
    options = {"dtype": torch.float32, "device": "cpu", "kernels": [kernel]}
    (result,) = tuning.tune([(32, 64)], [5], timer=timer({wrong: 1.0, broken: 1.0}), **options)
    assert result.tiles == result.shipped
    assert not result.kept
    assert "unit roundoffs of the bound" in result.rejected[wrong]
    assert result.rejected[broken] == "RuntimeError: out of resource"


def test_candidates_that_spill_or_do_not_fit_are_rejected_before_they_are_timed(monkeypatch: pytest.MonkeyPatch):
    tensors = tuning.draw(tuning.numerics.Case(8, 32, 64))
    huge = Tiles(128, 512, 512, 8, 8)
    assert "KiB of shared memory" in tuning.rejection("forward", tensors, devices.typical("sm_90"), huge)

    class Compiled:
        n_spills = 12

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: Compiled

    plan = launch.Plan(Kernel(), (1,), (), {})
    monkeypatch.setattr(tuning, "launches_of", lambda *args: [launch.Launch(plan, (tensors["x"],))])
    assert tuning.rejection("forward", tensors, devices.typical("sm_90"), FASTER) == "spills 12 registers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be .* got torch.int8"),
        ({"shapes": []}, "shapes must be pairs"),
        ({"shapes": [(0, 4)]}, "shapes must be pairs"),
        ({"rows": [0]}, "rows must be positive"),
        ({"kernels": ["backward"]}, "kernels must be of forward, grad_x, grad_scales; got"),
        ({"device": "meta"}, "device='meta' cannot be tuned"),
    ],
)
def test_wrong_arguments(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tuning.tune(**({"shapes": [(32, 64)], "rows": [5], "device": "cpu"} | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_program_says_so(folder: Path):
    pytest.importorskip("typer", reason="needs the extra [train]")
    command = [sys.executable, "-m", "rlrr_kernels.cli", "tune"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "there is no CUDA GPU here" in result.stdout + result.stderr
    assert not list(folder.iterdir())


def test_schedules_that_no_gpu_has_proven_are_tried_when_asked_for_alone():
    for name, kernel in itertools.product(("sm_80", "sm_90", "sm_100", "sm_103"), configs.KERNELS):
        gpu = devices.typical(name)
        plain, asked = (tuning.candidates(kernel, gpu, torch.bfloat16, 4096, asked) for asked in (False, True))
        assert all(configs.proven(kernel, tiles.schedule, gpu) for tiles in plain)
        assert set(plain) <= set(asked)
        persistent = kernel == "grad_scales" and name != "sm_80"
        assert any(tiles.schedule == "persistent" for tiles in asked) == persistent


def test_the_arch_of_the_default_device_has_candidates():
    for kernel in configs.KERNELS:
        for rows in (8, 64, 1576):
            assert len(tuning.candidates(kernel, devices.typical("sm_90"), torch.bfloat16, rows)) > 3


# ---------------------------------------------------------------- the path


def path_timer(faster_from: int):
    """A merge takes 5 µs; one pass 1 µs below so many rows, else 9."""

    def microseconds(call) -> float:
        call()
        if call.keywords["path"] == "merge":
            return 5.0
        return 1.0 if call.args[0].shape[0] < faster_from else 9.0

    return microseconds


def path_of(rows: int, rank: int = 1, dtype: torch.dtype = torch.float32) -> str:
    gpu, shape = devices.gpu_of(CPU), torch.Size((32, 64))
    return store.path_choice(gpu, matmul_precision(), CPU, dtype, dtype, rows, shape, rank).path


@needs_interpreter
def test_the_measured_path_is_kept_and_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    rows, options = [8, 20, 40, 120], {"dtype": torch.float32, "device": "cpu"}
    assert (path_of(40), path_of(120)) == ("fused", "merge")  # the interpreter merges above 96 rows
    found = path_tuning.tune_path([(32, 64)], rows, timer=path_timer(30), **options)
    assert found.kept
    assert 20 / 96 < found.least_gain < 40 / 96
    assert round(found.us, 6) < round(found.shipped_us, 6)
    assert [path_of(count) for count in (20, 40, 120)] == ["fused", "merge", "merge"]
    assert path_of(40, dtype=torch.float16) == "fused", "it was measured for float32"
    assert chosen() == chosen(rows=9)  # the tiles stay
    monkeypatch.setenv(store.SWITCH_VARIABLE, "off")
    store.forget()
    assert path_of(40) == "fused"
    monkeypatch.delenv(store.SWITCH_VARIABLE)
    found = path_tuning.tune_path([(32, 64)], rows, timer=path_timer(100), **options)
    assert not found.kept, "the model's choice was as fast"
    assert path_of(40) == "fused"
    never = path_tuning.tune_path([(32, 64)], rows, timer=path_timer(10**9), **options)
    assert never.kept
    assert path_of(120) == "fused"
    assert path_of(121) == "merge", "what was not measured is the model's"
    assert path_tuning.tune_path([(32, 64)], rows, timer=path_timer(0), **options).least_gain < 8 / 96


@pytest.mark.parametrize("value", [0, -1, "much", None, float("inf")])
def test_a_least_gain_that_is_none_is_damage(folder: Path, value: object):
    name = store.path_entry_name("interpreter", "float32")
    (folder / "tiles.json").write_text(json.dumps({"format": 2, "entries": {name: {"least_gain": value}}}))
    store.forget()
    with pytest.warns(UserWarning, match="is damaged"):
        assert path_of(40) == "fused"


def test_wrong_arguments_of_the_path_are_named():
    for changes, message in (({"rows": [0]}, "rows must be"), ({"device": "meta"}, "cannot be tuned")):
        with pytest.raises(ValueError, match=message):
            path_tuning.tune_path(**({"shapes": [(32, 64)], "rows": [5], "device": "cpu"} | changes))
