"""The paper's datasets: settings, the published layouts on disk, what `rlrr data check` finds, torchvision's images."""

import inspect
import json
from typing import ClassVar

import pytest
import torch
from PIL import Image

from tests.support.paper_trees import make_fgvc, make_vtab

pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("typer", reason="the program needs typer")
torchvision = pytest.importorskip("torchvision", reason="the training library needs torchvision")

from rlrr_kernels.paper.check import check_dataset, datasets_to_check
from rlrr_kernels.paper.data import augmentation, load_splits, preprocessing, split_note
from rlrr_kernels.paper.hyperparameters import DATASETS, GROUPS, dataset_names, dataset_settings, selected_datasets
from rlrr_kernels.paper.prepare import TORCHVISION, prepare_dataset
from rlrr_kernels.train.data.folders import ImageDataset, Samples


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


# ---------------------------------------------------------------- settings


def test_every_dataset_of_the_paper_is_there_in_its_order():
    vtab, fgvc = dataset_names("vtab"), dataset_names("fgvc")
    assert (len(vtab), len(fgvc)) == (19, 5)
    assert [sum(DATASETS[name].group == group for name in vtab) for group in GROUPS] == [7, 4, 8]
    assert [DATASETS[name].title for name in (vtab[0], vtab[-1])] == ["CIFAR-100", "sNORB-Elev"]
    assert sum(DATASETS[name].classes for name in vtab) == 940  # a mean head of 49.5 x 769 = 38,046: the paper's .33 M
    assert sum(DATASETS[name].classes for name in fgvc) == 1173
    for settings in DATASETS.values():
        assert all(count > 0 for count in settings.sizes.values())
        assert set(settings.varying) <= set(settings.sizes)
    assert [name for name in DATASETS if DATASETS[name].drop_last] == ["NABirds"]
    assert [name for name in DATASETS if DATASETS[name].restarts] == ["CUB_200_2011", "StanfordDogs"]


@pytest.mark.parametrize(
    ("given", "suggested"),
    [("cifar100", "cifar"), ("CUB", "CUB_200_2011"), ("smallnorb_elev", "smallnorb_ele"), ("Pets", "oxford_iiit_pet")],
)
def test_an_unknown_name_gets_the_nearest_ones(given, suggested):
    with pytest.raises(ValueError, match=f"no dataset called '{given}'; did you mean .*{suggested}"):
        dataset_settings(given)


def test_names_are_checked_against_their_benchmark():
    with pytest.raises(ValueError, match="no dataset of fgvc called 'imagenet'; there are CUB_200_2011, NABirds"):
        dataset_settings("imagenet", "fgvc")
    with pytest.raises(ValueError, match="benchmark must be one of vtab, fgvc; got 'glue'"):
        dataset_names("glue")
    assert [settings.name for settings in selected_datasets("vtab", ["kitti", "cifar"])] == ["cifar", "kitti"]


# ---------------------------------------------------------------- layouts


def test_vtab_splits(tmp_path):
    folder = make_vtab(tmp_path, "kitti", 8, 4, 6)
    settings = dataset_settings("kitti")
    honest = load_splits(tmp_path, settings)
    assert {name: len(samples) for name, samples in honest.items()} == {"train": 8, "val": 4, "test": 6}
    assert honest["train"].classes == ("0", "1", "2", "3")
    assert honest["test"].labels == (0, 1, 2, 3, 0, 1)
    assert honest["val"].paths[1] == folder / "images/val200/000001.jpg"
    paper = load_splits(tmp_path, settings, "paper")
    assert {name: len(samples) for name, samples in paper.items()} == {"train": 12, "test": 6}
    assert paper["train"].labels == honest["train"].labels + honest["val"].labels
    assert paper["train"].paths[9] == folder / "images/train800val200/000009.jpg"
    with pytest.raises(ValueError, match="split must be one of honest, paper; got 'best'"):
        load_splits(tmp_path, settings, "best")


