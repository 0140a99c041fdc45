"""Image folders: layouts, splits, bad input, and augmentation that a resumed run repeats."""

import hashlib
import io
import random
import shutil
import struct

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
    contradicting_images,
    find_samples,
    find_splits,
    fingerprint,
    make_loader,
    shared_images,
    split_of,
    stratified_split,
)
from rlrr_kernels.train.data.images import read_image
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


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("train_set", "valid-set", "test_set"),
        ("TRAINING", "dev", "testing"),
        ("training_data", "Validation", "holdout"),
        ("train2017", "val2017", "test2017"),
        ("train_dataset", "Validation_Dataset", "test_dataset"),
        ("seg_train", "seg_val", "seg_test"),
        ("data_train", "images_val", "test photos"),
        ("train_imgs", "valSamples", "test_folder"),
        ("TRAIN_DIR", "VALSet", "testimages"),
        ("trainA", "x_val", "test_v2"),
    ],
)
def test_splits_go_by_their_common_names_in_any_case(tmp_path, train, val, test):
    for name, count in ((train, 3), (val, 2), (test, 1)):
        make_images(tmp_path / name, {"cat": count, "dog": count})
    splits = find_splits(tmp_path)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 6, "val": 4, "test": 2}
    assert splits["train"].classes == ("cat", "dog")


def test_folders_that_could_be_splits_or_classes_are_refused(tmp_path):
    for name in ("val", "test"):
        make_images(tmp_path / "a" / name, {"cat": 2, "dog": 2})
    with pytest.raises(ValueError, match=r"holds test and val, which are called like splits, but none to train on"):
        find_splits(tmp_path / "a")
    for name in ("Train", "training"):
        make_images(tmp_path / "b" / name, {"cat": 2, "dog": 2})
    with pytest.raises(ValueError, match="two folders that are called like the split train: Train and training"):
        find_splits(tmp_path / "b")
    make_images(tmp_path / "c", {"bus": 2, "train": 2, "tram": 2})
    with pytest.raises(
        ValueError, match=r"train is called like a split, .* if it is a class beside bus, tram, give it"
    ):
        find_splits(tmp_path / "c")
    make_images(tmp_path / "d" / "train", {"train": 2, "test": 2})
    with pytest.raises(ValueError, match="must hold a folder a class; its folders are called like splits: test, train"):
        find_splits(tmp_path / "d")
    make_images(tmp_path / "e" / "train", {"bus": 2, "train": 2})  # in a split, a class may be called so
    assert find_splits(tmp_path / "e")["train"].classes == ("bus", "train")
    others = (
        "trains",
        "contest",
        "valley",
        "latest",
        "device",
        "strain",
        "invalid",
        "test_tube",
        "imagenet_train",
        "x",
    )
    assert [split_of(name) for name in others] == [None] * len(others)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("imagenet_train", "imagenet_val"), 2),
        (("birds_train", "flowers_test"), 2),
        (("acmetest", "acmetrain", "more"), 2),
        (("acme_test", "acme_train", "acme_pred"), 2),
        (("flask", "test_tube"), 0),
        (("freight_train", "steam_train"), 0),  # kinds of trains
        (("train_cats", "train_dogs"), 0),
        (("contest", "strain", "valley"), 0),
        (("flask", "test_tube", "train_station"), 0),
    ],
)
def test_names_that_seem_to_mean_splits_are_no_classes(tmp_path, names, meant):
    make_images(tmp_path, dict.fromkeys(names, 2))
    if meant:
        told = rf"called like splits: {', '.join(names[:meant])}; call splits train, val and test"
        with pytest.raises(ValueError, match=told):
            find_splits(tmp_path)
    else:
        assert find_splits(tmp_path)["train"].classes == names


def test_splits_within_the_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        make_images(tmp_path / name / "photos", {"train": 2, "test": 1})
    told = (
        r"cat.photos, in place of images of a class, holds folders that are called like splits: test, train; expected"
    )
    for classes in (None, ("cat", "dog")):
        with pytest.raises(ValueError, match=told):
            find_samples(tmp_path, classes)


