"""``TrainConfig(compile=True)``: the same training by ``torch.compile``, resumed, averaged and validated."""

import dataclasses

import pytest
import torch

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from torch._dynamo.utils import counters
from typer.testing import CliRunner

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop import distributed
from tests.support.fitting import CONFIG, Stop, assert_same, numbers, train, trained

AVERAGED = dataclasses.replace(CONFIG, epochs=2, batch_size=8, ema_decay=0.7, mixed_precision="bf16")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images", val=4)


def test_it_is_the_same_training_in_one_graph_and_can_be_stopped(images, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "COMPILER", "aot_eager")
    plain, expected = train(images, tmp_path / "plain", AVERAGED)
    assert not counters["stats"]
    compiled = dataclasses.replace(AVERAGED, compile=True)
    model, result = train(images, tmp_path / "straight", compiled)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # training and validation: one size of a batch
    for ours, theirs in zip(numbers(result), numbers(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
    for name, tensor in trained(plain).items():
        assert (trained(model)[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert type(model) is type(plain)  # as it came
    assert "forward" not in vars(model) or model.forward.__func__ is type(model).forward
    with pytest.raises(Stop):
        train(images, tmp_path / "stopped", compiled, reads=24 + 12)
    resumed_model, resumed = train(images, tmp_path / "stopped", compiled, resume=True)
    assert_same(resumed_model, model)
    assert numbers(resumed) == numbers(result)


def test_compiled_shares_are_refused():
    with pytest.raises(ValueError, match="compile goes with copies of the model, not with fsdp"):
        TrainConfig(compile=True, fsdp=True)


@pytest.mark.slow
def test_the_program_compiles(images, tmp_path):
    from rlrr_kernels.cli import app

    options = ["--model", "test_vit", "--weights", "none", "--data", images, "--image-size", 32, "--epochs", 1, "--cpu"]
    done = CliRunner().invoke(
        app, ["finetune", *map(str, options), "--compile", "--recompute", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 0, done.output
    assert counters["inductor"]
    evaluated = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run" / "adapter"), "--data", str(images)])
    assert evaluated.exit_code == 0, evaluated.output
