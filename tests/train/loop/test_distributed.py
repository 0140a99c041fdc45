"""Two processes over gloo, with copies (DDP) and shares of the backbone (FSDP2): one result, and what they send."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.support.image_folders import make_splits
from tests.support.paths import ROOT

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import load_file

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop.distributed import make_accelerator, shard_frozen
from tests.support.fitting import numbers, train, trained
from tests.support.killed import epochs_of, wait_until
from tests.train.loop.distributed_runs import ONE_PROCESS


def environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that two processes have filled."""
    folder = tmp_path_factory.mktemp("distributed")
    make_splits(folder / "images", val=7)  # 14 images do not divide into batches of 4 for two
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests/train/loop/distributed_runs.py"), str(folder / "images"), str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def one_process(runs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(runs / "images", runs / "one", ONE_PROCESS)
    torch.set_num_threads(threads)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text()), torch.load(folder / f"{name}.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_end_as_one(runs, one_process, kind):
    model, result = one_process
    document, tensors = read(runs, f"{kind}-straight")
    assert document["best_epoch"] == result.best_epoch
    assert document["count"] == result.best.count == 14  # none twice
    for ours, expected in zip(document["history"], numbers(result), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    for name, tensor in trained(model).items():
        # By the norm: AdamW divides by |g|, so a gradient that is all rounding moves its element by a whole step.
        assert (tensors["trained"][name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tensors["logits"], model.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not(runs, kind):
    straight, tensors = read(runs, f"{kind}-straight")
    resumed, again = read(runs, f"{kind}-resumed")
    assert resumed["history"] == straight["history"]
    assert resumed["best_epoch"] == straight["best_epoch"]
    for name, tensor in tensors["trained"].items():
        assert torch.equal(again["trained"][name], tensor), name


def test_only_the_gradients_of_what_is_trained_are_exchanged(runs):
    for kind in ("ddp", "fsdp"):
        for name in (f"{kind}-straight", f"{kind}-resumed"):
            document, _ = read(runs, name)
            assert document["exchanged"]["gradients"] == document["trained_bytes"]
            assert document["trained_bytes"] < document["all_bytes"] / 20
    assert read(runs, "ddp-straight")[0]["exchanged"]["weights"] == 0
    # The shares are gathered in forward and backward of both steps of an update; the root stays gathered in between.
    frozen = document["all_bytes"] - document["trained_bytes"]
    assert frozen < document["exchanged"]["weights"] < 4.5 * frozen


def test_one_process_exchanges_nothing(one_process):
    assert one_process[1].exchanged is None


def test_a_model_without_frozen_weights_has_nothing_to_spread():
    accelerator = make_accelerator(TrainConfig(), cpu=True)
    with pytest.raises(ValueError, match="nothing of this model is frozen"):
        shard_frozen(torch.nn.Linear(2, 2), accelerator, None)


@pytest.mark.slow
def test_the_program_under_torchrun_writes_one_result(tmp_path):
    images = make_splits(tmp_path / "images")
    arguments = (
        "-m rlrr_kernels.cli finetune --model test_vit --weights none --image-size 32 --epochs 3 --lr 0.01 "
        f"--augment none --mixed-precision no --data {images} --checkpoint-minutes 0 --out"
    ).split()
    options = {"check": True, "stdout": subprocess.DEVNULL, "env": environment()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, *arguments, str(tmp_path / "two"), "--batch-size", "4"], **options)
    subprocess.run([*launch, *arguments, str(tmp_path / "fsdp"), "--batch-size", "4", "--fsdp"], **options)
    subprocess.run([sys.executable, *arguments, str(tmp_path / "one"), "--batch-size", "8"], **options)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert one["exchanged_bytes_per_step"] is None
    for name in ("two", "fsdp"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["exchanged_bytes_per_step"]["gradients"] == 4 * result["trained_parameters"]
        for ours, theirs in zip(result["history"], one["history"], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
        assert result["test"]["count"] == one["test"]["count"] == 12
        assert result["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_all_processes_killed_and_started_again_end_as_if_they_had_not_been(tmp_path):
    import psutil  # accelerate brings it

    images = make_splits(tmp_path / "images")
    arguments = (
        "--nproc-per-node 2 -m rlrr_kernels.cli finetune --model test_vit --weights none --image-size 32 --epochs 12 "
        f"--lr 0.01 --mixed-precision no --ema-decay 0.9 --fsdp --data {images} --checkpoint-minutes 0 --batch-size 4"
    ).split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, "--out"]
    options = {"stdout": subprocess.DEVNULL, "env": environment()}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], **options)
    wait_until(lambda: epochs_of(killed) >= 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each a session of its own
    for each in (process, *workers):
        each.kill()
    psutil.wait_procs(workers)
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 2
    assert not (killed / "result.json").exists()
    subprocess.run([*command, str(killed), "--resume"], check=True, **options)
    subprocess.run([*command, str(tmp_path / "straight")], check=True, **options)
    folders = (killed / "adapter", tmp_path / "straight" / "adapter")
    resumed, straight = (load_file(folder / "adapter.safetensors") for folder in folders)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_launcher_that_starts_too_few_processes_is_not_taken_for_one(monkeypatch):
    """accelerate launch --num_processes 2 on a CPU: it sets these, starts one process and says nothing."""
    for name, value in (("ACCELERATE_MIXED_PRECISION", "no"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="asked for several processes and has started one"):
        make_accelerator(TrainConfig(), cpu=True)


@pytest.mark.slow  # under torchrun it trains on two processes too
def test_accelerate_launch_trains_on_two_processes(tmp_path):
    make_splits(tmp_path / "images")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = f"--model test_vit --weights none --image-size 32 --epochs 2 --data {tmp_path / 'images'}".split()
    command = [*launch, "-m", "rlrr_kernels.cli", "finetune", *options, "--batch-size", "4", "--out", tmp_path / "run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bytes of gradients" in done.stdout
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"][0]["processes"] == 2
