"""One run at a time in a folder, whatever became of the one before; and nothing stays of what a killed one wrote."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support.image_folders import make_splits
from tests.support.paths import ROOT

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from rlrr_kernels.ops.host.cache import write_json
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.output.folder import LOCK, check_free, check_target, hold
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.writing import new_folder, write_together

_HOLDER = """
import sys, time
from pathlib import Path
from rlrr_kernels.train.output.folder import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    pytest.importorskip("fcntl", reason="locks of POSIX")
    folder = tmp_path / "run"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


def test_a_second_run_is_refused_and_told_who_is_there(held):
    folder, process = held
    message = rf"{re.escape(str(folder))} is in use by process {process.pid} on .* since 20.*: -c .*run; wait for it"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            check_free(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / LOCK).exists()
    check_free(folder)  # the lock of the dead is none
    assert not (folder / LOCK).exists()


def test_a_copy_of_a_folder_is_not_held(held):
    folder, _ = held
    shutil.copytree(folder, folder.with_name("copy"))
    check_free(folder.with_name("copy"))


def test_a_run_is_refused_before_its_images_are_looked_at(held, tmp_path):
    folder, process = held
    config = FinetuneConfig(model="test_vit", weights="none", data=tmp_path / "nowhere", out=folder)
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
        finetune(config, quiet=True)


def test_two_runs_of_one_process_are_kept_apart(tmp_path):
    with hold(tmp_path):
        with pytest.raises(ValueError, match="is in use by another run of this process"), hold(tmp_path / "." / ""):
            pass
        with hold(tmp_path.parent):
            pass
    with hold(tmp_path):
        pass


def test_a_run_that_ends_while_another_starts_is_not_overwritten(tmp_path, monkeypatch):
    """Both saw an empty folder; the second waited for its images while the first trained to its end."""
    from rlrr_kernels.train import finetune as module

    train = TrainConfig(epochs=1, batch_size=6, mixed_precision="no")
    config = FinetuneConfig(
        model="test_vit", weights="none", image_size=32, data=make_splits(tmp_path / "images"), out=tmp_path / "run",
        train=train,
    )  # fmt: skip
    look = module.check_splits

    def first_run(splits, talk):
        monkeypatch.setattr(module, "check_splits", look)
        finetune(config, quiet=True)

    monkeypatch.setattr(module, "check_splits", first_run)
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(dataclasses.replace(config, lr=1.0), quiet=True)


def test_incomplete_files_of_a_killed_process_are_removed(tmp_path):
    config = FinetuneConfig(
        model="test_vit", weights="none", image_size=32, data=make_splits(tmp_path / "images"), out=tmp_path / "run",
        train=TrainConfig(epochs=1, batch_size=6, mixed_precision="no"),
    )  # fmt: skip
    left = [tmp_path / "run" / name for name in (".checkpoint.pt.0a1b2c3d.tmp", ".result.json.0a1b2c3d.tmp")]
    left.append(tmp_path / "run" / "adapter" / ".adapter.safetensors.0a1b2c3d.tmp")
    others = [tmp_path / "run" / name for name in (".notes.tmp", "mine.0a1b2c3d.tmp")]
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    for path in left + others:
        path.write_bytes(b"half")
    finetune(config, quiet=True)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize(
    "write", [lambda folder: write_together(folder, {"a.bin": b""}), lambda folder: write_json(folder / "a.bin", {})]
)
def test_whoever_writes_a_file_removes_its_old_leftovers(write, tmp_path):
    old, young, other = (tmp_path / f".{name}.0a1b2c3{i}.tmp" for i, name in enumerate(("a.bin", "a.bin", "b.bin")))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    write(tmp_path)
    assert [path.exists() for path in (old, young, other)] == [False, True, True]


def test_a_full_disk_is_named_by_the_file_and_leaves_what_was_there(tmp_path):
    """Here the system ends a file early; of a full disk it names no file either."""
    resource = pytest.importorskip("resource", reason="limits of the size of files are Unix's")
    write_together(tmp_path, {"a.bin": b"old", "b.bin": b"old"})

    def fill() -> None:
        with new_folder(tmp_path / "images") as folder:
            (folder / "train").mkdir()
            (folder / "train" / "0.png").write_bytes(b"small")
            with open(folder / "train" / "1.png", "wb") as file:
                file.write(bytes(60_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/b\.bin'"):
            write_together(tmp_path, {"a.bin": b"new", "b.bin": bytes(60_000)})
        with pytest.raises(OSError, match=r"File too large: '.*/images'"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.bin": b"old", "b.bin": b"old"}
    left = tmp_path / ".images.0a1b2c3d.partial"
    left.mkdir()
    os.utime(left, (0, 0))
    fill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin", "images"]


def test_two_who_fill_a_folder_do_not_mix(tmp_path):
    with new_folder(tmp_path / "images") as first:
        (first / "a").touch()
        with new_folder(tmp_path / "images") as second:
            (second / "b").touch()
            (second / "c").touch()
        (tmp_path / "images").rename(tmp_path / "second")
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a"]
    with pytest.raises(OSError, match=r"not empty: '.*/images'"), new_folder(tmp_path / "images") as third:
        (third / "d").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "second"]


def test_no_file_is_put_in_place_of_a_pipe(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("named pipes are Unix's")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=rf"{name} is a pipe or a device, which a file would replace"):
            check_target(tmp_path / name, True, folder=False)
