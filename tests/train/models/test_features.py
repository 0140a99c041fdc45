"""Averages, mixing, recomputation, logs and precision: what each does, and that a stopped run ends with its numbers."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.mixing import Mixing
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.loop import fit as loop
from rlrr_kernels.train.loop.averaging import Average
from rlrr_kernels.train.models.backbones import create_model
from rlrr_kernels.train.output import board
from tests.support.fitting import CONFIG, Stop, assert_same, numbers, train, trained

EVERYTHING = dataclasses.replace(
    CONFIG,
    epochs=3,
    schedule="restarts",
    restart_epochs=1,
    schedule_per="epoch",
    warmup_within=True,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    ema_decay=0.7,
    activation_checkpointing=True,
    mixed_precision="bf16",
)


@pytest.fixture
def images(tmp_path):
    return make_splits(tmp_path / "images")


def test_a_run_with_everything_stopped_and_resumed_ends_the_same(images, tmp_path):
    model, result = train(images, tmp_path / "straight", EVERYTHING)
    for reads in (24 + 12, 24 * 2):
        folder = tmp_path / f"stopped {reads}"
        with pytest.raises(Stop):
            train(images, folder, EVERYTHING, reads=reads)
        resumed_model, resumed = train(images, folder, EVERYTHING, resume=True)
        assert_same(resumed_model, model)
        assert numbers(resumed) == numbers(result)


def test_the_average_follows_its_formula_and_is_put_back():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = Average({"p": parameter}, 0.75)
    expected = torch.ones(3)
    for value in (2.0, -1.0):
        parameter.data.fill_(value)
        average.update()
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(average.tensors["p"], expected)
    with average.in_place():
        torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.tolist() == [-1.0] * 3


def test_the_average_is_validated_and_kept(images, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, warmup_epochs=0, ema_decay=0.5)
    model, result = train(images, tmp_path / "run", config)
    state = checkpoint.load_checkpoint(tmp_path / "run")
    for name, tensor in trained(model).items():
        assert torch.equal(tensor, state["average"][name])
        assert torch.equal(tensor, state["best"]["tensors"][name])
        assert not torch.equal(tensor, state["tensors"][name])
    _, plain = train(images, tmp_path / "plain", dataclasses.replace(config, ema_decay=None))
    assert plain.history[0]["train_loss"] == result.history[0]["train_loss"]  # the training itself is the same
    assert plain.history[0]["val_loss"] != result.history[0]["val_loss"]


def test_an_average_too_slow_for_the_run_is_told(images, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(loop.TrainProgress, "warn", lambda self, message: warnings.append(message))
    train(images, tmp_path / "run", dataclasses.replace(CONFIG, epochs=1, warmup_epochs=0, ema_decay=0.9998))
    assert "ema_decay = 0.9998 is slow for 3 updates: the last average will still hold 100%" in warnings[0]


def batch(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 3


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_depends_on_epoch_and_batch_alone(settings):
    mixing = Mixing(TrainConfig(**settings), 3, process=0)
    images, labels = batch(6)
    results = [mixing(images.clone(), labels, epoch, number) for epoch, number in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(results[0][0], results[3][0])
    assert torch.equal(results[0][1], results[3][1])
    assert not torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    other_process = Mixing(TrainConfig(**settings), 3, process=1)(images.clone(), labels, 0, 0)
    assert not torch.equal(results[0][0], other_process[0])


def test_mixed_labels_weigh_as_the_images_do():
    images, labels = batch(4)
    mixed, targets = Mixing(TrainConfig(mixup=0.8), 3, process=0)(images.clone(), labels, 0, 0)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    weight = ((mixed - images.flip(0)) / (images - images.flip(0))).mean()
    torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.flip(0), rtol=1e-4, atol=1e-4)


def test_the_odd_image_of_a_batch_is_left_alone_and_the_global_generators_too():
    images, labels = batch(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    mixed, targets = Mixing(TrainConfig(mixup=0.8), 3, process=0)(images.clone(), labels, 0, 0)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(mixed[4], images[4])
    assert targets[4].tolist() == [0.0, 1.0, 0.0]
    assert not torch.equal(mixed[:4], images[:4])
    single, target = Mixing(TrainConfig(mixup=0.8), 3, process=0)(images[:1].clone(), labels[:1], 0, 0)
    assert torch.equal(single, images[:1])
    assert target.tolist() == [[1.0, 0.0, 0.0]]


def test_activation_checkpointing_recomputes_and_changes_no_number(images, tmp_path, monkeypatch):
    calls = []
    block = type(create_model("test_vit", 2, image_size=32, weights="none")[0].blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **k: (calls.append(self.training), forward(self, x, **k))[1])
    config = dataclasses.replace(CONFIG, epochs=2)
    model, result = train(images, tmp_path / "plain", config)
    kept = calls.count(True)
    calls.clear()
    again, recomputed = train(
        images, tmp_path / "recomputed", dataclasses.replace(config, activation_checkpointing=True)
    )
    assert calls.count(True) == 2 * kept
    assert_same(again, model)
    assert numbers(recomputed) == numbers(result)
    assert not again.grad_checkpointing  # as it came


def test_a_model_without_checkpointing_is_told(images, tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing: a Linear has no checkpointing"):
        loop.set_activation_checkpointing(torch.nn.Linear(2, 2), True)


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / board.FOLDER))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "epoch/seconds"
    }


def test_logs_of_a_resumed_run_are_those_of_a_straight_one(images, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the logs need tensorboard")
    config = dataclasses.replace(CONFIG, tensorboard=True, checkpoint_minutes=60)  # a checkpoint an epoch
    _, result = train(images, tmp_path / "straight", config)
    expected = curves(tmp_path / "straight")
    assert {"train/loss", "train/learning_rate", "val/loss", "val/accuracy", "val/macro_f1"} <= set(expected)
    assert [step for step, _ in expected["val/accuracy"]] == [5, 10, 15, 20]
    values = [entry["val_loss"] for entry in result.history]
    assert [value for _, value in expected["val/loss"]] == pytest.approx(values)
    log = board.Board.log  # when what was logged comes to the disk is left to TensorBoard
    monkeypatch.setattr(board.Board, "log", lambda self, *point: (log(self, *point), self.flush()))
    with pytest.raises(Stop):
        train(images, tmp_path / "stopped", config, reads=24 + 15)
    assert len(curves(tmp_path / "stopped")["train/loss"]) > 5  # points that the resumed run makes again
    train(images, tmp_path / "stopped", config, resume=True)
    assert curves(tmp_path / "stopped") == expected


def test_logs_that_cannot_be_written_do_not_end_the_run(images, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the logs need tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    warnings = []
    monkeypatch.setattr(loop.TrainProgress, "warn", lambda self, message: warnings.append(message))
    _, result = train(images, tmp_path / "run", dataclasses.replace(CONFIG, tensorboard=True))
    assert len(result.history) == 4
    assert len(warnings) == 1
    assert "end here: [Errno 28] No space left on device" in warnings[0]


def test_missing_tensorboard_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rlrr-kernels\[tensorboard\]'"):
        board.require_tensorboard()
