"""Which epoch a run chooses."""

import dataclasses

import pytest
import torch

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.evaluate import Scores
from rlrr_kernels.train.loop.record import Record

EPOCHS = ((0.9, 1.0), (0.5, 0.9), (0.7, 0.8), (0.7, 0.3), (0.6, 0.1))
"""Accuracy and loss."""


def chosen(**settings) -> int:
    config, record = TrainConfig(epochs=len(EPOCHS), **settings), Record(1)
    for epoch, (accuracy, loss) in enumerate(EPOCHS, start=1):
        scores = Scores(loss=loss, accuracy=accuracy, macro_f1=accuracy, recall=(accuracy,), count=10)
        record.add_losses(1.0, 1.0)
        _, improved = record.finish_epoch(scores, 0.1, config, {"number": torch.tensor(epoch)})
        assert improved == (record.best is not None and record.best["epoch"] == epoch)
    result = record.result()
    assert record.best["tensors"]["number"] == result.best_epoch
    assert (result.best.accuracy, result.best.loss) == EPOCHS[result.best_epoch - 1]
    assert len(result.history) == len(EPOCHS)  # an epoch that may not be chosen is scored too
    return result.best_epoch


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({}, 1),
        ({"choose_from": 2}, 4),
        ({"choose_from": 2, "ties": "first"}, 3),
        ({"choose_from": 5, "ties": "first"}, 5),
    ],
)
def test_the_best_epoch_is_chosen_as_the_settings_say(settings, epoch):
    assert chosen(**settings) == epoch


def test_a_checkpoint_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    pytest.importorskip("timm", reason="the training library needs timm")
    pytest.importorskip("accelerate", reason="the training library needs accelerate")
    from rlrr_kernels.train.loop.checkpoint import load_checkpoint, save_checkpoint
    from tests.support.fitting import CONFIG, Stop, train
    from tests.support.image_folders import make_splits

    images, folder, config = make_splits(tmp_path / "images"), tmp_path / "run", dataclasses.replace(CONFIG, epochs=2)
    with pytest.raises(Stop):
        train(images, folder, config, reads=30)
    state = load_checkpoint(folder)
    for name in ("schedule_lag", "restart_factor", "ties", "choose_from"):
        del state["settings"][name]
    save_checkpoint(folder, state)
    with pytest.raises(ValueError, match="other settings: choose_from was 1, is 2"):
        train(images, folder, dataclasses.replace(config, choose_from=2), resume=True)
    _, result = train(images, folder, config, resume=True)
    assert [entry["epoch"] for entry in result.history] == [1, 2]
