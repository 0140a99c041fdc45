"""Backbones from the files that Google and Microsoft published: logits, and every tensor accounted for or named.

The files are made of the paper's models as ``authors_models`` writes them down, so the logits have an oracle.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.authors_models import AuthorsSwin, AuthorsViT
from tests.support.versions import version_of

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")

from rlrr_kernels.train.models.backbones import create_model

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks what ``timm.create_model`` makes to the size of the oracles."""
    create = timm.create_model
    sizes = {
        VIT: {"depth": 3, "embed_dim": 48, "num_heads": 3},
        SWIN: {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16},
    }

    @functools.wraps(create)
    def small(name: str, **options):
        return create(name, **sizes.get(name, {}), **options)

    monkeypatch.setattr(timm, "create_model", small)


def test_google_s_npz_gives_the_logits_of_the_formulas(tmp_path):
    oracle = AuthorsViT()
    arrays = oracle.google_arrays()
    head = {
        "head/kernel": np.ones((48, 5), np.float32),
        "head/bias": np.ones(5, np.float32),
        "pre_logits/kernel": np.ones((48, 48), np.float32),
        "pre_logits/bias": np.ones(48, np.float32),
    }
    images = torch.randn(2, 3, 32, 32)
    for prefix, others in (("", {}), ("opt/target/", {"opt/state/step": np.zeros(())})):
        file = tmp_path / "ViT.npz"
        np.savez(file, **{f"{prefix}{name}": array for name, array in (arrays | head).items()}, **others)
        model, _ = create_model(VIT, 5, image_size=32, weights=file)
        assert not torch.equal(model.head.bias, torch.ones(5))  # a new task, a new head
        with torch.no_grad():
            expected = oracle.as_backbone(model.head.weight, model.head.bias)(images)
            torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_every_array_of_an_npz_is_accounted_for_or_named(tmp_path):
    arrays = AuthorsViT().google_arrays()
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    gone = [f"{attention}/key/bias", "cls", "Transformer/encoderblock_2/MlpBlock_3/Dense_1/kernel"]
    deeper = {f"Transformer/encoderblock_3/LayerNorm_{i}/scale": np.ones(48, np.float32) for i in (0, 2)}
    other = {name: array for name, array in arrays.items() if name not in gone} | deeper | {"extra": np.ones(3)}
    np.savez(tmp_path / "other.npz", **other)
    with pytest.raises(
        ValueError, match=r"other\.npz does not fit vit_tiny_patch16_224: the arrays do not match"
    ) as error:
        create_model(VIT, 5, image_size=32, weights=tmp_path / "other.npz")
    assert f"missing in the file: {', '.join(sorted(gone))}" in str(error.value)
    assert f"not in the model: {', '.join(sorted([*deeper, 'extra']))}" in str(error.value)
    np.savez(tmp_path / "whole.npz", **arrays)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.npz does not fit .*: it is truncated or no \.npz file"):
        create_model(VIT, 5, image_size=32, weights=tmp_path / "half.npz")


def save_swin(oracle: AuthorsSwin, file: Path, placement: str, **changes: torch.Tensor | None) -> None:
    """Microsoft's file; ``placement`` of the patch merging: "end" of a stage (theirs) or "start" of the next."""
    state = oracle.microsoft_state() | {"head.weight": torch.ones(1000, 32), "head.bias": torch.ones(1000)}
    if placement == "start":
        state = {name.replace("0.downsample", "1.downsample"): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    torch.save({"model": state}, file)


reads_start = pytest.mark.skipif(
    version_of("timm") < (1, 0, 31),
    reason="timm before 1.0.31 moves every patch merging",
)


@pytest.mark.parametrize("placement", ["end", pytest.param("start", marks=reads_start)])
@pytest.mark.parametrize("head", ["head", "headless"])
def test_microsoft_s_swin_gives_the_logits_of_the_formulas(placement: str, head: str, tmp_path):
    oracle, file = AuthorsSwin(), tmp_path / "swin.pth"
    save_swin(oracle, file, placement, **({} if head == "head" else {"head.weight": None, "head.bias": None}))
    assert any("attn_mask" in name for name in torch.load(file)["model"])
    assert any("relative_position_index" in name for name in torch.load(file)["model"])
    model, _ = create_model(SWIN, 5, image_size=112, weights=file)
    assert model.head.fc.weight.shape == (5, 32)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected = oracle.as_backbone(model.head.fc.weight, model.head.fc.bias)(images)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_every_tensor_of_a_swin_file_is_accounted_for_or_named(tmp_path):
    changes = {
        "layers.1.blocks.1.mlp.fc2.bias": None,
        "layers.0.blocks.0.attn.logit_scale": torch.ones(2, 1, 1),
        "layers.0.blocks.1.attn.qkv.weight": torch.ones(16, 16),
    }
    save_swin(AuthorsSwin(), tmp_path / "other.pth", "start", **changes)
    with pytest.raises(ValueError, match=r"other\.pth does not fit swin_tiny_patch4_window7_224") as error:
        create_model(SWIN, 5, image_size=112, weights=tmp_path / "other.pth")
    for text in ("layers.1.blocks.1.mlp.fc2.bias", "layers.0.blocks.0.attn.logit_scale", "size mismatch for layers.0"):
        assert text in str(error.value)
