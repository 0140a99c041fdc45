"""Image folders: layouts, splits, bad input, and augmentation that a resumed run repeats."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_folders import make_images

pytest.importorskip("timm", reason="the training library needs timm")

from rlrr_kernels.train.data.folders import (
    EpochShuffle,
    ImageDataset,
    Samples,
    check_images,
    find_samples,
    find_splits,
    make_loader,
    read_image,
    stratified_split,
)
from rlrr_kernels.train.data.preprocessing import Preprocessing


def test_class_folders_are_split_by_class(tmp_path):
    make_images(tmp_path, {"cat": 20, "dog": 10})
    splits = find_splits(tmp_path, val_fraction=0.2, seed=1)
    assert set(splits) == {"train", "val"}
    assert splits["train"].classes == ("cat", "dog")
    assert sorted(splits["val"].labels) == [0] * 4 + [1] * 2
    assert not set(splits["train"].paths) & set(splits["val"].paths)
    assert len(splits["train"]) + len(splits["val"]) == 30
    assert find_splits(tmp_path, val_fraction=0.2, seed=1) == splits
    assert find_splits(tmp_path, val_fraction=0.2, seed=2) != splits


def test_given_splits_are_used_and_labels_follow_the_training_classes(tmp_path):
    make_images(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    make_images(tmp_path / "validation", {"b": 2})
    make_images(tmp_path / "test", {"c": 2, "a": 1})
    splits = find_splits(tmp_path)
    assert splits["val"].labels == (1, 1)
    assert sorted(splits["test"].labels) == [0, 2, 2]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_stratified_split_leaves_no_key_empty(fraction):
    keys = ["x"] * 7 + ["y"] * 2 + ["z"]
    rest, chosen = stratified_split(keys, fraction, seed=0)
    assert sorted(rest + chosen) == list(range(10))
    assert {keys[i] for i in rest} == {"x", "y", "z"}
    assert {keys[i] for i in chosen} == {"x", "y"}


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_splits(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no class folders"):
        find_splits(tmp_path)
    make_images(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match="one class folder only, 'only'"):
        find_splits(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no image"):
        find_splits(tmp_path)


def test_a_class_unknown_to_the_model_is_named(tmp_path):
    make_images(tmp_path, {"cat": 1, "fish": 1})
    with pytest.raises(ValueError, match="classes that the model does not have: 'fish'; it has cat, dog"):
        find_samples(tmp_path, ("cat", "dog"))


def test_a_class_with_one_image_needs_a_validation_folder(tmp_path):
    make_images(tmp_path, {"cat": 5, "rare": 1})
    with pytest.raises(ValueError, match="'rare' has one image only"):
        find_splits(tmp_path)


def test_unreadable_images_are_all_named_before_training(tmp_path):
    make_images(tmp_path, {"cat": 4, "dog": 4})
    whole = (tmp_path / "cat" / "001.png").read_bytes()
    (tmp_path / "cat" / "001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "notes.jpg").write_text("no image at all")
    (tmp_path / "dog" / "zero.png").touch()
    paths = find_samples(tmp_path).paths
    with pytest.raises(ValueError, match="3 of 10 images cannot be read") as caught:
        check_images(paths)
    for name in ("001.png", "notes.jpg", "zero.png"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"cannot read the image .*zero\.png"):
        ImageDataset(find_samples(tmp_path), np.asarray)[9]


def test_every_image_mode_becomes_rgb(tmp_path):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "16bit.png")
    Image.new("LA", (8, 8), (10, 100)).save(tmp_path / "alpha.png")
    Image.new("P", (8, 8), 3).save(tmp_path / "palette.gif")
    deep = read_image(tmp_path / "16bit.png")
    assert deep.mode == "RGB"
    np.testing.assert_allclose(np.asarray(deep)[..., 0], values / 256, atol=1)
    assert read_image(tmp_path / "alpha.png").mode == read_image(tmp_path / "palette.gif").mode == "RGB"


def preprocessing(size: int = 32) -> Preprocessing:
    return Preprocessing(size, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("augment", ["flip", "timm"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path, augment):
    samples = find_samples(make_images(tmp_path, {"a": 8, "b": 8}))
    for path in samples.paths:  # plain colours look the same flipped
        Image.effect_noise((40, 40), 50).save(path)

    def images(epoch, order, workers=0, seed=0):
        data = ImageDataset(samples, preprocessing().transform(augment), seed=seed)
        data.epoch = epoch
        return torch.cat([x for x, _ in make_loader(data, 4, sampler=order, workers=workers)])

    first = images(0, range(16))
    state = random.getstate(), torch.get_rng_state()
    assert torch.equal(images(0, list(reversed(range(16)))).flip(0), first)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert torch.equal(images(0, range(16), workers=2), first)
    assert not torch.equal(images(1, range(16)), first)
    assert not torch.equal(images(0, range(16), seed=1), first)


def test_epoch_shuffle_skips_what_was_done():
    order = EpochShuffle(10, seed=3)
    first = list(order)
    assert sorted(first) == list(range(10))
    order.epoch = 1
    assert list(order) != first
    order.epoch, order.skip = 0, 6
    assert list(order) == first[6:]
    assert len(order) == 4


def test_a_label_outside_the_classes_is_named_with_its_image(tmp_path):
    paths = tuple(tmp_path / f"{i}.png" for i in range(4))
    with pytest.raises(ValueError, match=r"must lie in 0 to 2, as .* 3 classes; got 3 of .*1\.png, and of 1 more"):
        Samples(paths, (0, 3, 1, -1), ("a", "b", "c"))
    with pytest.raises(ValueError, match="got 4 images and 3 labels"):
        Samples(paths, (0, 1, 2), ("a", "b", "c"))
