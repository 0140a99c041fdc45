"""Grids as jobs: done once, gone on with when their machine is taken away, failures named and the rest kept."""

import dataclasses
import json
import os

import pytest

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
submitit = pytest.importorskip("submitit", reason="jobs need submitit")

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.grid import cluster
from rlrr_kernels.train.grid.cluster import submit_grid
from rlrr_kernels.train.grid.runs import GridRun, run_grid
from rlrr_kernels.train.run.config import FinetuneConfig


def grid_runs(images, seeds):
    train = TrainConfig(epochs=2, batch_size=6, mixed_precision="no")
    config = FinetuneConfig(model="test_vit", data=images, out="unused", weights="none", image_size=32, cpu=True)
    return [
        GridRun(f"task/seed-{seed}", dataclasses.replace(config, train=dataclasses.replace(train, seed=seed)))
        for seed in seeds
    ]


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return make_splits(tmp_path / "images", train=6, val=3, test=3)


def numbers(result):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]


def test_jobs_give_what_the_runs_give_here_and_failures_stop_no_other(images, tmp_path):
    first, second = grid_runs(images, (1, 2))
    broken = dataclasses.replace(first, name="broken", config=dataclasses.replace(first.config, model="no_such_vit"))
    told = []
    expected = run_grid([first], tmp_path / "here", quiet=True)
    out = tmp_path / "jobs here"
    run_grid([second], out, quiet=True)
    written = (out / second.name / "result.json").stat().st_mtime_ns
    options = {"cluster": "local", "poll_seconds": 0.1, "quiet": True}
    with pytest.raises(
        ChildProcessError, match=r"1 of 3 runs failed:\nbroken: ValueError: timm has no model 'no_such_vit'"
    ):
        submit_grid([broken, first, second], out, on_result=lambda name, result: told.append(name), **options)
    assert told == [second.name, first.name]  # as soon as it is read or done
    results = submit_grid([first, second], out, **options)  # nothing is left to do
    assert list(results) == [first.name, second.name]
    assert numbers(results[first.name]) == numbers(expected[first.name])
    assert results[first.name]["test"] == expected[first.name]["test"]
    assert json.loads((out / second.name / "result.json").read_text()) == results[second.name]
    assert (out / second.name / "result.json").stat().st_mtime_ns == written


def test_a_job_that_loses_its_machine_is_queued_again(images, tmp_path):
    (run,) = grid_runs(images, (1,))
    again = cluster._GridJob(run, tmp_path, True).checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function == cluster._GridJob(run, tmp_path, True)


@pytest.mark.slow
def test_the_tasks_of_a_job_train_together(images, tmp_path):
    (run,) = grid_runs(images, (1,))
    result = submit_grid([run], tmp_path / "grid", cluster="local", poll_seconds=0.1, quiet=True, tasks_per_node=2)
    assert result[run.name]["exchanged_bytes_per_step"]["gradients"] == 4 * result[run.name]["trained_parameters"]


def test_bad_input_is_told_before_any_job(images, tmp_path, monkeypatch):
    runs = grid_runs(images, (1,))
    cases = [
        ({"cluster": "pbs"}, "cluster must be one of local, slurm; got 'pbs'"),
        ({"cluster": "local", "at_once": 0}, "at_once must be at least 1; got 0"),
        ({"cluster": "local", "walltime": 3}, "submitit: .*walltime"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            submit_grid(runs, tmp_path / "grid", quiet=True, **options)
    with pytest.raises(ValueError, match="'jobs' is the folder of the logs"):
        submit_grid([dataclasses.replace(runs[0], name="jobs/a")], tmp_path / "grid", quiet=True)
    with pytest.raises(ValueError, match="different names"):
        submit_grid(runs * 2, tmp_path / "grid", quiet=True)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rlrr-kernels\[cluster\]'"):
        submit_grid(runs, tmp_path / "grid", quiet=True)


def test_the_reason_of_a_failure_is_found_in_submitits_messages():
    trace = "Traceback (most recent call last):\n  File x\nValueError: bad"
    dashes = "-" * 22
    failed = (
        f"Job (task=0) failed during processing with trace:\n{dashes}\n{trace}\n\n{dashes}\nYou can check full logs"
    )
    assert cluster._reason(failed) == "ValueError: bad"
    assert (
        cluster._reason("Job 12 (task: 0) with path a\nhas not produced any output") == "Job 12 (task: 0) with path a"
    )


def test_parameters_of_jobs_are_read():
    assert cluster.job_parameters(["slurm_partition=gpu", "mem_gb=32"]) == {"slurm_partition": "gpu", "mem_gb": 32}
    with pytest.raises(ValueError, match="must be NAME=VALUE, such as timeout_min=600; got 'gpu'"):
        cluster.job_parameters(["gpu"])


def test_a_reproduction_can_be_made_of_jobs(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from rlrr_kernels.cli import app
    from tests.support.paper_trees import make_vtab

    asked = []

    def here(runs, out, *, on_result, keep_checkpoints, **options):
        asked.append(options)
        return run_grid(runs, out, on_result=on_result, keep_checkpoints=keep_checkpoints, quiet=True)

    monkeypatch.setattr(cluster, "submit_grid", here)
    (tmp_path / "srun").touch(0o755)  # by which submitit knows a cluster
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    make_vtab(tmp_path / "data", "kitti", 16, 8, 8)
    command = (
        f"reproduce vtab --root {tmp_path / 'data'} --out {tmp_path / 'out'} --model test_vit --weights none --seeds 1 "
        "--tasks kitti --epochs 1 --image-size 32 --mixed-precision no --cpu"
    ).split()
    jobs = ["--cluster", "slurm", "--at-once", "4", "--job", "slurm_partition=gpu", "--job", "timeout_min=60"]
    done = CliRunner().invoke(app, [*command, *jobs])
    assert done.exit_code == 0, done.output
    assert asked == [{"cluster": "slurm", "at_once": 4, "slurm_partition": "gpu", "timeout_min": 60, "quiet": False}]
    assert (tmp_path / "out" / "results" / "kitti.json").exists()
    refused = CliRunner().invoke(app, [*command, "--at-once", "4"])
    assert "--at-once and --job are settings of jobs; give --cluster too" in str(refused.exception)
