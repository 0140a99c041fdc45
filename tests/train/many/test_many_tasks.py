"""Which tasks ``rlrr finetune-many`` trains: files and options."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

from typer.testing import CliRunner

from rlrr_kernels.cli import app
from rlrr_kernels.train.many.tasks import configs_of, parse_task, read_tasks

FILE = """
model = "test_vit"
weights = "w.npz"
out = "runs"
epochs = 10
batch-size = 8

[tasks.birds]
data = "birds"
lr = 1e-3
epochs = 1

[tasks."solar cells"]
data = "/photographs/cells"
check = false
weights = "hub"
"""


def test_a_file_holds_settings_for_all_tasks_and_for_each(tmp_path):
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    (tmp_path / "tasks.toml").write_text(FILE)
    shared, tasks = read_tasks(tmp_path / "tasks.toml")
    configs = configs_of(shared, [*tasks.items()])
    birds, cells = configs["birds"], configs["solar cells"]
    assert (birds.data, cells.data) == (tmp_path / "birds", Path("/photographs/cells"))
    assert (birds.out, cells.out) == (tmp_path / "runs" / "birds", tmp_path / "runs" / "solar cells")
    assert (birds.weights, cells.weights) == (tmp_path / "w.npz", "hub")
    assert (birds.lr, cells.lr) == (1e-3, 3e-3)
    assert (birds.check, cells.check) == (True, False)
    assert (birds.train.batch_size, cells.train.batch_size) == (8, 8)
    # What follows from a setting follows from the task's own, as in a run of its own.
    assert (birds.train.epochs, birds.train.warmup_epochs) == (1, 0.5)
    assert (cells.train.epochs, cells.train.warmup_epochs) == (10, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "tasks.toml is no TOML"),
        ('model = "test_vit"', "tasks.toml must have a table for each task"),
        ("[tasks]\nbirds = 3", "tasks.toml must have a table for each task"),
        ('lrr = 1\n[tasks.birds]\ndata = "x"', "has no setting 'lrr'; did you mean lr?"),
        (
            '[tasks.birds]\ndata = "x"\nepoch = 3',
            "task birds: rlrr finetune has no setting 'epoch'; did you mean epochs?",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_tasks(tmp_path / "tasks.toml")
    with pytest.raises(FileNotFoundError, match=r"none\.toml does not exist"):
        read_tasks(tmp_path / "none.toml")


def test_a_task_of_the_command_line_has_settings_after_its_folder():
    assert parse_task("birds=data/birds") == ("birds", {"data": "data/birds"})
    name, settings = parse_task("birds=data/a,b=c,lr=1e-3,select-by=macro_f1,check=false,epochs=5".replace(",b=c", ""))
    assert name == "birds"
    assert settings == {"data": "data/a", "lr": 1e-3, "select_by": "macro_f1", "check": False, "epochs": 5}
    assert parse_task("x=one, two,lr=1") == ("x", {"data": "one, two", "lr": 1})
    for text in ("birds", "=data", "birds="):
        with pytest.raises(ValueError, match=f"a task must be NAME=FOLDER or .*; got '{text}'"):
            parse_task(text)
    with pytest.raises(ValueError, match=r"task birds: rlrr finetune has no setting 'epoch'; did you mean epochs\?"):
        parse_task("birds=data,epoch=3")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task is given; name them with --task NAME=FOLDER"),
        ([("a", {}), ("a", {})], "these occur twice: a"),
        ([("a/b", {})], "without a slash or first dot; got 'a/b'"),
        ([(".a", {})], "without a slash or first dot; got '.a'"),
        ([("a", {"out": "elsewhere"})], "task a: out is set for all tasks"),
        ([("a", {"lr": "fast"})], "task a: lr must be a number; got 'fast'"),
        ([("a", {"epochs": 2.5})], "task a: epochs must be a whole number; got 2.5"),
    ],
)
def test_tasks_that_cannot_be_trained_are_named(tasks, message):
    with pytest.raises(ValueError, match=message):
        configs_of({"model": "test_vit", "out": "runs"}, tasks)


def test_options_come_before_the_file_s_settings_and_after_the_task_s_own(tmp_path, monkeypatch):
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    (tmp_path / "tasks.toml").write_text(FILE)
    given = []
    monkeypatch.setattr(
        "rlrr_kernels.train.many.run.finetune_many", lambda configs, **options: given.append((configs, options)) or {}
    )
    arguments = f"--tasks {tmp_path / 'tasks.toml'} --epochs 20 --task cars=cars,rank=4 --no-check --largest-batch 9"
    done = CliRunner().invoke(app, ["finetune-many", *arguments.split()])
    assert done.exit_code == 0, done.output
    ((configs, options),) = given
    assert options == {"largest_batch": 9, "resume": False}
    assert list(configs) == ["birds", "solar cells", "cars"]
    assert [config.train.epochs for config in configs.values()] == [1, 20, 20]
    assert [config.rank for config in configs.values()] == [None, None, 4]
    assert not any(config.check for config in configs.values())
    assert configs["cars"].out == tmp_path / "runs" / "cars"
    assert configs["cars"].train.batch_size == 8
