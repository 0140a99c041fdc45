"""Damaged files of every kind that training reads: a ``ValueError`` or ``OSError`` that names the file, or no error.

Mutants are made from a seed and a number: 500 in all, 5,000 among the slow tests. Nothing on the disk may change.
"""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_folders import make_splits
from tests.support.mutants import DEEP, VALUES, mutate_bytes, mutate_entry

timm = pytest.importorskip("timm", reason="the training library needs timm")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from safetensors.torch import save

from rlrr_kernels.train.config.files import config_to_dict, read_config, write_config
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import find_splits
from rlrr_kernels.train.data.images import read_image
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.grid.runs import GridRun, finished_result
from rlrr_kernels.train.loop import checkpoint
from rlrr_kernels.train.models.backbones import create_model
from rlrr_kernels.train.output.environment import add_session
from rlrr_kernels.train.run.config import FinetuneConfig

TINY = {"depth": 1, "embed_dim": 8, "num_heads": 1}
VIT = "vit_tiny_patch16_224"


def mutate_json(data: bytes, numbers: random.Random) -> bytes:
    """The document with one of its entries lost, renamed or replaced by something else, or with other bytes."""
    if numbers.random() < 0.2:
        return mutate_bytes(data, numbers)
    document = json.loads(data)
    if numbers.random() < 0.05:
        return json.dumps(numbers.choice(VALUES)).encode()
    mutate_entry(document, numbers)
    text = json.dumps(document)
    return (text.replace("null", DEEP, 1) if numbers.random() < 0.05 else text).encode()


# ---------------------------------------------------------------- what is mutated, and who reads it


def config_files(folder: Path) -> tuple[bytes, Path, Callable]:
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    config = FinetuneConfig(
        model=VIT, data=folder, out=folder / "out", weights=folder / "w.npz", preprocessing=preprocessing, rank=2,
        convs="*", drop=0.1, train=TrainConfig(ema_decay=0.9, clip_grad=1.0, workers=1),
    )  # fmt: skip
    file = folder / "config.json"
    return write_config(config), file, lambda: write_config(read_config(FinetuneConfig, file))


def results(folder: Path) -> tuple[bytes, Path, Callable]:
    run = GridRun("run", FinetuneConfig(model=VIT, data=folder))
    scores = {"loss": 0.5, "accuracy": 0.9, "macro_f1": 0.8, "recall": [0.9, None], "count": 12}
    document = {
        "settings": run.config.settings(),
        "validation": scores,
        "test": None,
        "history": [{"epoch": 1, "val_loss": 0.5}],
        "trained_parameters": 12,
    }
    file = folder / "run" / "result.json"
    file.parent.mkdir()
    return json.dumps(document).encode(), file, lambda: finished_result(run, folder)


def environments(folder: Path) -> tuple[bytes, Path, Callable]:
    session = {"started": "2026-01-01", "command": ["rlrr"], "versions": {"torch": "2"}, "threads": 1}
    file = folder / "environment.json"

    def read() -> None:
        assert json.loads(add_session(file, session, resumed=True))["sessions"][-1] == session

    return json.dumps({"sessions": [session, session]}).encode(), file, read


def checkpoints(folder: Path) -> tuple[bytes, Path, Callable]:
    state = {
        "settings": config_to_dict(TrainConfig()),
        "tensors": {"scale": torch.randn(40), "shift": torch.randn(3, 5)},
        "random": [checkpoint.rng_state()],
        "history": [{"epoch": 1}],
    }
    checkpoint.save_checkpoint(folder, state)
    file = folder / checkpoint.NAME
    whole = file.read_bytes()

    def read() -> None:
        found = checkpoint.load_checkpoint(folder)
        if file.read_bytes()[:200] != whole[:200]:
            return  # whatever else was read, it says that it is a checkpoint of this version
        for name, tensor in found.get("tensors", {}).items():
            assert torch.equal(tensor, state["tensors"][name]), "other numbers went in unnoticed"

    return whole, file, read


def weights(ending: str) -> Callable[[Path], tuple[bytes, Path, Callable]]:
    def prepare(folder: Path) -> tuple[bytes, Path, Callable]:
        torch.manual_seed(0)
        model = timm.create_model(VIT, num_classes=0, img_size=32, **TINY)
        stream = io.BytesIO()
        if ending == "safetensors":
            stream.write(save(model.state_dict()))
        elif ending == "npz":
            np.savez(stream, **google_arrays(model))
        else:
            torch.save(
                {"model": model.state_dict(), "epoch": 3}, stream, _use_new_zipfile_serialization=ending == "pth"
            )
        file = folder / f"weights.{ending}"
        return stream.getvalue(), file, lambda: create_model(VIT, 2, image_size=32, weights=file)

    return prepare


