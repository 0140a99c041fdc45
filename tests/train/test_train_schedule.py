"""The learning rate over a run, and the paper's settings."""

import math

import pytest
import torch

pytest.importorskip("timm", reason="the schedules are timm's")

from rlrr_kernels.train.config.presets import paper_train_config
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop.schedule import Schedule


def rates(config, updates_per_epoch, lr=1.0):
    """The learning rate of every update."""
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr}])
    schedule = Schedule(optimizer, config, updates_per_epoch)
    found = []
    for update in range(config.epochs * updates_per_epoch):
        schedule.set(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_one_cosine_warms_up_falls_and_rests():
    config = TrainConfig(epochs=10, warmup_epochs=1, cooldown_epochs=2, min_lr=1e-3, warmup_lr=0.0)
    found = rates(config, 10)
    assert found[:11] == pytest.approx([0.1 * i for i in range(11)])
    assert found[45] == pytest.approx((1 + 1e-3) / 2)
    assert found[80:] == pytest.approx([1e-3] * 20)


def test_restarts_begin_again_at_the_peak_and_rest_in_the_end():
    config = TrainConfig(
        epochs=13, schedule="restarts", restart_epochs=4, warmup_epochs=1, cooldown_epochs=2, min_lr=0.0
    )
    found = rates(config, 3)
    cycle = [0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert found[3:15] == pytest.approx(cycle)
    assert found[15:27] == pytest.approx(cycle)
    assert found[27:33] == pytest.approx(cycle[:6])  # the last cycle is cut off by the rest
    assert found[33:] == pytest.approx([0.0] * 6)


def test_a_schedule_can_be_set_to_any_update_in_any_order():
    config = TrainConfig(epochs=4, schedule="restarts", restart_epochs=1.5, warmup_epochs=0.5)
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    schedule, expected = Schedule(optimizer, config, 4), rates(config, 4)
    for update in (15, 3, 8, 0):
        schedule.set(update)
        assert optimizer.param_groups[0]["lr"] == expected[update]


@pytest.mark.parametrize("name", ["vtab", "fgvc"])
def test_the_papers_schedule_as_it_ran(name):
    config = paper_train_config(name)
    cosine = {"vtab": 100, "fgvc": 50}[name]
    assert config.epochs == cosine + 10
    found = rates(config, 3, lr=1e-3)
    assert found[0::3] == found[1::3] == found[2::3]  # it changes once an epoch
    epochs = found[::3]
    assert epochs[:10] == pytest.approx([1e-7 + i * (1e-3 - 1e-7) / 10 for i in range(10)])
    expected = [1e-8 + (1e-3 - 1e-8) * 0.5 * (1 + math.cos(math.pi * t / cosine)) for t in range(10, cosine)]
    assert epochs[10:cosine] == pytest.approx(expected)
    assert max(epochs) < 1e-3
    assert epochs[cosine:] == pytest.approx([1e-8] * 10)


def test_the_papers_schedule_as_it_was_meant():
    found = rates(paper_train_config("vtab", as_ran=False), 4, lr=1e-3)
    assert found[40] == max(found) == 1e-3
    assert found[:41] == pytest.approx([1e-7 + i * (1e-3 - 1e-7) / 40 for i in range(41)])
    assert found[220] == pytest.approx((1e-3 + 1e-8) / 2)
    assert found[400:] == pytest.approx([1e-8] * 40)


def test_the_papers_restarts_and_augmentation():
    epochs = rates(paper_train_config("fgvc", restarts=True), 1)
    assert len(epochs) == 60
    peaks = [i for i in range(11, 50) if epochs[i] > epochs[i - 1]]
    assert peaks == [15, 20, 25, 30, 35, 40, 45]
    assert epochs[50:] == pytest.approx([1e-8] * 10)
    config = paper_train_config("fgvc", augmented=True, seed=1)
    assert (config.epochs, config.mixup, config.cutmix, config.label_smoothing) == (110, 0.8, 1.0, 0.1)
    assert (config.ema_decay, config.batch_size, config.seed) == (0.9998, 32, 1)
    with pytest.raises(ValueError, match="benchmark must be one of vtab, fgvc; got 'imagenet'"):
        paper_train_config("imagenet")
    with pytest.raises(ValueError, match="augmented is a setting of fgvc"):
        paper_train_config("vtab", augmented=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, restarts; got 'linear'"),
        ({"schedule_per": "step"}, "schedule_per must be one of update, epoch; got 'step'"),
        ({"restart_epochs": 0}, "restart_epochs must be above 0; got 0"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1; got 1.0"),
        ({"mixup": -0.1}, "mixup must be 0 or more; got -0.1"),
        ({"cutmix": float("nan")}, "cutmix must be 0 or more; got nan"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_a_schedule_too_fine_for_the_updates_is_told():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"must be shorter than the run and not 0; the run has 2 updates"):
        Schedule(optimizer, TrainConfig(epochs=2, schedule="restarts", restart_epochs=0.1), 1)
