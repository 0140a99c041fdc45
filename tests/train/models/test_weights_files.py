"""``--weights FILE``: what the model is filled with is what the file holds, or the file is refused by name."""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")

from safetensors.torch import save, save_file

from rlrr_kernels.train.models.backbones import create_model

NAME = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=0).state_dict()


def load(file: Path, name: str = NAME) -> dict[str, Tensor]:
    return create_model(name, 2, weights=file)[0].state_dict()


def refused(file: Path, message: str, name: str = NAME) -> None:
    with pytest.raises(ValueError, match=rf"the weights file {re.escape(str(file))} does not fit {name}: .*{message}"):
        load(file, name)


def assert_filled(file: Path, state: dict[str, Tensor], name: str = NAME) -> None:
    loaded = load(file, name)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_without_the_backbone_s_tensors_is_no_reason_to_ask_a_hub(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: pytest.fail("asked the hub"))
    write = save_file if ending == "safetensors" else torch.save
    head = tmp_path / f"head.{ending}"
    write({"head.weight": torch.ones(2, 64), "head.bias": torch.ones(2)}, head)
    refused(head, r"its 2 tensors are all of a classifier: head\.(weight|bias), head\.(weight|bias)")
    empty = tmp_path / f"empty.{ending}"
    write({}, empty)
    refused(empty, "it holds none of the backbone's tensors; it is empty")


def test_a_file_goes_before_what_the_model_s_name_refers_to(tmp_path, state):
    """timm takes the weights of hf-hub: and local-dir: names from there, whatever state dict it is handed."""
    folder, file = tmp_path / "theirs", tmp_path / "mine.safetensors"
    folder.mkdir()
    config = {"architecture": NAME, "num_classes": 0, "model_args": {"img_size": 160}, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: torch.zeros_like(tensor) for key, tensor in state.items()}, folder / "model.safetensors")
    save_file(state, file)
    assert_filled(file, state, f"local-dir:{folder}")


def test_tensors_that_timm_would_leave_at_random_are_named(tmp_path):
    state = timm.create_model("dla34", num_classes=0).state_dict()
    file = tmp_path / "dla.pth"
    torch.save({key: tensor for key, tensor in state.items() if key != "base_layer.0.weight"}, file)
    refused(file, r"missing in the file: base_layer\.0\.weight", "dla34")
    torch.save(state, file)
    assert_filled(file, state, "dla34")
    assert "load_state_dict" not in vars(timm.models.dla.DLA)  # as it was


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "backbone.", "encoder.", "module._orig_mod.", "model.backbone."]
)
def test_a_prefix_that_all_names_share_is_taken_off_and_told(tmp_path, state, prefix):
    file = tmp_path / "wrapped.ckpt"
    torch.save({"state_dict": {f"{prefix}{key}": tensor for key, tensor in state.items()}, "epoch": 3}, file)
    with pytest.warns(
        UserWarning, match=f"wrapped.ckpt: the prefix '{prefix}', which all its names share, is taken off"
    ):
        assert_filled(file, state)


def test_a_file_with_weights_and_their_average_says_which_it_took(tmp_path, state):
    file, other = tmp_path / "both.pth", {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"model": other, "model_ema": state, "optimizer": {"state": {}, "param_groups": []}}, file)
    with pytest.warns(UserWarning, match=r"both\.pth: the weights model_ema are taken, model left"):
        assert_filled(file, state)
    torch.save({"student": other, "teacher": state}, file)
    refused(file, "it holds several sets of weights, student, teacher; save one of them")


