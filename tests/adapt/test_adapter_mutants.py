"""Adapter folders changed at random load as they were saved, or raise an error that names them and change nothing."""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlrr_kernels import RLRRConfig, adapt_model, adapter_info, is_adapted, load_adapter, save_adapter
from rlrr_kernels.adapt.folder.files import _document_digest, _tensor_digest
from tests.support.mutants import DEEP, mutate_bytes, mutate_entry
from tests.support.tiny_models import disturb

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")
from safetensors.torch import load, save

TENSORS, CONFIG = "adapter.safetensors", "config.json"


def _is_written(dtype: torch.dtype) -> bool:
    """Whether this safetensors knows the dtype."""
    try:
        save({"x": torch.zeros(1, dtype=dtype)})
    except KeyError:
        return False
    return True


OTHER_DTYPES = [*filter(_is_written, (torch.float64, torch.int32, torch.bool, torch.complex64))]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


Files = dict[str, bytes]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_document(files: Files, document: Any, where: tuple[str, ...], draw: random.Random) -> Files:
    """``document`` in ``config.json`` or its copy; in both, with digests that fit or without."""
    if isinstance(document, dict) and where == (CONFIG, TENSORS):
        document.pop("digest", None)
        if draw.random() < 0.5:
            document.pop("tensor_digests", None)
        else:
            document["digest"] = _document_digest(json.loads(json.dumps(document)))
    text = json.dumps(document)
    if draw.random() < 0.02:
        text = text.replace("null", DEEP, 1) if "null" in text else f'{text[:-1]}, "x": {DEEP}}}'
    files = dict(files)
    if CONFIG in where:
        files[CONFIG] = text.encode()
    if TENSORS in where:
        header, data = split(files[TENSORS])
        files[TENSORS] = joined({**header, "__metadata__": {"rlrr_config": text}}, data)
    return files


def mutate_file(files: Files, draw: random.Random) -> Files:
    name = draw.choice([TENSORS, TENSORS, CONFIG])
    return {**files, name: mutate_bytes(files[name], draw)}


def mutate_document(files: Files, draw: random.Random) -> Files:
    document = json.loads(files[CONFIG])
    part = draw.choice([document, document["adaptation"], document["backbone_sample"]])
    mutate_entry(part, draw)
    return with_document(files, document, draw.choice([(CONFIG,), (TENSORS,), (CONFIG, TENSORS)]), draw)


def mutate_header(files: Files, draw: random.Random) -> Files:
    header, data = split(files[TENSORS])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    if draw.random() < 0.5:
        entry["dtype"] = draw.choice(
            ["I32", "U32", "F16", "BF16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "x"]
        )
    elif draw.random() < 0.5:
        entry["shape"] = draw.choice([[], [0], [-1], [2**63], [2**62, 4], [1, *entry["shape"]], entry["shape"][::-1]])
    else:
        mutate_entry(header, draw)
    return with_digests(files | {TENSORS: joined(header, data)}, draw)


def with_digests(files: Files, draw: random.Random) -> Files:
    """``files`` as they are, or without digests, as an older version wrote them."""
    document = json.loads(files[CONFIG])
    if draw.random() < 0.5:
        return files
    return with_document(files, {k: v for k, v in document.items() if "digest" not in k}, (CONFIG, TENSORS), draw)


def mutate_tensors(files: Files, draw: random.Random) -> Files:
    tensors, document = load(files[TENSORS]), json.loads(files[CONFIG])
    name = draw.choice(list(tensors))
    what = draw.randrange(5)
    if what == 0 and tensors[name].numel() and tensors[name].is_floating_point():
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice(
            [float("nan"), float("nan") if "running" in name else float("-inf")]
        )
    elif what == 1:
        del tensors[name]
    elif what == 2:
        tensors[draw.choice(["nowhere.weight", "body.0.weight", "x", ""])] = tensors[name].clone()
    elif what == 3:
        tensors[name] = tensors[name].to(draw.choice(OTHER_DTYPES))
    else:
        tensors[name] = tensors[name][..., :-1].contiguous() if tensors[name].dim() else tensors[name]
    document["tensor_digests"] = {key: _tensor_digest(tensor) for key, tensor in tensors.items()}
    return with_document({**files, TENSORS: save(tensors)}, document, (CONFIG, TENSORS), draw)


MUTATIONS: tuple[Callable[[Files, random.Random], Files], ...] = (
    mutate_file, mutate_document, mutate_header, mutate_tensors,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Files, dict[str, torch.Tensor]]:
    """The files of an adapter, and the state of the model they were saved from."""
    model = net()
    adapt_model(model, RLRRConfig(rank=2, groups={"body.0": 2}, heads=["norm", "head"]))
    model.body[0].bias.requires_grad_(True)
    disturb(model)
    folder = save_adapter(model, tmp_path_factory.mktemp("saved"), metadata={"classes": ["a", None]})
    return {name: (folder / name).read_bytes() for name in (TENSORS, CONFIG)}, model.state_dict()


def raised(read: Callable[[], object]) -> str | None:
    """The message of the ValueError or OSError that ``read`` raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except (ValueError, OSError) as error:
            return str(error)
    return None


def check(files: Files, folder: Path, saved_state: dict[str, torch.Tensor] | None) -> bool:
    """Loads ``files``; whether that went well. ``saved_state`` is what has to be loaded then."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    model = net()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = [type(module) for module in model.modules()]
    error = raised(lambda: load_adapter(model, folder))
    if error is not None:
        assert str(folder) in error
        assert [type(module) for module in model.modules()] == modules
        assert not is_adapted(model)
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(before)
        for name, (tensor, requires_grad) in before.items():
            assert torch.equal(after[name], tensor)
            assert after[name].requires_grad == requires_grad
        assert str(folder) in (raised(lambda: adapter_info(folder)) or str(folder))  # reads less
        return False
    if saved_state is not None:
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved_state.items())
    assert model(torch.ones(2, 6)).isfinite().all()
    return True


@pytest.mark.parametrize("seeds", [range(500), pytest.param(range(500, 5500), marks=pytest.mark.slow)], ids=len)
def test_mutants_load_as_saved_or_change_nothing(seeds, saved, tmp_path):
    files, state = saved
    assert check(files, tmp_path, state)
    loaded = dict.fromkeys(MUTATIONS, 0)
    for seed in seeds:
        draw = random.Random(seed)
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        mutant = mutation(files, draw)
        try:
            loaded[mutation] += check(mutant, tmp_path, state if mutation is mutate_file else None)
        except Exception as error:
            raise AssertionError(f"mutant {seed}, of {mutation.__name__}") from error
    for count in loaded.values():
        assert 0 < count < len(seeds) / len(MUTATIONS) / 2