def test_what_is_not_used_is_told(tmp_path):
    make_images(tmp_path / "train", {"cat": 3, "dog": 3})
    make_images(tmp_path / "val", {"cat": 1})
    make_images(tmp_path / "extra", {"cat": 1})
    for name in ("a.heic", "b.HEIC", "notes.txt", "README"):
        (tmp_path / "train" / "cat" / name).touch()
    (tmp_path / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for place in (tmp_path, tmp_path / "train"):
        shutil.copy(tmp_path / "train" / "dog" / "000.png", place / "LOOSE.PNG")
        (place / "._hidden.png").touch()
    with pytest.warns(UserWarning, match="not used") as caught:
        find_splits(tmp_path)
    told = "\n".join(str(warning.message) for warning in caught)
    assert "the folders beside the splits are not used: extra" in told
    assert "1 images beside the splits are not used" in told
    assert "train: 6 files are not used: 2 .heic, " in told
    for kind in ("1 images beside the class folders", "1 .txt", "1 without an ending", "1 broken links"):
        assert kind in told
    assert "val has no image of 1 of 2 classes: dog" in told


def test_hidden_files_and_folders_are_skipped_at_any_depth(tmp_path):
    make_images(tmp_path, {"cat": 4, "dog": 4})
    make_images(tmp_path / "cat" / "sub", {".ipynb_checkpoints": 2, "@eaDir": 2, "more": 1})
    make_images(tmp_path, {".cache": 2, "lost+found": 1})
    make_images(tmp_path / "__MACOSX", {"cat": 1, "dog": 1})
    (tmp_path / "dog" / "._000.png").write_bytes(b"a Mac's")
    paths = find_samples(tmp_path).paths
    assert len(paths) == 9
    assert {path.relative_to(tmp_path).parent.as_posix() for path in paths} == {"cat", "cat/sub/more", "dog"}


def test_equal_images_in_two_splits_are_found(tmp_path):
    make_images(tmp_path / "train", {"cat": 4, "dog": 4})
    make_images(tmp_path / "test", {"cat": 2, "dog": 2})
    splits = find_splits(tmp_path, val_fraction=0.5)
    assert shared_images(splits) == []
    data = splits["train"].paths[0].read_bytes()
    (copy := splits["test"].paths[3]).write_bytes(data)
    twice = tmp_path / "train" / "cat" / "twice.png"
    twice.write_bytes(data)
    alike = bytearray(data)  # of the same size
    alike[-1] ^= 1
    splits["test"].paths[1].write_bytes(alike)
    splits = {"train": find_samples(tmp_path / "train"), "test": find_samples(tmp_path / "test")}
    ((first, second),) = shared_images(splits)
    assert second == copy
    assert first.read_bytes() == data
    assert contradicting_images(splits["train"]) == []
    (other := tmp_path / "train" / "dog" / "other.png").write_bytes(data)
    ((first, second),) = contradicting_images(find_samples(tmp_path / "train"))
    assert (first.parent.name, second) == ("cat", other)


def test_the_fingerprint_knows_names_sizes_and_labels_but_not_the_place(tmp_path):
    def fingerprint_of(folder):
        return fingerprint(find_splits(folder))

    before = fingerprint_of(make_images(tmp_path / "a", {"cat": 4, "dog": 4}))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint_of(tmp_path / "b") == before
    (tmp_path / "b" / "cat" / "000.png").rename(tmp_path / "b" / "cat" / "0.png")
    assert fingerprint_of(tmp_path / "b") != before
    with open(tmp_path / "a" / "cat" / "000.png", "ab") as file:
        file.write(b"0")
    assert fingerprint_of(tmp_path / "a") != before


def write_tiff(path, shape, pixels, bits, *, photometric=1, sample_format=1, samples=1, planar=1):
    """A TIFF file of the forms that Pillow does not write."""
    height, width = shape
    tags = ((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, samples))
    tags = (*tags, (278, height), (279, len(pixels)), (284, planar), (339, sample_format))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory + bytes(4))