@pytest.mark.parametrize("first", [0, 1])
def test_fgvc_splits(tmp_path, first):
    make_fgvc(tmp_path, "StanfordDogs", (2, 1, 1), first)
    settings = dataset_settings("StanfordDogs")
    honest = load_splits(tmp_path, settings)
    assert {name: len(samples) for name, samples in honest.items()} == {"train": 240, "val": 120, "test": 120}
    assert honest["test"].labels == tuple(range(120))
    assert honest["test"].paths[9] == tmp_path / "StanfordDogs/Images/010.kind/test_0.jpg"
    paper = load_splits(tmp_path, settings, "paper")
    assert {name: len(samples) for name, samples in paper.items()} == {"train": 360, "test": 120}


def test_fgvc_may_hold_all_training_images_in_one_file(rlrr, tmp_path):
    folder = make_fgvc(tmp_path, "StanfordDogs", (2, 1, 1))
    settings = dataset_settings("StanfordDogs")
    train, val = (json.loads((folder / f"{name}.json").read_text()) for name in ("train", "val"))
    (folder / "trainval.json").write_text(json.dumps(dict([*val.items(), *train.items()])))
    paper = load_splits(tmp_path, settings, "paper")
    assert paper["train"].paths[0] == folder / "Images" / next(iter(val))  # read from that file, as the authors do
    assert {name: len(samples) for name, samples in paper.items()} == {"train": 360, "test": 120}
    assert len(load_splits(tmp_path, settings)["train"]) == 240
    assert check_dataset(tmp_path, settings).counts == {"train": 240, "val": 120, "trainval": 360, "test": 120}
    for name in ("train", "val"):
        (folder / f"{name}.json").unlink()
    assert load_splits(tmp_path, settings, "paper") == paper
    with pytest.raises(
        FileNotFoundError, match=r"train\.json and .*val\.json is missing; trainval\.json alone is enough"
    ):
        load_splits(tmp_path, settings)
    found = check_dataset(tmp_path, settings)
    assert found.counts == {"trainval": 360, "test": 120}
    # The two parts vary from version to version, the whole of them does not.
    assert found.problems[0].endswith("trainval.json: 360 images, 12,000 expected")
    (folder / "test.json").unlink()
    assert check_dataset(tmp_path, settings).problems[0].endswith("test.json is missing")  # no split does without


def test_fgvc_labels_follow_the_order_of_the_authors(tmp_path):
    folder = make_fgvc(tmp_path, "CUB_200_2011")
    settings = dataset_settings("CUB_200_2011")
    numbers = load_splits(tmp_path, settings)["test"]
    assert (numbers.classes[:3], numbers.classes[-1]) == (("1", "2", "3"), "200")
    for split in ("train", "val", "test"):
        file = folder / f"{split}.json"
        file.write_text(json.dumps({path: str(label) for path, label in json.loads(file.read_text()).items()}))
    words = load_splits(tmp_path, settings)["test"]
    assert words.classes[:4] == ("1", "10", "100", "101")
    assert words.classes[-1] == "99"
    names = [words.classes[label] for label in words.labels]
    assert names == [numbers.classes[label] for label in numbers.labels]  # every image kept its class
    assert sum(a == b for a, b in zip(words.labels, numbers.labels, strict=True)) == 1


def test_fgvc_classes_may_be_words_and_paths_start_at_the_dataset(tmp_path):
    folder = make_fgvc(tmp_path, "StanfordDogs")
    for split in ("train", "val", "test"):
        file = folder / f"{split}.json"
        entries = json.loads(file.read_text())
        file.write_text(json.dumps({f"Images/{path}": f"n{label:04}" for path, label in entries.items()}))
    samples = load_splits(tmp_path, dataset_settings("StanfordDogs"))["test"]
    assert samples.labels == tuple(range(120))
    assert samples.classes[:2] == ("n0001", "n0002")
    assert samples.paths[0].is_file()


