"""``finetune`` on given splits: another preprocessing, the epoch chosen on the test images, short batches left out."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from tests.support.image_folders import make_splits

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import EpochShuffle, ImageDataset, find_splits, make_loader
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.finetune import finetune
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.task import load_task

SQUASHED = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3, "squash")


@pytest.fixture
def splits(tmp_path):
    return find_splits(make_splits(tmp_path / "images"))


def config(out, **settings):
    train = TrainConfig(epochs=3, batch_size=5, warmup_epochs=1, mixed_precision="no", drop_last=True)
    return FinetuneConfig(
        model="test_vit", weights="none", preprocessing=SQUASHED, lr=0.01, out=out, cpu=True, train=train, **settings
    )


def test_the_epoch_can_be_chosen_on_the_test_images_and_every_output_says_so(splits, tmp_path):
    out = tmp_path / "run"
    del splits["val"]
    result = finetune(config(out, epoch_chosen_on="test"), splits=splits, quiet=True)
    document = json.loads((out / "result.json").read_text())
    assert document["epoch_chosen_on"] == "test"
    assert document["validation"] is None
    assert document["test"]["count"] == 12
    assert document["test"]["accuracy"] == max(entry["val_accuracy"] for entry in document["history"])
    assert result.test == result.fit.best
    assert '"epoch_chosen_on": "test"' in (out / "adapter" / "README.md").read_text()
    with pytest.raises(ValueError, match="epoch_chosen_on was test, is validation"):
        finetune(config(out), splits=splits | {"val": splits["test"]}, resume=True, quiet=True)


def test_given_preprocessing_is_kept_with_the_adapter(splits, tmp_path):
    result = finetune(config(tmp_path / "run"), splits=splits, quiet=True)
    _, task = load_task(result.adapter)
    assert task.preprocessing == SQUASHED
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epoch_chosen_on"] == "validation"


@pytest.mark.parametrize(("shift", "recorded"), [("with_bias", "with_bias"), ("none", False)])
def test_shifts_are_trained_where_they_are_asked_for(shift, recorded, splits, tmp_path):
    result = finetune(config(tmp_path / "run", shift=shift), splits=splits, quiet=True)
    assert json.loads((result.adapter / "config.json").read_text())["adaptation"]["shift"] == recorded
    with pytest.raises(ValueError, match="shift must be one of all, with_bias, none; got 'some'"):
        config(tmp_path / "run", shift="some")


def test_bad_splits_are_told_before_any_work(splits, tmp_path):
    good = config(tmp_path / "run")
    cases = [
        (good, None, "either config.data, an image folder, or splits=; got none"),
        (dataclasses.replace(good, data=tmp_path), splits, "got both"),
        (good, {"train": splits["train"], "test": splits["test"]}, "needs the splits train and val; got train, test"),
        (good, splits | {"val": splits["val"].subset([])}, "the split val holds no image"),
        (good, splits | {"val": dataclasses.replace(splits["val"], classes=("a", "b"))}, "val has other classes"),
    ]
    for settings, given, message in cases:
        with pytest.raises(ValueError, match=message):
            finetune(settings, splits=given, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="image_size must be that of the preprocessing, 32; got 64"):
        dataclasses.replace(good, image_size=64)
    with pytest.raises(ValueError, match="epoch_chosen_on must be one of validation, test; got 'train'"):
        dataclasses.replace(good, epoch_chosen_on="train")


def test_drop_last_leaves_out_the_short_batch(splits, tmp_path):
    data = ImageDataset(splits["train"], SQUASHED.transform())
    sizes = [len(labels) for _, labels in make_loader(data, 5, sampler=EpochShuffle(24, 0), drop_last=True)]
    assert sizes == [5, 5, 5, 5]
    result = finetune(config(tmp_path / "run"), splits=splits, quiet=True)
    assert [round(epoch * 4) for epoch, _ in result.fit.loss_curve] == list(range(1, 13))  # four batches an epoch
    few = splits | {"train": splits["train"].subset(range(4))}
    with pytest.raises(ValueError, match="drop_last leaves no batch: 4 training images, 5 images a step"):
        finetune(config(tmp_path / "few"), splits=few, quiet=True)


def test_squash_keeps_the_whole_image_and_crop_moves_over_it():
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 8, 32))  # a stripe that a centre crop would cut off
    squashed = SQUASHED.transform()(image)
    assert squashed.shape == (3, 32, 32)
    assert squashed[:, :, 0].min() > 0.9
    centred = Preprocessing(32, 0.5, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert centred.transform()(image).max() < -0.9
    torch.manual_seed(0)
    crops = torch.stack([centred.transform("crop")(image) for _ in range(32)])
    assert crops.shape == (32, 3, 32, 32)
    assert crops[:, :, :, 0].amax() > 0.9  # some reach the stripe, on either side after the flip
    assert crops[:, :, :, -1].amax() > 0.9
    assert crops.flatten(1).amax(1).min() < -0.9
    with pytest.raises(ValueError, match="resize must be one of center, squash; got 'border'"):
        dataclasses.replace(SQUASHED, resize="border")