def google_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A ViT of one block and one head as Google's files have it."""
    block, attention = model.blocks[0], "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    arrays = {
        "cls": model.cls_token,
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias,
        "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "Transformer/encoder_norm/scale": model.norm.weight,
        "Transformer/encoder_norm/bias": model.norm.bias,
    }
    for name, weight, bias in zip(
        ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
    ):
        arrays |= {f"{attention}/{name}/kernel": weight.T[:, None], f"{attention}/{name}/bias": bias[None]}
    arrays |= {f"{attention}/out/kernel": block.attn.proj.weight.T[None], f"{attention}/out/bias": block.attn.proj.bias}
    for name, layer in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
        place = f"Transformer/encoderblock_0/MlpBlock_3/{name}"
        arrays |= {f"{place}/kernel": layer.weight.T, f"{place}/bias": layer.bias}
    for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
        place = f"Transformer/encoderblock_0/{name}"
        arrays |= {f"{place}/scale": norm.weight, f"{place}/bias": norm.bias}
    return {name: tensor.detach().numpy() for name, tensor in arrays.items()}


def images(kind: str, mode: str = "RGB") -> Callable[[Path], tuple[bytes, Path, Callable]]:
    def prepare(folder: Path) -> tuple[bytes, Path, Callable]:
        stream = io.BytesIO()
        values = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
        picture = Image.fromarray(values) if mode == "RGB" else Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        picture.save(stream, kind)
        file = folder / f"image.{kind}"

        def read() -> None:
            assert read_image(file).mode == "RGB"

        return stream.getvalue(), file, read

    return prepare


KINDS: dict[str, tuple[int, Callable, Callable[[bytes, random.Random], bytes]]] = {
    "config.json": (90, config_files, mutate_json),
    "result.json": (70, results, mutate_json),
    "environment.json": (40, environments, mutate_json),
    "checkpoint": (60, checkpoints, mutate_bytes),
    "safetensors": (30, weights("safetensors"), mutate_bytes),
    "pth": (40, weights("pth"), mutate_bytes),
    "old pth": (20, weights("pt"), mutate_bytes),
    "npz": (30, weights("npz"), mutate_bytes),
    "png": (20, images("png"), mutate_bytes),
    "jpeg": (20, images("jpeg"), mutate_bytes),
    "tiff": (20, images("tiff", "I;16"), mutate_bytes),
    "gif": (10, images("gif"), mutate_bytes),
    "webp": (10, images("webp"), mutate_bytes),
}
"""Kind of file → how many mutants of 500 it gets, what prepares it, what mutates it; folders get the rest."""

FOLDERS = 500 - sum(count for count, _, _ in KINDS.values())


@pytest.fixture(autouse=True)
def _small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model that is filled a few kilobytes large."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **TINY | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(folder: Path, named: Path, read: Callable, label: str) -> None:
    """Reads once: what is raised names ``named``, and no file is changed."""
    before = contents(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except Exception as error:
        if not isinstance(error, ValueError | OSError) or str(named) not in str(error):
            raise AssertionError(f"{label}: {error!r} must be a ValueError or OSError that names {named}") from error
    assert contents(folder) == before, label


def check_files(kind: str, count: int, folder: Path) -> None:
    _, prepare, mutate = KINDS[kind]
    data, file, read = prepare(folder)
    file.write_bytes(data)
    read()  # the whole file is right
    for number in range(count):
        mutant = mutate(data, random.Random(f"{kind} {number}"))
        file.write_bytes(mutant)
        check(folder, file, read, f"{kind} {number}")


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_of_files(tmp_path, kind):
    check_files(kind, KINDS[kind][0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutants_of_files(tmp_path, kind):
    check_files(kind, 10 * KINDS[kind][0], tmp_path)


# ---------------------------------------------------------------- folders of images


def change_folder(folder: Path, numbers: random.Random) -> None:
    """Renames, removes, links and empties things in an image folder, a few at a time."""
    for _ in range(numbers.randrange(1, 4)):
        places = sorted(path for path in folder.rglob("*") if not path.is_symlink())
        if not places:
            return
        place = numbers.choice(places)
        kind = numbers.randrange(5)
        name = numbers.choice(("train", "Test", "dev", ".hidden", "images", "a b", "[red]", "x.png", "x.txt", "ü"))
        if kind == 0 and not place.with_name(name).exists():
            place.rename(place.with_name(name))
        elif kind == 1 and place.is_file():
            place.unlink()
        elif kind == 2 and place.is_file():
            place.write_bytes(b"")
        elif kind == 3 and not (place.parent / name).exists():
            (place.parent / name).mkdir()
        elif kind == 4 and not (place.parent / name).is_symlink() and not (place.parent / name).exists():
            (place.parent / name).symlink_to(numbers.choice(places).resolve())


def check_folders(count: int, folder: Path) -> None:
    for number in range(count):
        images = folder / str(number)
        make_splits(images, 2, 1, 1)
        change_folder(images, random.Random(f"folder {number}"))

        def read(images: Path = images) -> None:
            for samples in find_splits(images).values():
                assert len(samples.classes) > 1
                assert all(path.is_file() for path in samples.paths)

        check(images, images, read, f"folder {number}")


def test_mutants_of_image_folders(tmp_path):
    assert FOLDERS == 40
    check_folders(FOLDERS, tmp_path)


@pytest.mark.slow
def test_many_mutants_of_image_folders(tmp_path):
    check_folders(10 * FOLDERS, tmp_path)