def within(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (lambda a, b: {"model": a, "model_ema": {"module": b, "decay": 0.99}}, r"model_ema\.module are taken, model"),
        (lambda a, b: {"state_dict": a, "ema": {"updates": 3, "state": b}}, r"ema\.state are taken, state_dict"),
        (lambda a, b: {"model": a, "ema": {**b, "decay": 0.99}}, "ema are taken, model"),
        (lambda a, b: {"model": a, "ema_model": b}, "ema_model are taken, model"),
        (lambda a, b: {"state_dict": a, "averaged": b}, "averaged are taken, state_dict"),
        (lambda a, b: {"net": a, "modelEMA": b, "avg_loss": torch.ones(3)}, "modelEMA are taken, net"),
        (lambda a, b: {"checkpoint": {"model": a, "swa": b}}, r"checkpoint\.swa are taken, checkpoint\.model"),
        (lambda a, b: {"model": a, "swa": {"n_averaged": torch.tensor(5), **within("module.", b)}}, "swa are taken"),
        (lambda a, b: {"n_averaged": torch.tensor(5), **within("module.", b)}, "prefix 'module.'"),
        (lambda a, b: {"model": b, "ema": None, "ema_stats": {"decay": torch.tensor(0.9)}, "avg": [1.0]}, None),
        (lambda a, b: {"checkpoint": {"model": b, "optimizer": {"ema": {"cls_token": torch.ones(3)}}}}, None),
    ],
)
def test_the_average_is_found_wherever_it_is_and_whatever_it_is_called(tmp_path, state, content, taken):
    file, other = tmp_path / "both.pth", {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save(content(other, state), file)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_filled(file, state)
    assert len(told) >= (taken is not None)
    assert taken is None or re.search(taken, str(told[0].message))


def test_an_average_that_cannot_be_read_or_told_is_refused(tmp_path, state):
    file = tmp_path / "odd.pth"
    for average in ([*state.values()], {"shadow_params": [*state.values()]}, dict(enumerate(state.values()))):
        torch.save({"model": state, "ema": average}, file)
        refused(file, r"its entry ema\S* is called like an average of the weights, but does not hold tensors by name")
    torch.save({"model": state, "ema": state, "swa": state}, file)
    refused(file, "it holds several sets of weights, ema, swa; save one of them")
    torch.save({"epoch": 3, "blocks": [*state.values()]}, file)
    refused(file, "none of the backbone's tensors; tensors by name are not in its entries 'epoch', 'blocks'")


def test_a_refusal_names_five_tensors_and_counts_the_rest(tmp_path, state):
    file = tmp_path / "other.pth"
    torch.save({f"x{i}.weight": torch.ones(2) for i in range(300)}, file)
    with pytest.raises(ValueError) as error:
        load(file)
    assert "Missing key(s) in state_dict: cls_token, pos_embed, patch_embed.proj.weight" in str(error.value)
    assert "and 295 more" in str(error.value)
    assert len(str(error.value)) < 700
    torch.save({key: tensor[None] for key, tensor in state.items() if key != "pos_embed"}, file)
    with pytest.raises(ValueError, match="more of another size") as error:
        load(file)
    assert str(error.value).count("size mismatch") == 5


def test_numbers_that_cannot_be_weights_are_named(tmp_path, state):
    file, key = tmp_path / "bad.safetensors", "blocks.0.attn.qkv.weight"
    spoilt = state[key].clone()
    spoilt[3, 4] = torch.nan
    save_file(state | {key: spoilt}, file)
    refused(file, f"{key} holds NaN or infinite numbers")
    data = save(state)
    assert data.count(b'"dtype":"F32"') == len(state)
    file.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    refused(file, "must be of floating-point numbers; it is int32")

    file = tmp_path / "bad.pth"
    torch.save(state | {key: state[key].to_sparse()}, file)
    refused(file, f"{key} must be a dense tensor; it is sparse_coo")
    torch.save(state | {key: state[key].to("meta")}, file)
    refused(file, rf"{key} must be a dense tensor; it has no values \(meta\)")


def test_a_damaged_pytorch_file_is_told_by_its_checksums(tmp_path, state):
    file = tmp_path / "flipped.pth"
    torch.save(state, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(file, "it is damaged: the checksum of .* does not hold")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "it is empty"),
        ("junk.pth", b"no weights at all", r"it is truncated, damaged or was not written by torch\.save"),
        ("empty.safetensors", b"", r"it is truncated or no safetensors file"),
        ("junk.safetensors", b"no weights at all", r"it is truncated or no safetensors file"),
        ("junk.npz", b"no weights at all", r"it is truncated or no \.npz file"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    refused(file, message)


def test_an_array_is_no_npz(tmp_path):
    file = tmp_path / "array.npz"
    with open(file, "wb") as stream:
        np.save(stream, np.zeros(3))
    refused(file, "it holds a single array")


def test_integers_in_an_npz_are_named(tmp_path):
    np.savez(tmp_path / "ints.npz", cls=np.ones((1, 1, 64), np.int32))
    refused(tmp_path / "ints.npz", "the arrays do not match:(.|\n)*not of floating-point numbers: cls")


class Foreign:
    """No tensor."""


def test_no_code_runs_from_a_weights_file_and_the_advice_can_be_followed(tmp_path, state):
    file = tmp_path / "objects.pth"
    torch.save(OrderedDict(model=state, extra=Foreign()), file)
    with pytest.raises(
        ValueError, match=r"holds objects other than tensors \(.*Foreign\).*save the weights alone"
    ) as error:
        load(file)
    assert "weights_only" not in str(error.value)
