"""timm models by name and by weights file, with the errors a typo or a wrong file deserves."""

import pytest
import torch

timm = pytest.importorskip("timm", reason="the training library needs timm")

from safetensors.torch import save_file

from rlrr_kernels.train.models.backbones import check_model_name, create_model


def test_a_typo_gets_the_nearest_names():
    with pytest.raises(ValueError, match=r"no model 'vit_bse_patch16_224'; did you mean vit_base_patch16_224"):
        check_model_name("vit_bse_patch16_224")
    with pytest.raises(ValueError, match=r"there are .*augreg_in21k"):
        check_model_name("vit_base_patch16_224.augrag")
    check_model_name("vit_base_patch16_224.augreg_in21k")


def test_weights_file_is_loaded_except_for_the_head(tmp_path):
    source = timm.create_model("test_vit", num_classes=7, img_size=64)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        model, preprocessing = create_model("test_vit", 3, image_size=64, weights=tmp_path / name)
        assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert model.head.weight.shape[0] == 3
        assert preprocessing.image_size == 64
    smaller, _ = create_model("test_vit", 3, image_size=32, weights=tmp_path / "weights.pth")
    assert smaller.pos_embed.shape[1] < source.pos_embed.shape[1]
    smaller(torch.zeros(1, 3, 32, 32))


def test_backbone_without_a_head_is_loaded(tmp_path):
    source = timm.create_model("test_vit", num_classes=0)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model, _ = create_model("test_vit", 2, weights=tmp_path / "weights.safetensors")
    assert torch.equal(model.cls_token, source.cls_token)


def test_a_file_of_another_model_is_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "junk.pth").write_text("junk")
    for name in ("weights.safetensors", "junk.pth"):
        with pytest.raises(ValueError, match=rf"{name} does not fit test_vit"):
            create_model("test_vit", 2, weights=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        create_model("test_vit", 2, weights=tmp_path / "absent.pth")


def test_image_size_must_be_a_multiple_of_the_patch():
    with pytest.raises(ValueError, match=r"multiple of 16.* got 100, the nearest are 96 and 112"):
        create_model("test_vit", 2, image_size=100, weights="none")


def test_models_without_a_fixed_size_take_any():
    model, preprocessing = create_model("test_resnet", 2, image_size=50, weights="none")
    assert preprocessing.image_size == 50
    assert model(torch.zeros(1, 3, 50, 50)).shape == (1, 2)


def test_a_random_start_is_always_the_same():
    first, second = (create_model("test_vit", 2, weights="none")[0] for _ in range(2))
    assert torch.equal(first.patch_embed.proj.weight, second.patch_embed.proj.weight)


def test_an_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("rlrr_kernels.train.models.backbones._hub_is_out_of_reach", lambda endpoint: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="--weights FILE"):
        create_model("vit_tiny_patch16_224", 2)
