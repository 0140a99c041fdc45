"""`rlrr reproduce`: the paper's settings for every task, a results file each, and that kill -9 loses nothing."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.paper_trees import make_fgvc, make_vtab

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

from rlrr_kernels import adapter_info
from rlrr_kernels.cli import main
from rlrr_kernels.paper.hyperparameters import DATASETS
from rlrr_kernels.paper.reproduce import ReproduceConfig, finetune_config, protocol_of, reproduce
from rlrr_kernels.paper.results import read_results
from rlrr_kernels.train.loop import checkpoint
from tests.support.killed import epochs_of, run_and_kill

TASKS = ("svhn", "kitti")


@pytest.fixture
def root(tmp_path):
    for name in TASKS:
        make_vtab(tmp_path / "data", name, 16, 8, 8)
    return tmp_path / "data"


def config(root, out, **changes):
    values = {
        "benchmark": "vtab",
        "root": root,
        "out": out,
        "model": "test_vit",
        "weights": "none",
        "seeds": 1,
        "tasks": TASKS,
        "epochs": 3,
        "image_size": 32,
        "mixed_precision": "no",
        "cpu": True,
    }
    return ReproduceConfig(**values | changes)


def numbers(folder):
    """What a run came to, without its times."""
    result = json.loads((folder / "result.json").read_text())
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]
    return history, result["epoch"], result["test"]


def test_every_dataset_gets_the_papers_settings(tmp_path):
    vtab = ReproduceConfig(benchmark="vtab", root=tmp_path, out=tmp_path, model="vit_base_patch16_224")
    run = finetune_config(vtab, DATASETS["dmlab"], 43)
    assert (run.lr, run.weight_decay, run.drop, run.drop_kind, run.augment) == (5e-3, 5e-5, 0.3, "branch", "flip")
    assert (run.recipe, run.init, run.rank, run.epoch_chosen_on) == ("paper", "paper", None, "validation")
    train = run.train
    assert (train.epochs, train.warmup_epochs, train.cooldown_epochs, train.batch_size) == (110, 10, 10, 32)
    assert (train.seed, train.schedule, train.schedule_per, train.drop_last) == (43, "cosine", "epoch", False)
    assert (train.min_lr, train.warmup_lr, train.mixup, train.ema_decay) == (1e-8, 1e-7, 0, None)
    assert (run.preprocessing.resize, run.preprocessing.image_size, run.preprocessing.mean) == (
        "squash",
        224,
        (0.5,) * 3,
    )
    assert protocol_of(vtab).epochs == protocol_of(vtab).paper_epochs == 110
    paper = dataclasses.replace(vtab, split="paper", model="swin_base_patch4_window7_224", schedule="meant")
    run = finetune_config(paper, DATASETS["dmlab"], 42)
    assert (run.drop_kind, run.epoch_chosen_on, run.train.schedule_per) == ("depth", "test", "update")

    fgvc = dataclasses.replace(vtab, benchmark="fgvc")
    train = finetune_config(fgvc, DATASETS["CUB_200_2011"], 42).train
    assert (train.epochs, train.schedule, train.restart_epochs, train.drop_last) == (60, "restarts", 5, False)
    augmented = dataclasses.replace(fgvc, augmented=True)
    train = finetune_config(augmented, DATASETS["StanfordCars"], 42).train
    assert (train.epochs, train.mixup, train.cutmix, train.label_smoothing, train.ema_decay) == (
        110,
        0.8,
        1,
        0.1,
        0.9998,
    )


def test_vtab_from_the_command_line_to_the_report(root, tmp_path, monkeypatch, capsys):
    def rlrr(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlrr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, " ".join("".join(capsys.readouterr()).split())

    out = tmp_path / "out [lr=3e-3] a"
    command = (
        *("reproduce", "vtab", "--root", root, "--model", "test_vit", "--weights", "none", "--tasks", "kitti,svhn"),
        *("--epochs", 2, "--image-size", 32, "--mixed-precision", "no", "--split", "paper", "--out", out, "--cpu"),
    )
    status, printed = rlrr(*command, "--seeds", 1)
    assert status == 0, printed
    assert "run 2 of 2: kitti/seed-42" in printed
    assert "chosen on the test images" in printed
    assert f"report '{out}'" in printed
    assert "test accuracy" in printed
    assert "val accuracy" not in printed
    status, printed = rlrr(*command, "--seeds", 2)
    assert status == 0, printed
    assert "kitti/seed-43" in printed
    assert "run 1 of 4" not in printed  # done before
    results = read_results(out)
    assert list(results) == ["svhn", "kitti"]
    assert results["kitti"].note == "24 images in train800val200, 1,000 published; 8 images in test, 711 published"
    for name, task in results.items():
        assert [run.seed for run in task.runs] == [42, 43]
        for run in task.runs:
            document = json.loads((out / f"runs/{name}/seed-{run.seed}/result.json").read_text())
            assert run.test_accuracy == document["test"]["accuracy"]
            assert document["epoch_chosen_on"] == "test"
            assert run.validation_accuracy is None
    adapter = adapter_info(out / "runs/kitti/seed-42/adapter")
    assert adapter.metadata["epoch_chosen_on"] == "test"
    assert adapter.metadata["task"]["preprocessing"]["resize"] == "squash"
    assert not list(out.rglob(checkpoint.NAME))
    status, printed = rlrr("report", out, "--compare", "ViT-B/16")
    assert status == 0
    assert "TRIAL: 2 epochs in place of the paper's 110" in printed
    assert "partial: 2 of 19" in (out / "report.md").read_text()
    status, printed = rlrr(*command, "--epochs", 3)
    assert status == 1
    assert "is of a run with other settings" in printed


def test_fgvc_honest_and_augmented(tmp_path):
    make_fgvc(tmp_path / "data", "OxfordFlowers")
    fgvc = config(
        tmp_path / "data", tmp_path / "out", benchmark="fgvc", tasks=("OxfordFlowers",), epochs=1, augmented=True
    )
    (task,) = reproduce(fgvc, quiet=True).values()
    (run,) = task.runs
    assert run.validation_accuracy is not None
    result = json.loads((tmp_path / "out/runs/OxfordFlowers/seed-42/result.json").read_text())
    assert result["epoch_chosen_on"] == "validation"
    training = result["training"]
    assert (training["augment"], training["mixup"], training["ema_decay"]) == ("crop", 0.8, 0.9998)
    protocol = task.protocol
    assert (protocol.split, protocol.epochs, protocol.paper_epochs, protocol.augmented) == ("honest", 1, 110, True)


def test_a_full_disk_loses_no_finished_run(root, tmp_path, monkeypatch):
    from rlrr_kernels.paper import results
    from rlrr_kernels.train.grid import runs as grid

    original = results.write_together

    def full(folder, contents):
        if "kitti.json" in contents:
            raise OSError(28, "No space left on device")
        original(folder, contents)

    settings = config(root, tmp_path / "out", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_together", full)
        with pytest.raises(OSError, match="No space left"):
            reproduce(settings, quiet=True)
    assert list(read_results(tmp_path / "out")) == ["svhn"]
    monkeypatch.setattr(grid, "finetune", None)  # nothing is trained again
    assert [len(task.runs) for task in reproduce(settings, quiet=True).values()] == [1, 1]
    assert list(read_results(tmp_path / "out")) == ["svhn", "kitti"]


def test_bad_datasets_are_all_told_before_the_first_run(root, tmp_path):
    (root / "svhn/test.txt").unlink()
    file = root / "kitti/val200.txt"
    file.write_text(file.read_text().replace(" 3", " 33", 1))
    with pytest.raises(ValueError, match="2 of 2 datasets cannot be used") as caught:
        reproduce(config(root, tmp_path / "out"), quiet=True)
    assert "test.txt is missing" in str(caught.value)
    assert "val200.txt, line 4: the label must be from 0 to 3" in str(caught.value)
    with pytest.raises(ValueError, match="method must be one of"):  # before the lists are read
        reproduce(config(root, tmp_path / "out", method="rlr"), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("kiti",)}, "no dataset of vtab called 'kiti'; did you mean kitti"),
        ({"benchmark": "glue"}, "benchmark must be one of vtab, fgvc; got 'glue'"),
        ({"split": "test"}, "split must be one of honest, paper; got 'test'"),
        ({"schedule": "linear"}, "schedule must be one of ran, meant; got 'linear'"),
        ({"seeds": 2.5}, "seeds must be a whole number; got 2.5"),
        ({"cpu": "false"}, "cpu must be true or false; got 'false'"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"augmented": True}, "augmented is a setting of fgvc"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "out", **change)


@pytest.mark.slow
def test_killed_again_and_again_ends_as_never_killed(root, tmp_path):
    out = tmp_path / "killed"
    arguments = (
        f"reproduce vtab --root {root} --out {out} --model test_vit --weights none --seeds 1 --tasks svhn,kitti "
        "--epochs 6 --image-size 32 --cpu --mixed-precision no --checkpoint-minutes 0"
    )
    command = [sys.executable, "-um", "rlrr_kernels.cli", *arguments.split()]
    log = tmp_path / "log"

    def printed_epochs():
        return [int(epoch) for epoch in re.findall(r"epoch +(\d+)/6", log.read_text())]

    done = 0  # of the run that was going on
    for task, epochs in (("svhn", 2), ("kitti", 1)):
        run = out / f"runs/{task}/seed-42"
        with log.open("w") as stream:
            run_and_kill(command, lambda run=run, epochs=epochs: epochs_of(run) >= epochs, stream)
        assert printed_epochs()[0] == done + 1  # no finished epoch again
        done = epochs_of(run)
    assert set(read_results(out)) == {"svhn"}  # whole; kitti is not finished
    (out / "results" / ".kitti.json.01234567.tmp").touch()  # as when the signal came while it was written
    with log.open("w") as stream:
        subprocess.run(command, stdout=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert printed_epochs() == list(range(done + 1, 7))

    reproduce(config(root, tmp_path / "straight", epochs=6), quiet=True)
    for task in TASKS:
        assert numbers(out / f"runs/{task}/seed-42") == numbers(tmp_path / f"straight/runs/{task}/seed-42")
        accuracies = [read_results(folder)[task].runs[0].test_accuracy for folder in (out, tmp_path / "straight")]
        assert accuracies[0] == accuracies[1]
    assert sorted(path.name for path in (out / "results").iterdir()) == ["kitti.json", "svhn.json"]
