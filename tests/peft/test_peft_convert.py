"""PEFT folders, adapted models and the authors' files: each becomes the other, or an error says what has no place."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs peft, of the extra [peft]")
pytest.importorskip("timm", reason="needs timm, of the extra [models]")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rlrr_kernels import RLRRConfig, adapt_model, load_adapter, save_adapter
from rlrr_kernels.peft import RLRRPeftConfig, load_peft, to_peft
from tests.peft.test_peft_tuner import X, nested
from tests.support.tiny_models import disturb, tiny_images, tiny_model

PLAIN = ({"groups": {"*.qkv": 3}, "rank": 2}, {"sides": "left"}, {"residual": False, "shift": "with_bias", "rank": 3})


def adapted(family, **config):
    model = tiny_model(family)
    adapt_model(model, RLRRConfig(**config))
    disturb(model)
    return model


@pytest.mark.parametrize(
    ("family", "config"), [*(("vit", config) for config in PLAIN), ("swin", PLAIN[2]), ("deit", PLAIN[0])]
)
def test_there_and_back_bit_for_bit(family, config, tmp_path):
    model, images = adapted(family, **config), tiny_images(family)
    to_peft(model, tmp_path / "peft")
    in_peft = PeftModel.from_pretrained(tiny_model(family), tmp_path / "peft").eval()
    assert torch.equal(in_peft(images), model(images))
    in_peft.save_pretrained(tmp_path / "again")
    back = tiny_model(family)
    load_peft(back, tmp_path / "again")
    assert torch.equal(back(images), model(images))
    save_adapter(back, tmp_path / "adapter")
    last = tiny_model(family)
    load_adapter(last, tmp_path / "adapter")
    assert torch.equal(last(images), model(images))


@pytest.mark.parametrize(
    ("exclude", "groups"), [((), None), ((), {"2.0": 3, "0": 2}), (("2.0",), None), (("2.0",), {"0": 2})]
)
def test_names_that_are_ends_of_others(exclude, groups, tmp_path):
    model, back, last = nested(), nested(), nested()
    adapt_model(model, RLRRConfig(include=("0", "2.1"), exclude=exclude, groups=groups, init="paper", heads=()))
    to_peft(model, tmp_path / "peft")
    in_peft = PeftModel.from_pretrained(nested(), tmp_path / "peft")
    assert torch.equal(in_peft(X), model(X))
    load_peft(back, tmp_path / "peft")
    assert torch.equal(back(X), model(X))
    save_adapter(back, tmp_path / "adapter")
    load_adapter(last, tmp_path / "adapter")
    assert torch.equal(last(X), model(X))


def test_a_folder_written_with_ends_of_names_still_loads(tmp_path):
    model, back = get_peft_model(nested(), RLRRPeftConfig(init_weights=False, target_modules=["0", "2.1"])), nested()
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {"0", "2.1"}
    load_peft(back, tmp_path)
    assert torch.equal(back(X), model(X))


@pytest.mark.parametrize("family", ["vit", "swin", "deit", "dinov2"])
def test_the_paper_s_recipe_there_and_back(family, tmp_path):
    model, images = adapted(family, recipe="paper"), tiny_images(family)
    config = to_peft(model, tmp_path / "peft")
    assert {"norm"} < set(config.modules_to_save)
    in_peft = PeftModel.from_pretrained(tiny_model(family), tmp_path / "peft").eval()
    torch.testing.assert_close(in_peft(images), model(images), rtol=1e-5, atol=2e-6)
    in_peft.save_pretrained(tmp_path / "again")
    back = tiny_model(family)
    load_peft(back, tmp_path / "again", recipe="paper")
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_an_adapter_trained_in_peft_becomes_an_authors_file_and_comes_back(tmp_path):
    pytest.importorskip("torchvision", reason="needs the extra [train]")
    from rlrr_kernels.paper.authors import export_adapter, load_authors_tensors, read_authors_file

    model = get_peft_model(tiny_model("vit"), RLRRPeftConfig(shift=True, init_weights=False, modules_to_save=["head"]))
    model.save_pretrained(tmp_path / "peft")
    ours, images = tiny_model("vit"), tiny_images("vit")
    load_peft(ours, tmp_path / "peft", recipe="paper")
    torch.testing.assert_close(ours(images), model.eval()(images))
    save_adapter(ours, tmp_path / "adapter")
    assert "transformer.encoder.layer.1.attn.key.scale_col" in export_adapter(tmp_path / "adapter", tmp_path / "a.pth")
    again = tiny_model("vit")
    load_authors_tensors(again, read_authors_file(tmp_path / "a.pth"))
    to_peft(again, tmp_path / "back")
    back = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "back").eval()
    torch.testing.assert_close(back(images), model(images))


def test_what_peft_s_method_has_not(tmp_path):
    with pytest.raises(ValueError, match="not adapted"):
        to_peft(tiny_model("vit"), tmp_path)
    with pytest.raises(ValueError, match=r"linear layers alone; these are others: blocks\.0\.attn\.qkv"):
        to_peft(adapted("vit", form="additive"), tmp_path)
    model = adapted("vit")
    model.cls_token.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trained beside adapter and head.*: cls_token"):
        to_peft(model, tmp_path)
    model = nested()
    adapt_model(model, RLRRConfig(include=("2.1",), heads=("1", "0")))
    with pytest.raises(ValueError, match=r"modules_to_save \['0', '1'\] keep PEFT from .*: 2\.1"):
        to_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_an_adapter_folder_has_not(tmp_path):
    def saved(**config):
        get_peft_model(tiny_model("vit"), RLRRPeftConfig(init_weights=False, **config)).save_pretrained(tmp_path)

    saved(rank_pattern={"qkv": 2})
    fresh = tiny_model("vit")
    with pytest.raises(ValueError, match=r"one rank for all layers; those in .* have \[1, 2\]"):
        load_peft(fresh, tmp_path)
    saved()
    with pytest.raises(ValueError, match="no linear layer matches include"):
        load_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    model = get_peft_model(tiny_model("vit"), RLRRPeftConfig(modules_to_save=["norm"]))
    torch.nn.init.normal_(model.base_model.model.norm.modules_to_save.default.weight)
    torch.nn.init.zeros_(model.base_model.model.norm.original_module.weight)
    model.save_pretrained(tmp_path)
    before = fresh.state_dict()
    with torch.no_grad():
        fresh.norm.weight.zero_()
    with pytest.raises(ValueError, match="norm was trained freely"):
        load_peft(fresh, tmp_path, recipe="paper")
    assert list(fresh.state_dict()) == list(before)
    get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="must hold an RLRR adapter; got"):
        load_peft(fresh, tmp_path / "lora")


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of the size of files are Unix's")
    to_peft(adapted("vit"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, limit = adapted("vit", rank=4), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/adapter_model\.safetensors'"):
            to_peft(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda tensor: tensor * torch.nan, lambda tensor: tensor.view(torch.int32)])
def test_values_that_no_training_leaves_are_named(damage, tmp_path):
    to_peft(adapted("vit"), tmp_path)
    file, name = tmp_path / "adapter_model.safetensors", "blocks.0.attn.qkv"
    tensors = load_file(file)
    key = f"base_model.model.{name}.rlrr_scale_row"
    save_file(tensors | {key: damage(tensors[key])}, file)
    fresh = tiny_model("vit")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.scale_row"):
        load_peft(fresh, tmp_path)
    assert isinstance(fresh.blocks[0].attn.qkv, nn.Linear)
    assert fresh.blocks[0].attn.qkv.weight.requires_grad


def test_a_folder_that_is_not_there_is_not_asked_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"absent is no folder that PEFT saved: it has no adapter_config\.json"):
        load_peft(tiny_model("vit"), tmp_path / "absent")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_model\.safetensors or adapter_model\.bin"):
        load_peft(tiny_model("vit"), tmp_path)
