"""Run folders: what they record, and that a run can be repeated from its config.json alone."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")
pytest.importorskip("typer", reason="the program needs typer")

import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import rlrr_kernels
from rlrr_kernels.cli import app
from rlrr_kernels.paper.reproduce import ReproduceConfig
from rlrr_kernels.train.config.files import config_from_dict, read_config, write_config
from rlrr_kernels.train.config.options import config_of_options, describe_arguments, options_of
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.output.environment import add_session
from rlrr_kernels.train.run.config import FinetuneConfig

PREPROCESSING = {"image_size": 32, "crop": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


def small_run(data, out):
    train = TrainConfig(epochs=2, batch_size=6, mixed_precision="no")
    return FinetuneConfig(model="test_vit", weights="none", image_size=32, data=data, out=out, lr=0.01, train=train)


def adapter_tensors(folder):
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_a_run_is_repeated_from_its_config_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(small_run(make_splits(Path("images")), Path("first")), quiet=True)
    monkeypatch.chdir(tmp_path / "images")  # the paths in the file hold from anywhere
    arguments = ["finetune", "--config", "../first/config.json", "--out", str(tmp_path / "second")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    first, second = adapter_tensors(tmp_path / "first"), adapter_tensors(tmp_path / "second")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")]
    assert results[0]["test"] == results[1]["test"]
    for before, again in zip(*(result["history"] for result in results), strict=True):
        assert before | {"seconds": 0} == again | {"seconds": 0}


def test_options_beside_a_config_replace_its_settings(tmp_path):
    data = make_splits(tmp_path / "images")
    file = tmp_path / "config.json"
    file.write_bytes(write_config(small_run(data, tmp_path / "first")))
    done = CliRunner().invoke(app, f"finetune --config {file} --epochs 3 --rank 2 --no-check".split())
    assert done.exit_code == 0, done.output
    written = read_config(FinetuneConfig, tmp_path / "first" / "config.json")
    assert (written.train.epochs, written.rank, written.check) == (3, 2, False)
    assert (written.lr, written.train.batch_size) == (0.01, 6)


def test_the_environment_of_every_session_is_recorded(tmp_path, monkeypatch):
    config = small_run(make_splits(tmp_path / "images"), tmp_path / "run")
    for resume in (False, True):
        monkeypatch.setattr(sys, "argv", ["rlrr", f"session {resume}"])
        finetune(config, resume=resume, quiet=True)
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert [session["command"][1] for session in sessions] == ["session False", "session True"]
    assert sessions[0]["versions"]["torch"] == torch.__version__
    assert sessions[0]["versions"]["rlrr-kernels"] == rlrr_kernels.__version__
    assert (sessions[0]["processes"], sessions[0]["precision"]) == (1, "no")
    assert sessions[0]["backends"]["devices"]["cpu"]["auto"] in ("cpp", "torch")


def test_a_run_refused_to_go_on_leaves_no_trace_in_the_folder(tmp_path):
    config = small_run(make_splits(tmp_path / "images"), tmp_path / "run")
    finetune(config, quiet=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for other in ({"model": "test_vit2"}, {"rank": 2}, {"method": "bias"}):
        with pytest.raises(ValueError, match=r"checkpoint in .*run belongs to a run with other settings"):
            finetune(dataclasses.replace(config, **other), resume=True, quiet=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_configurations_survive_the_file(tmp_path):
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3, "squash")
    config = dataclasses.replace(
        small_run(None, tmp_path / "run"), weights=tmp_path / "w.npz", preprocessing=preprocessing, image_size=None
    )
    file = tmp_path / "config.json"
    file.write_bytes(write_config(config))
    assert read_config(FinetuneConfig, file) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"learning_rate": 1}, "FinetuneConfig has no setting 'learning_rate'"),
        (lambda values: values | {"train": {"epoch": 3}}, "TrainConfig has no setting 'epoch'; did you mean epochs?"),
        (lambda values: {"schema_version": 1, "lr": 1e-3}, "needs the setting 'model'"),
        (lambda values: values | {"lr": -1}, "lr must be a finite number of at least 0; got -1"),
        (lambda values: values | {"schema_version": 99}, "it has no schema_version 1"),
        (lambda values: [], "it has no schema_version 1"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, change, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads(write_config(small_run(tmp_path, tmp_path / "run"))))))
    with pytest.raises(ValueError, match=f"config.json is no configuration of a run: .*{message}"):
        read_config(FinetuneConfig, file)


def test_a_truncated_or_missing_config_file_is_named(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_config(FinetuneConfig, file)
    file.write_bytes(write_config(small_run(tmp_path, tmp_path / "run"))[:-20])
    with pytest.raises(ValueError, match=r"config\.json is truncated or no JSON"):
        read_config(FinetuneConfig, file)
    file.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is truncated or no JSON: maximum recursion depth"):
        read_config(FinetuneConfig, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 2.5}}, "batch_size must be a whole number; got 2.5"),
        ({"train": {"workers": -3}}, "workers must be 0 or more; got -3"),
        ({"train": {"workers": "2"}}, "workers must be a whole number or left out; got '2'"),
        ({"train": {"seed": 10**30}}, "seed must be a whole number; got 1000"),
        ({"train": {"clip_grad": 0}}, "clip_grad must be above 0; got 0"),
        ({"train": None}, "train must be TrainConfig; got None"),
        ({"recompute": "false"}, "recompute must be true or false; got 'false'"),
        ({"check": 0}, "check must be true or false; got 0"),
        ({"val_fraction": 7}, "val_fraction must lie between 0 and 1; got 7"),
        ({"lr": float("nan")}, "lr must be a number; got nan"),
        ({"lr": True}, "lr must be a number; got True"),
        ({"model": 3.5}, "model must be a text; got 3.5"),
        ({"data": 1}, "data must be a path or left out; got 1"),
        ({"data": "a\0"}, r"data must be a path or left out; got PosixPath\('a"),
        ({"data": "a\ud800"}, r"data must be a path or left out; got PosixPath\('a"),
        ({"weights": ["hub"]}, r"weights must be a text or a path; got \['hub'\]"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        (
            {"preprocessing": {"image_size": 32}},
            "Preprocessing needs the setting 'crop', 'interpolation', 'mean', 'std'",
        ),
        (
            {"preprocessing": PREPROCESSING | {"interpolation": "cubic"}},
            "interpolation must be one of nearest, bilinear",
        ),
        ({"preprocessing": PREPROCESSING | {"std": [1, 1, 0]}}, "std above 0; got"),
    ],
)
def test_settings_are_checked_whoever_makes_them(tmp_path, change, message):
    file = tmp_path / "config.json"
    good = json.loads(write_config(dataclasses.replace(small_run(tmp_path, tmp_path / "run"), image_size=None)))
    nested = {name: good[name] | value for name, value in change.items() if isinstance(good[name], dict) and value}
    file.write_text(json.dumps(good | change | nested))
    with pytest.raises(ValueError, match=f"config.json is no configuration of a run: .*{message}"):
        read_config(FinetuneConfig, file)
    kinds = {"train": TrainConfig, "preprocessing": Preprocessing}
    ((name, value),) = change.items()
    kind, values = (kinds[name], value) if name in kinds and value else (FinetuneConfig, {"model": "test_vit"} | change)
    with pytest.raises(ValueError, match=message):
        config_from_dict(kind, values)


def test_texts_stand_for_paths_and_lists_for_tuples(tmp_path):
    config = FinetuneConfig(model="test_vit", data=str(tmp_path), out="run", lr=1)
    assert (config.data, config.out) == (tmp_path, Path("run"))
    assert Preprocessing(**PREPROCESSING).mean == (0.5, 0.5, 0.5)


def test_a_damaged_record_of_earlier_sessions_does_not_stop_the_run(tmp_path):
    document = tmp_path / "environment.json"
    for text in ('{"sessions": null}', "[]", "3", '{"sessions": 3}', "[" * 100_000, ""):
        document.write_text(text)
        assert json.loads(add_session(document, {"x": 1}, resumed=True)) == {"sessions": [{"x": 1}]}


def test_every_option_has_its_help():
    for kind in (FinetuneConfig, TrainConfig, ReproduceConfig):
        described = describe_arguments(kind)
        assert set(described) == {field.name for field in dataclasses.fields(kind)}
    names = {parameter.name for parameter in options_of(FinetuneConfig)}
    assert {"model", "data", "epochs", "batch_size", "lr", "cpu"} <= names
    assert not {"train", "preprocessing"} & names


def _commands(command, name="rlrr"):
    yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {child}")


def test_no_help_is_lost():
    """Every parameter of the program has a help, and none has brackets, which the terminal's markup would swallow."""
    texts = {
        f"{name} {parameter.name}": parameter.help or ""
        for name, command in _commands(typer.main.get_command(app))
        for parameter in command.params
        if parameter.name != "help"
    }
    assert len(texts) > 100
    assert not [name for name, text in texts.items() if not text or "[" in text or "None: " in text]


def test_a_list_of_names_takes_commas_and_repetition():
    given = {"benchmark": "vtab", "root": "data", "model": "test_vit", "tasks": ["kitti,svhn", "dtd"]}
    config = config_of_options(ReproduceConfig, given)
    assert config.tasks == ("kitti", "svhn", "dtd")
    assert config.out == Path("runs/vtab")
    assert config_of_options(ReproduceConfig, given | {"tasks": None}).tasks == ()
