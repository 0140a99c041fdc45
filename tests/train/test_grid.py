"""Grids of runs: nothing is done twice, nothing finished is lost, results of other settings are refused."""

import dataclasses
import json
import statistics
import sys

import pytest

from tests.support.image_folders import make_splits
from tests.support.paths import ROOT

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from rlrr_kernels.train.data.folders import find_splits
from rlrr_kernels.train.grid import runs as grid
from rlrr_kernels.train.grid.runs import GridRun, Spread, run_grid
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop.fit import TrainConfig
from rlrr_kernels.train.run.config import FinetuneConfig
from tests.support.killed import epochs_of, run_and_kill


def grid_runs(images, epochs=2):
    """Two methods, two seeds, of the smallest model timm has."""
    config = FinetuneConfig(model="test_vit", data=images, out="unused", weights="none", image_size=32)
    train = TrainConfig(epochs=epochs, batch_size=6, mixed_precision="no")
    return [
        GridRun(
            f"{method}/seed-{seed}",
            dataclasses.replace(config, method=method, train=dataclasses.replace(train, seed=seed)),
        )
        for method in ("probe", "rlrr")
        for seed in (1, 2)
    ]


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images", train=6, val=3, test=3)


@pytest.fixture
def finetuned(monkeypatch):
    """The folders of the runs that were not merely read."""
    done, original = [], grid.finetune
    monkeypatch.setattr(
        grid, "finetune", lambda config, **options: done.append(config.out) or original(config, **options)
    )
    return done


def test_finished_runs_are_read_and_not_repeated(images, tmp_path, finetuned):
    runs, out = grid_runs(images), tmp_path / "grid"
    first = run_grid(runs[:3], out, quiet=True)
    assert len(finetuned) == 3
    for name, result in first.items():
        assert json.loads((out / name / "result.json").read_text()) == result
        assert result["settings"]["data"] == "images"  # no path of this machine
    again = run_grid(runs, out, keep_checkpoints=False, quiet=True)
    assert finetuned[3:] == [out / "rlrr/seed-2"]
    assert list(again) == [run.name for run in runs]
    assert {name: again[name] for name in first} == first
    assert (out / "rlrr/seed-1" / checkpoint.NAME).exists()
    assert not (out / "rlrr/seed-2" / checkpoint.NAME).exists()


def test_splits_are_made_when_the_run_starts(images, tmp_path):
    (run,) = grid_runs(images)[:1]
    calls = []

    def splits():
        calls.append(1)
        return find_splits(images)

    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=None), splits=splits)
    run_grid([run], tmp_path / "grid", quiet=True)
    run_grid([run], tmp_path / "grid", quiet=True)
    assert len(calls) == 1


def test_results_of_other_settings_are_refused_before_any_run(images, tmp_path, finetuned):
    runs, out = grid_runs(images), tmp_path / "grid"
    run_grid(runs[3:], out, quiet=True)
    changed = [*runs[:3], dataclasses.replace(runs[3], config=dataclasses.replace(runs[3].config, lr=0.5))]
    with pytest.raises(
        ValueError, match=r"rlrr/seed-2/result\.json is of a run with other settings: lr was 0.003, is 0.5"
    ):
        run_grid(changed, out, quiet=True)
    assert len(finetuned) == 1
    path = out / "rlrr/seed-2/result.json"
    document = json.loads(path.read_text())
    del document["settings"]["train.clip_grad"]  # written before there was such a setting: it had today's default
    path.write_text(json.dumps(document))
    assert run_grid(runs[3:], out, quiet=True)["rlrr/seed-2"] == document
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"result\.json is damaged or no result"):
        run_grid(runs, out, quiet=True)


def test_a_checkpoint_of_other_settings_is_refused(images, tmp_path):
    runs, out = grid_runs(images), tmp_path / "grid"
    run_grid(runs[:1], out, quiet=True)
    (out / "probe/seed-1/result.json").unlink()
    changed = dataclasses.replace(runs[0], config=dataclasses.replace(runs[0].config, lr=0.5))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        run_grid([changed], out, quiet=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/b", "a/b"), "these occur twice: a/b"),
        (("a", "a/b"), "a/b lies in a"),
        (("../a",), r"relative path such as 'cifar/seed-1'; got '../a'"),
        (("/a",), "got '/a'"),
        (("",), "got ''"),
    ],
)
def test_bad_names_are_told(names, message, images, tmp_path):
    run = grid_runs(images)[0]
    with pytest.raises(ValueError, match=message):
        run_grid([dataclasses.replace(run, name=name) for name in names], tmp_path / "grid", quiet=True)
    assert not (tmp_path / "grid").exists()


def test_a_result_that_cannot_be_written_is_told(images, tmp_path, monkeypatch):
    from rlrr_kernels.train.run import results as module

    original = module.write_together

    def full(folder, contents):
        if "result.json" in contents:
            raise OSError(28, "No space left on device")
        original(folder, contents)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_together", full)
        with pytest.raises(OSError, match=r"result\.json could not be written; the training is safe"):
            run_grid(grid_runs(images)[:1], tmp_path / "grid", quiet=True)
    assert run_grid(grid_runs(images)[:1], tmp_path / "grid", quiet=True)["probe/seed-1"]["method"] == "probe"


_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from tests.train.test_grid import grid_runs
from rlrr_kernels.train.grid.runs import run_grid
torch.set_num_threads(1)
run_grid(grid_runs({images!r}, epochs=6)[:2], {out!r}, quiet=True)
"""


def test_killed_at_any_moment_a_grid_goes_on(images, tmp_path, finetuned):
    """kill -9 in the middle of the second run: the first is not repeated, all ends as if nothing had happened."""
    out = tmp_path / "killed"
    script = _SCRIPT.format(tests=str(ROOT), images=str(images), out=str(out))
    run_and_kill([sys.executable, "-c", script], (out / "probe/seed-2" / checkpoint.NAME).exists)
    first = (out / "probe/seed-1/result.json").read_text()
    assert epochs_of(out / "probe/seed-2") >= 1

    resumed = run_grid(grid_runs(images, epochs=6)[:2], out, quiet=True)
    assert out / "probe/seed-1" not in finetuned
    assert (out / "probe/seed-1/result.json").read_text() == first
    straight = run_grid(grid_runs(images, epochs=6)[:2], tmp_path / "straight", quiet=True)
    for name, result in straight.items():
        assert numbers(resumed[name]) == numbers(result)


def numbers(result):
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]
    return history, result["test"], result["validation"], result["epoch"]


def test_spread():
    assert str(Spread.of([0.5])) == "0.5000"
    assert str(Spread.of([0.25, 0.75])) == f"0.5000 ± {statistics.stdev([0.25, 0.75]):.4f}"