def test_transforms_are_the_papers():
    image = Image.new("RGB", (300, 100), (255, 0, 127))
    kitti, cifar, cub = map(dataset_settings, ("kitti", "cifar", "CUB_200_2011"))
    assert [augmentation(settings) for settings in (kitti, cifar, cub)] == ["flip", "none", "crop"]
    for settings in (kitti, cub):
        ours = preprocessing(settings)
        for transform in (ours.transform(), ours.transform(augmentation(settings))):
            pixels = transform(image)
            assert pixels.shape == (3, 224, 224)
            torch.testing.assert_close(pixels[:2, 0, 0], torch.tensor([1.0, -1.0]))  # mean and std 0.5
    left, right = Image.new("L", (60, 30)), Image.new("L", (60, 30), 255)
    left.paste(right, (30, 0))
    squashed = preprocessing(kitti, 32).transform()(left.convert("RGB"))
    assert squashed[0, :, 0].max() < -0.9  # both ends of the wide image are still there
    assert squashed[0, :, -1].min() > 0.9


def test_pixels_are_those_of_the_authors_transforms():
    noise = torch.randint(0, 256, (333, 500, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    steps, modes = torchvision.transforms, torchvision.transforms.InterpolationMode
    end = [steps.ToTensor(), steps.Normalize([0.5] * 3, [0.5] * 3)]
    fgvc = steps.Compose([steps.Resize((256, 256)), steps.CenterCrop((224, 224)), *end])
    vtab = steps.Compose([steps.Resize((224, 224), modes.BICUBIC), *end])
    for name, theirs in (("CUB_200_2011", fgvc), ("kitti", vtab)):
        ours = preprocessing(dataset_settings(name))
        assert torch.equal(ours.transform()(image), theirs(image)), name
    # In training a random window of the squashed image, or of its mirror.
    squashed = steps.Compose([steps.Resize((256, 256)), *end])(image)
    windows = [side.unfold(1, 224, 1).unfold(2, 224, 1)[:, :, :, 0, 0] for side in (squashed, squashed.flip(2))]
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        crop = preprocessing(dataset_settings("CUB_200_2011")).transform("crop")(image)
        places = [
            (mirrored, *place)
            for mirrored, side in enumerate((squashed, squashed.flip(2)))
            for place in ((windows[mirrored] - crop[:, :1, :1]).abs().amax(0) < 0.02).nonzero().tolist()
            if (side[:, place[0] : place[0] + 224, place[1] : place[1] + 224] - crop).abs().max() < 0.02
        ]
        assert len(places) == 1, seed
        seen.update(places)
    assert len(seen) == 8
    assert {mirrored for mirrored, *_ in seen} == {0, 1}


# ---------------------------------------------------------------- bad input


def test_lists_of_windows_are_read(tmp_path):
    make_vtab(tmp_path, "kitti", 8, 4, 6)
    make_fgvc(tmp_path, "OxfordFlowers")
    before = [load_splits(tmp_path, dataset_settings(name)) for name in ("kitti", "OxfordFlowers")]
    for file in (*tmp_path.glob("kitti/*.txt"), *tmp_path.glob("OxfordFlowers/*.json")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [load_splits(tmp_path, dataset_settings(name)) for name in ("kitti", "OxfordFlowers")] == before


def test_damaged_vtab_lists_are_told_with_file_and_line(tmp_path):
    folder = make_vtab(tmp_path, "kitti", 8, 4, 6)
    settings = dataset_settings("kitti")
    edit(folder / "train800.txt", "images/train800/000001.jpg 1", "images/train800/000001.jpg 4")
    edit(folder / "train800.txt", "images/train800/000003.jpg 3", "images/train800/000003.jpg")
    edit(folder / "train800.txt", "images/train800/000005.jpg 1", "images/train800/nowhere.jpg 1")
    edit(folder / "train800.txt", "images/train800/000007.jpg 3", "images/train800/000006.jpg 3")
    with pytest.raises(ValueError, match=r"kitti in .* is damaged") as caught:
        load_splits(tmp_path, settings)
    message = str(caught.value)
    for text in (
        "train800.txt, line 2: the label must be from 0 to 3, kitti has 4 classes; got 4",
        "train800.txt, line 4: expected 'relative/path label'; got 'images/train800/000003.jpg'",
        f"train800.txt, line 6: the image {folder}/images/train800/nowhere.jpg is missing",
        "train800.txt, line 8: the image images/train800/000006.jpg is named twice",
    ):
        assert text in message
    (folder / "train800.txt").write_bytes(b"a.png 1\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"train800\.txt, line 2: not a text file"):
        load_splits(tmp_path, settings)
    (folder / "train800.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train800\.txt names no image"):
        load_splits(tmp_path, settings)
    (folder / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"split file .*val200\.txt is missing"):
        load_splits(tmp_path, settings)
    with pytest.raises(FileNotFoundError, match=r"dataset folder .*cifar does not exist"):
        load_splits(tmp_path, dataset_settings("cifar"))


def test_damaged_fgvc_files_are_told_with_file_and_entry(tmp_path):
    folder = make_fgvc(tmp_path, "OxfordFlowers")
    settings = dataset_settings("OxfordFlowers")
    good = (folder / "train.json").read_text()

    def fails(text, message):
        (folder / "train.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_splits(tmp_path, settings)

    fails(good[:-20], r"train\.json, line 1: ")
    fails("[1, 2]", r"train\.json must hold one JSON object")
    fails(good.replace(": 7,", ": null,"), r"train\.json, entry '007.kind/train_0.jpg': the class must be a number")
    fails(good.replace(": 7,", ": 700,"), "name 103 classes together; OxfordFlowers has 102")
    fails(good.replace("008.kind", "007.kind"), r"entry '007.kind/train_0.jpg': the image is named twice")
    fails(good.replace("009.kind/train", "009.kind/lost"), r"entry '009.kind/lost_0.jpg': the image .* is missing")


# ---------------------------------------------------------------- check


def test_a_whole_download_passes_the_check(rlrr, tmp_path):
    make_vtab(tmp_path, "kitti")
    found = check_dataset(tmp_path, dataset_settings("kitti"))
    assert (found.problems, found.warnings) == ((), ())
    assert found.counts == {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    assert (found.classes, found.images) == (4, 2711)
    status, printed = rlrr("data", "check", tmp_path, "--dataset", "kitti", "--no-images")
    assert status == 0
    assert "kitti" in printed
    assert "4 of 4" in printed
    assert "good" in printed


def test_check_finds_what_would_spoil_a_result(rlrr, tmp_path):
    folder = make_vtab(tmp_path, "kitti", 800, 200, 700)
    (folder / "images/test/000003.jpg").write_bytes(b"no image")
    first = (folder / "images/train800/000000.jpg").read_bytes()
    (folder / "images/train800/000000.jpg").write_bytes(first[: len(first) // 2])
    edit(folder / "val200.txt", "images/val200/000000.jpg 0", "images/train800/000004.jpg 0")
    edit(folder / "train800val200.txt", "images/train800val200/000000.jpg 0", "images/test/000000.jpg 0")
    found = check_dataset(tmp_path, dataset_settings("kitti"))
    problems = "\n".join(found.problems)
    for text in (
        "test.txt: 700 images, 711 expected",
        "1 images are in both train800 and val200, such as",
        "1 images are in both train800val200 and test, such as",
        "cannot read the image",
        "000003.jpg",
        "train800/000000.jpg",
    ):
        assert text in problems
    status, printed = rlrr("data", "check", tmp_path, "--benchmark", "vtab")
    assert status == 1
    assert "wrong: " in printed
    status, printed = rlrr("data", "check", tmp_path, "--dataset", "kiti")
    assert status == 1
    assert "did you mean kitti" in printed


def test_absent_datasets_are_not_wrong_unless_they_were_named(rlrr, tmp_path):
    make_vtab(tmp_path, "kitti")
    for arguments in ((), ("--benchmark", "vtab")):
        status, printed = rlrr("data", "check", tmp_path, *arguments, "--no-images")
        assert (status, printed.count("absent")) == (0, 18), printed
        assert "wrong" not in printed
    assert check_dataset(tmp_path, dataset_settings("cifar")).absent
    status, printed = rlrr("data", "check", tmp_path, "--dataset", "kitti,cifar", "--no-images")
    assert status == 1
    assert f"wrong: the dataset folder {tmp_path}/cifar does not exist" in printed


def test_lists_are_compared_by_what_their_images_show(tmp_path):
    folder, settings = make_vtab(tmp_path, "kitti", 80, 20, 40), dataset_settings("kitti")
    images = folder / "images"

    def told(decode=True):
        found = check_dataset(tmp_path, settings, decode=decode)
        return [text for text in (*found.problems, *found.warnings) if "expected" not in text]

    assert told() == told(decode=False) == []
    lines = (folder / "train800val200.txt").read_text().splitlines(True)
    (folder / "train800val200.txt").write_text("".join(reversed(lines)))
    assert told() == told(decode=False) == []  # the order is free
    (folder / "train800val200.txt").write_text("".join(lines))

    kept = (images / "train800val200/000005.jpg").read_bytes()
    (images / "train800val200/000005.jpg").write_bytes((images / "train800val200/000009.jpg").read_bytes())
    (problem,) = told()
    assert problem.startswith(
        "kitti: train800val200 is not train800 and val200 together: 1 of their images with these labels are not in it, "
        "1 of its are not theirs, such as "
    )
    assert problem.endswith(("000005.jpg", "000009.jpg"))
    assert told(decode=False) == []
    (images / "train800val200/000005.jpg").write_bytes(kept)

    edit(folder / "train800val200.txt", "000005.jpg 1", "000005.jpg 2")
    assert "train800val200 is not train800 and val200 together: 1 of their" in told()[0]
    assert told(decode=False) == ["kitti: train800val200 is not train800 and val200 together: the labels differ"]
    edit(folder / "train800val200.txt", "000005.jpg 2", "000005.jpg 1")

    # Copies of training images among the test images: a few may be the dataset's own, many are a mistake.
    for i in range(9):
        copy = (images / f"train800/{i:06}.jpg").read_bytes()
        (images / f"test/{i:06}.jpg").write_bytes(copy)
        found = check_dataset(tmp_path, settings)
        messages = found.warnings if i < 8 else found.problems
        assert [text for text in messages if "pixels" in text] == [
            f"kitti: {i + 1} of 80 images of train800 have the pixels of one of test, such as "
            f"{images}/train800/000000.jpg and {images}/test/000000.jpg"
        ]
    assert told(decode=False) == []


def test_numbers_that_vary_are_notes_and_no_failure(tmp_path):
    make_fgvc(tmp_path, "OxfordFlowers", (10, 10, 1))
    folder = make_fgvc(tmp_path, "StanfordCars", (1, 1, 1))
    cars = check_dataset(tmp_path, dataset_settings("StanfordCars"), decode=False)
    assert len(cars.warnings) == 2
    assert "train.json: 196 images, 7,329 expected (other versions exist)" in cars.warnings[0]
    assert [problem.rpartition("/")[2] for problem in cars.problems] == ["test.json: 196 images, 8,041 expected"]
    flowers = check_dataset(tmp_path, dataset_settings("OxfordFlowers"), decode=False)
    assert flowers.warnings == ()
    assert flowers.classes == 102
    (folder / "val.json").unlink()
    assert "val.json is missing" in check_dataset(tmp_path, dataset_settings("StanfordCars")).problems[0]
    names = [settings.name for settings in datasets_to_check(tmp_path, None, None)]
    assert names == dataset_names("fgvc")  # none of VTAB-1k is there


def test_classes_without_training_images_are_noted(tmp_path):
    folder = make_vtab(tmp_path, "kitti", 8, 4, 6)
    for split in ("train800", "val200", "train800val200"):
        file = folder / f"{split}.txt"
        file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.endswith(" 2\n")))
    found = check_dataset(tmp_path, dataset_settings("kitti"))
    assert found.classes == 3
    assert "kitti: 1 of 4 classes have no training image, 1 of them are tested" in found.warnings


def test_check_needs_something_to_check(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        datasets_to_check(tmp_path / "nowhere", None, None)
    with pytest.raises(ValueError, match=r"holds none of the datasets' folders, such as cifar .* it holds nothing"):
        datasets_to_check(tmp_path, None, None)


# ---------------------------------------------------------------- torchvision


class Fake(torchvision.datasets.FakeData):
    """Small images of 102 classes; takes the arguments of every torchvision dataset."""

    size_of: ClassVar = {"train": 600, "val": 500, None: 1300}

    def __init__(self, root, download, **arguments):
        part = arguments.get("split", arguments.get("train"))
        super().__init__(self.size_of.get(part, 20), (3, 4, 5), 102, random_offset=1000 * sum(map(ord, str(part))))


class FakeCounts(Fake):
    """Labels are numbers of objects, 3 to 10."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, 3 + label % 8


def test_torchvisions_dataset_becomes_the_published_layout(monkeypatch, tmp_path, rlrr):
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Fake)
    status, printed = rlrr("data", "prepare", "oxford_flowers102", "--root", tmp_path)
    assert status == 0, printed
    assert "oxford_flowers102: torchvision's Flowers102, not the published split" in printed
    settings = dataset_settings("oxford_flowers102")
    splits = load_splits(tmp_path, settings)
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 800, "val": 200, "test": 20}
    original = Fake("", False, split="test")
    image, label = ImageDataset(splits["test"], torchvision.transforms.functional.pil_to_tensor)[7]
    assert label == original[7][1]
    assert torch.equal(image, torchvision.transforms.functional.pil_to_tensor(original[7][0]))  # without loss
    found = check_dataset(tmp_path, settings)
    assert found.problems == ()
    assert any("not the published split" in warning for warning in found.warnings)
    status, printed = rlrr("data", "prepare", "oxford_flowers102", "--root", tmp_path)
    assert status == 1
    assert "exists already; remove it to prepare it anew" in printed


def test_the_draw_depends_on_the_seed_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Fake)
    monkeypatch.setitem(Fake.size_of, None, 1050)
    monkeypatch.setattr("rlrr_kernels.paper.prepare._rgb", lambda image: image.resize((1, 1)))
    settings = dataset_settings("eurosat")
    lists = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = prepare_dataset(tmp_path / name, settings, seed=seed)
        lists.append([(folder / f"{split}.txt").read_text() for split in ("train800", "val200", "test")])
    assert lists[0] == lists[1] != lists[2]
    assert [len(text.splitlines()) for text in lists[0]] == [800, 200, 50]


def test_clevr_counts_start_at_three_objects(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CLEVRClassification", FakeCounts)
    monkeypatch.setitem(Fake.size_of, "train", 1000)
    settings = dataset_settings("clevr_count")
    prepare_dataset(tmp_path, settings)
    assert set(load_splits(tmp_path, settings)["train"].labels) == set(range(8))


def test_fgvc_from_torchvision_keeps_published_splits(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Fake)
    monkeypatch.setitem(Fake.size_of, "train", 1020)
    monkeypatch.setitem(Fake.size_of, "val", 1020)
    settings = dataset_settings("OxfordFlowers")
    prepare_dataset(tmp_path, settings)
    assert split_note(tmp_path, settings) is None
    splits = load_splits(tmp_path, settings)
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 1020, "val": 1020, "test": 20}
    assert isinstance(splits["train"], Samples)


def test_what_torchvision_cannot_give_is_told(monkeypatch, tmp_path):
    assert set(TORCHVISION) <= set(DATASETS)
    with pytest.raises(
        ValueError, match="torchvision does not have the dataset dmlab, the published archive is needed"
    ):
        prepare_dataset(tmp_path, dataset_settings("dmlab"))

    class Missing:
        def __init__(self, *_, **__):
            raise RuntimeError("Dataset not found")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Missing)
    with pytest.raises(OSError, match=r"torchvision could not fetch or read CIFAR100 in .*: Dataset not found"):
        prepare_dataset(tmp_path, dataset_settings("cifar"), download=False)
    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    with pytest.raises(ValueError, match="torchvision's SVHN has too few images for train800, val200 of svhn: 600"):
        prepare_dataset(tmp_path, dataset_settings("svhn"))
    assert not list(tmp_path.glob("*vhn*"))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_classes_take_these_arguments(name):
    source = TORCHVISION[name]
    signature = inspect.signature(getattr(torchvision.datasets, source.dataset))
    for arguments in (*source.train, source.test or {}, source.val or {}):
        signature.bind("root", download=False, **arguments)