def test_deep_pixels_keep_their_range_or_are_refused_by_mode(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(tmp_path / "big_endian.tif")
    Image.fromarray(values).save(tmp_path / "little_endian.tif")
    (tmp_path / "deep.ppm").write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    for name in ("big_endian.tif", "little_endian.tif", "deep.ppm"):
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name))[..., 1], values >> 8)
    turned = Image.fromarray(values)
    turned.save(tmp_path / "turned.tif", tiffinfo={274: 3})  # upside down
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.tif"))[..., 0], values[::-1, ::-1] >> 8)
    packed = int("".join(f"{value:012b}" for value in (values >> 4).ravel()), 2).to_bytes(96, "big")
    write_tiff(tmp_path / "twelve.tif", (8, 8), packed, 12)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "twelve.tif"))[..., 0], values >> 8)
    for name, array, mode in (("float", values / 65535, "F"), ("int", values, "I")):
        Image.fromarray(array.astype(np.float32 if mode == "F" else np.int32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match=rf"cannot read the image .*{name}\.tif: its pixels are .*\(mode {mode}\)"):
            read_image(tmp_path / f"{name}.tif")


def test_deep_colours_one_after_the_other_are_refused(tmp_path):
    write_tiff(tmp_path / "colours.tif", (8, 8), bytes(3 * 128), 16, photometric=2, samples=3)
    assert read_image(tmp_path / "colours.tif").getpixel((0, 0)) == (0, 0, 0)
    write_tiff(tmp_path / "planes.tif", (8, 8), bytes(3 * 128), 16, photometric=2, samples=3, planar=2)
    with pytest.raises(ValueError, match=r"planes\.tif: its colours of 16 bits .*\(PlanarConfiguration 2\); save it"):
        read_image(tmp_path / "planes.tif")


def test_white_may_be_zero_and_signed_pixels_are_refused(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        pixels = (values >> (16 - bits)).astype(dtype)
        write_tiff(tmp_path / "turned.tif", (8, 8), pixels.tobytes(), bits, photometric=0)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.tif"))[..., 0], 255 - (values >> 8))
        write_tiff(tmp_path / "signed.tif", (8, 8), pixels.tobytes(), bits, sample_format=2)
        with pytest.raises(ValueError, match=r"signed\.tif: its pixels are signed numbers \(mode [LI]\), which do not"):
            read_image(tmp_path / "signed.tif")
    whole = (tmp_path / "turned.tif").read_bytes()
    Image.open(io.BytesIO(whole)).save(tmp_path / "packed.tif", compression="tiff_lzw", tiffinfo={262: 0})
    assert Image.open(tmp_path / "packed.tif").tag_v2[262] == 0
    np.testing.assert_array_equal(read_image(tmp_path / "packed.tif"), read_image(tmp_path / "turned.tif"))


def test_large_images_are_warned_of_by_name(tmp_path, monkeypatch):
    make_images(tmp_path, {"cat": 1, "dog": 1})
    Image.new("RGB", (60, 60)).save(tmp_path / "cat" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.warns(UserWarning, match=r"1 images have more than 0 megapixels, .*: .*large\.png"):
        check_images(find_samples(tmp_path).paths)


def test_a_bad_image_in_a_loader_s_process_is_told_in_a_line(tmp_path):
    make_images(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "cat" / "001.png").write_bytes(b"none")
    dataset = ImageDataset(find_samples(tmp_path), preprocessing().transform())
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"cannot read the image .*001\.png") as caught:
            list(make_loader(dataset, 2, workers=workers))
        assert str(caught.value).startswith("cannot read the image")
        assert "Traceback" not in str(caught.value)


def test_splitting_compares_each_label_a_few_times_whatever_the_classes():
    compared = 0

    class Label(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    rest, chosen = stratified_split([Label(i % 300) for i in range(3000)], 0.2, seed=0)
    assert (len(rest), len(chosen)) == (2400, 600)
    assert compared < 4 * 3000
    # Numbers in the results depend on which are chosen.
    _, few = stratified_split([i % 30 for i in range(600)], 0.2, seed=0)
    assert hashlib.sha256(str(few).encode()).hexdigest()[:16] == "54ab5e45be6afb95"
