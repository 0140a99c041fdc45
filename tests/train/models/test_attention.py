"""Which attention a model trains by: plain where it is the faster one, and as timm made it before and after."""

import pytest
import torch

from tests.support.tiny_models import tiny_model

timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
pytest.importorskip("accelerate", reason="the training library needs accelerate")

from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop.distributed import make_accelerator
from rlrr_kernels.train.models.attention import fastest_attention


def fused(model: torch.nn.Module) -> set[bool]:
    return {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}


@pytest.mark.parametrize(
    ("family", "image_size", "plain"),
    [
        ("vit", 32, True),
        ("vit", 16 * 17, True),  # 289 tokens
        ("vit", 16 * 18, False),
        ("swin", 2240, True),  # windows of 49
        ("convnext", 32, False),
    ],
)
def test_attention_is_plain_on_a_cpu_over_few_tokens(family, image_size, plain):
    model, accelerator = tiny_model(family), make_accelerator(TrainConfig(), cpu=True)
    before = fused(model)
    with fastest_attention(model, accelerator, image_size):
        assert fused(model) == (before and {not plain})
    assert fused(model) == before


def test_both_attentions_are_equal_within_rounding():
    model, accelerator = tiny_model("vit"), make_accelerator(TrainConfig(), cpu=True)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with fastest_attention(model, accelerator, 32):
        torch.testing.assert_close(model(images), expected)
