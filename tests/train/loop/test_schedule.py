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


@pytest.mark.parametrize("per", ["epoch", "update"])
def test_cycles_that_grow_and_a_late_schedule(per):
    config = TrainConfig(
        epochs=40,
        schedule="restarts",
        restart_epochs=10,
        restart_factor=2,
        warmup_epochs=0,
        min_lr=0.0,
        schedule_per=per,
        schedule_lag=1,
    )
    found = rates(config, 1)
    first = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    second = [0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert found == pytest.approx([1.0, *first, *second, *[0.5 * (1 + math.cos(math.pi * i / 40)) for i in range(9)]])
    assert rates(config, 4)[: 4 + 1] == [1.0] * 5  # an epoch late, not an update


def test_the_papers_schedule_as_it_was_meant():
    found = rates(paper_train_config("vtab", as_ran=False), 4, lr=1e-3)
    assert found[40] == max(found) == 1e-3
    assert found[:41] == pytest.approx([1e-7 + i * (1e-3 - 1e-7) / 40 for i in range(41)])
    assert found[220] == pytest.approx((1e-3 + 1e-8) / 2)
    assert found[400:] == pytest.approx([1e-8] * 40)


def test_the_papers_restarts_and_augmentation():
    config = paper_train_config("fgvc", restarts=True)
    assert (config.epochs, config.warmup_epochs, config.cooldown_epochs, config.min_lr) == (60, 0, 0, 0)
    config = paper_train_config("fgvc", augmented=True, seed=1)
    assert (config.epochs, config.mixup, config.cutmix, config.label_smoothing) == (110, 0.8, 1.0, 0.1)
    assert (config.ema_decay, config.batch_size, config.seed) == (0.9998, 32, 1)
    assert (config.restart_epochs, config.restart_factor, config.warmup_epochs) == (10, 2, 0)
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
        ({"restart_factor": 0}, "restart_factor must be at least 1; got 0"),
        ({"schedule_lag": -1}, "schedule_lag must be 0 or more; got -1"),
        ({"choose_from": 21}, "choose_from must be one of the 20 epochs; got 21"),
        ({"ties": "last"}, "ties must be one of loss, first; got 'last'"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1; got 1.0"),
        ({"mixup": -0.1}, "mixup must be 0 or more; got -0.1"),
        ({"cutmix": float("nan")}, "cutmix must be a number; got nan"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_a_schedule_too_fine_for_the_updates_is_told():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"must be shorter than the run and not 0; the run has 2 updates"):
        Schedule(optimizer, TrainConfig(epochs=2, schedule="restarts", restart_epochs=0.1), 1)
