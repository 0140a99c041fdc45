"""Every dataset's learning rate, epoch by epoch, against ``learning_rates.csv``: what the authors' program runs at."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from rlrr_kernels.paper.hyperparameters import DATASETS, dataset_names
from rlrr_kernels.paper.reproduce import ReproduceConfig, finetune_config
from rlrr_kernels.train.loop.schedule import Schedule

AUGMENTED = "augmented: "


def read_table() -> dict[str, list[float]]:
    """Dataset, after ``augmented: `` where it is so trained → learning rate of each epoch."""
    with Path(__file__).with_name("learning_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for column in list(rows[0])[1:]:
        kind = AUGMENTED if column.startswith(AUGMENTED) else ""
        for name in column.removeprefix(kind).split():
            found[kind + name] = [float(row[column]) for row in rows if row[column]]
    return found


TABLE = read_table()


def settings_of(name: str, **options):
    """The run of a dataset of the table."""
    dataset = DATASETS[name.removeprefix(AUGMENTED)]
    folder = Path("nowhere")
    options |= {"benchmark": dataset.benchmark, "root": folder, "out": folder, "model": "vit_base_patch16_224"}
    return finetune_config(ReproduceConfig(augmented=name.startswith(AUGMENTED), **options), dataset, 42)


def rates_of(name: str, updates_per_epoch: int, **options) -> list[float]:
    """The learning rate of every update."""
    run = settings_of(name, **options)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=run.lr)
    schedule = Schedule(optimizer, run.train, updates_per_epoch)
    found = []
    for update in range(run.train.epochs * updates_per_epoch):
        schedule.set(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_table_has_every_dataset_once():
    assert sorted(TABLE) == sorted([*DATASETS, *(AUGMENTED + name for name in dataset_names("fgvc"))])
    assert TABLE["cifar"][:4] == [1e-7, 1e-7, 0.00030009, 0.00060008]
    assert TABLE["CUB_200_2011"][:8] == pytest.approx(
        [3e-3, 3e-3, 2.71e-3, 1.96e-3, 1.04e-3, 2.86e-4, 3e-3, 2.71e-3], rel=5e-3
    )
    assert TABLE[AUGMENTED + "StanfordCars"][-1] == pytest.approx(0.54 * 3e-3, rel=3e-3)


@pytest.mark.parametrize("name", TABLE)
def test_every_dataset_runs_at_the_tables_learning_rates(name):
    found = rates_of(name, 3)
    assert found[0::3] == found[1::3] == found[2::3]  # it changes once an epoch
    assert found[::3] == pytest.approx(TABLE[name], rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dmlab", lambda o: CosineLRScheduler(o, t_initial=100, lr_min=1e-8, warmup_t=10, warmup_lr_init=1e-7)),
        ("NABirds", lambda o: CosineLRScheduler(o, t_initial=50, lr_min=1e-8, warmup_t=10, warmup_lr_init=1e-7)),
        ("StanfordDogs", lambda o: CosineAnnealingWarmRestarts(o, T_0=5, T_mult=1, eta_min=0)),
        (AUGMENTED + "NABirds", lambda o: CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2, eta_min=0)),
    ],
)
def test_the_tables_learning_rates_are_the_schedulers_stepped_after_each_epoch(name, make):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=DATASETS[name.removeprefix(AUGMENTED)].lr)
    scheduler = make(optimizer)
    found = []
    for epoch in range(len(TABLE[name])):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(epoch)
    assert found == pytest.approx(TABLE[name], rel=1e-6, abs=0)


def test_the_schedule_as_it_was_meant_is_neither_late_nor_in_steps():
    found = rates_of("CUB_200_2011", 2, schedule="meant")
    assert found[0] == found[10] == 3e-3
    assert found[5] == pytest.approx(1.5e-3)  # half of a cycle of five epochs
    found = rates_of("cifar", 2, schedule="meant")
    assert found[:2] == pytest.approx([1e-7, 1e-7 + (3e-3 - 1e-7) / 20])
    assert found[20] == max(found) == 3e-3


def test_epochs_are_chosen_as_the_authors_do_where_they_are_chosen_on_test_images():
    def choice(name, **options):
        train = settings_of(name, **options).train
        return train.ties, train.choose_from

    assert choice("cifar", split="paper") == ("first", 2)
    assert choice("CUB_200_2011", split="paper") == ("first", 1)
    assert choice("cifar") == choice("CUB_200_2011") == ("loss", 1)
    assert choice("cifar", split="paper", epochs=1) == ("first", 1)


def test_a_short_last_batch_is_left_out_in_augmented_runs_on_nabirds_alone():
    dropping = [name for name in TABLE if settings_of(name).train.drop_last]
    assert dropping == [AUGMENTED + "NABirds"]


def test_a_trial_shrinks_warm_up_cool_down_and_lag():
    train = settings_of("dmlab", epochs=11).train
    assert (train.epochs, train.warmup_epochs, train.cooldown_epochs, train.schedule_lag) == (11, 1, 1, 0)
    train = settings_of("StanfordDogs", epochs=6).train
    assert (train.warmup_epochs, train.cooldown_epochs, train.restart_epochs) == (0, 0, 5)
