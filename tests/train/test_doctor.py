"""What ``rlrr doctor`` says of Triton's kernels on GPUs that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the program needs rich")
pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.host import guard, launch
from rlrr_kernels.train import doctor

T4, H100 = devices.typical("sm_75"), devices.typical("sm_90")._replace(multiprocessors=114)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Two GPUs, nothing known of any kernel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "gpu_of", lambda device: (T4, H100)[device.index])
    monkeypatch.setenv("RLRR_CACHE_DIR", str(tmp_path))
    for variable in (guard.VARIABLE, launch.LAUNCH_VARIABLE, store.EXPERIMENTAL_VARIABLE, store.SWITCH_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(launch, "direct", None)
    guard.forget()
    yield
    guard.forget()
    store.forget()


def states() -> dict[str, str]:
    what, state = doctor._kernels().columns
    return dict(zip(what.cells, state.cells, strict=True))


def test_gpus_and_why_auto_does_not_take_triton():
    found = states()
    assert "no matrix instructions for compute capability 7.5" in found["cuda:0"]
    assert found["cuda:1"] == "sm_90 with 114 multiprocessors, tiles of sm_90: auto takes them"


def test_the_c_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "/opt/cc")
    assert states()["C compiler"] == "/opt/cc"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert states()["C compiler"] == "none: Triton builds its launcher at first use; install gcc, or set CC"


def test_the_switches(monkeypatch: pytest.MonkeyPatch):
    found = states()
    assert found["launches (RLRR_LAUNCH)"].startswith("past Triton's launcher")
    assert found["check at first use (RLRR_CHECK)"].startswith("on; ")
    monkeypatch.setenv(launch.LAUNCH_VARIABLE, "triton")
    monkeypatch.setattr(launch, "direct", None)
    monkeypatch.setenv(guard.VARIABLE, "off")
    guard.forget()
    found = states()
    assert found["launches (RLRR_LAUNCH)"] == "by Triton's launcher, never replayed"
    assert found["check at first use (RLRR_CHECK)"].startswith("off; ")
    monkeypatch.setenv(guard.VARIABLE, "perhaps")
    guard.forget()
    assert states()["check at first use (RLRR_CHECK)"] == "environment RLRR_CHECK must be on or off; got 'perhaps'"


def test_verdicts(tmp_path: Path):
    guard._keep({"H100 | one": guard.RIGHT, "H100 | another": "y is 77 unit roundoffs of its bound from the formula"})
    first, wrong = states()["check at first use (RLRR_CHECK)"].splitlines()
    assert first == f"on; {tmp_path / 'checks.json'}: 1 kernels right, 1 left to the library"
    assert wrong == "H100 | another: y is 77 unit roundoffs of its bound from the formula"


def test_tuned_tiles_that_wait_to_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    name = store.entry_name("B200", "grad_scales", "bfloat16", 0)
    tiled = Tiles(128, 128, 64, 8, 3)
    store.write(store.cache_file(), {name: tiled._asdict()})
    assert states()["tuned tiles (RLRR_TUNING)"] == f"on; {store.cache_file()}: 1 entries"
    store.write(store.cache_file(), {name: tiled._replace(schedule="persistent")._asdict()})
    assert "used under RLRR_EXPERIMENTAL=on alone, as no GPU has proven" in states()["tuned tiles (RLRR_TUNING)"]
    assert states()["tuned tiles (RLRR_TUNING)"].endswith(name)
    monkeypatch.setenv(store.EXPERIMENTAL_VARIABLE, "on")
    assert "used, though no GPU has proven" in states()["tuned tiles (RLRR_TUNING)"]


def test_backends_say_why_triton_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_default", "auto")
    report = backends.backend_report()
    assert report["devices"]["cuda"]["auto"] == "torch"
    assert "compute capability 7.5" in report["devices"]["cuda"]["distrusted"]["triton"]
    operators, kinds, chosen, why = (column.cells for column in doctor._backends().columns)
    rows = {(o, k): (c, w) for o, k, c, w in zip(operators, kinds, chosen, why, strict=True)}
    assert rows["rlrr_linear", "cuda"][0] == rows["norm_rescale", "cuda"][0] == "torch"
    assert "not triton: Triton has no matrix instructions" in rows["rlrr_linear", "cuda"][1]
