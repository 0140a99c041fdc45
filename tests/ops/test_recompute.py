"""``recompute_activations``: equal results bit by bit, less kept, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.support.common import kept_bytes
from rlrr_kernels import (
    NormRescale,
    RLRRConfig,
    RLRRLinear,
    adapt_model,
    backends,
    load_adapter,
    merge_adapter,
    norm_rescale,
    recompute_activations,
    save_adapter,
    use_backend,
)
from tests.support.implementations import BACKENDS
from tests.support.tiny_models import backward, disturb, tiny_images, tiny_model

pytestmark = pytest.mark.interpreted

without_interpreter = pytest.mark.skipif(backends.INTERPRETING, reason="whole models; the kernels are tried alone")


def adapted(family: str, recipe: str | None = "paper", sides: str = "both", **overrides) -> nn.Module:
    model = tiny_model(family, **overrides)
    adapt_model(model, RLRRConfig(recipe=recipe, sides=sides))
    disturb(model)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_by(model: nn.Module, images: torch.Tensor) -> int:
    return kept_bytes(lambda: model(images), list(model.parameters()))


# ---------------------------------------------------------------- whole models


@without_interpreter
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "beit", "eva02", "convnext"])
def test_equal_bit_by_bit(family: str, low: torch.dtype | None):
    plain = adapted(family, None if family == "convnext" else "paper")
    again = copy.deepcopy(plain)
    assert recompute_activations(again)
    images = tiny_images(family)
    for model in (plain, again):
        torch.manual_seed(0)
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            backward(model, images)
    expected = gradients(plain)
    assert expected
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, expected[name]), name
    assert torch.equal(plain.eval()(images), again.eval()(images))


@without_interpreter
@pytest.mark.parametrize("sides", ["left", "right"])
def test_equal_with_scales_on_one_side(sides: str):
    plain = adapted("vit", sides=sides)
    again = copy.deepcopy(plain)
    recompute_activations(again)
    images = tiny_images("vit")
    assert kept_by(again, images) < kept_by(plain, images)
    for model in (plain, again):
        backward(model, images)
    expected = gradients(plain)
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, expected[name]), name


@without_interpreter
def test_estimates_draw_the_same_rows_and_keep_fewer_of_them():
    plain = adapted("vit")
    for layer in plain.modules():
        if isinstance(layer, RLRRLinear):
            layer.scale_grad_rows = 0.5
    again = copy.deepcopy(plain)
    recompute_activations(again)
    images = tiny_images("vit")
    assert kept_by(again, images) < kept_by(plain, images)
    for model in (plain, again):
        torch.manual_seed(0)
        backward(model, images)
    expected = gradients(plain)
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, expected[name]), name


@without_interpreter
def test_keeps_neither_the_activation_nor_the_normalised_inputs():
    plain = adapted("vit")
    again = copy.deepcopy(plain)
    names = recompute_activations(again)
    assert [name for name in names if name.startswith("blocks.0")] == [
        "blocks.0.norm1", "blocks.0.norm2", "blocks.0.mlp",
    ]  # fmt: skip
    images = tiny_images("vit")
    tokens, size, depth = 3 * 5, 48, 2
    saved = kept_by(plain.train(), images) - kept_by(again.train(), images)
    assert saved == depth * tokens * (4 * size + 2 * size) * 4


@without_interpreter
def test_goes_back_and_merges():
    model = adapted("vit")
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = tiny_images("vit")
    logits = model(images)
    recompute_activations(model)
    assert type(model.blocks[0].mlp).__name__ == "RLRRMlp"
    assert model.state_dict().keys() == state.keys()
    assert recompute_activations(model, False) == ()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(norm.keep_output for norm in model.modules() if isinstance(norm, NormRescale))
    recompute_activations(model)
    merge_adapter(model)
    assert not [kind for kind in map(type, model.modules()) if kind.__module__.startswith("rlrr_kernels")]
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


@without_interpreter
def test_adapters_are_interchangeable(tmp_path):
    model = adapted("vit")
    recompute_activations(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_model("vit")
    load_adapter(fresh, tmp_path / "adapter")
    images = tiny_images("vit")
    assert torch.equal(fresh(images), model(images))
    recompute_activations(fresh)
    assert torch.equal(fresh(images), model(images))


@without_interpreter
def test_copies():
    model = adapted("vit")
    recompute_activations(model)
    images = tiny_images("vit")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.blocks[0].mlp) is type(model.blocks[0].mlp)
        assert kept_by(twin, images) == kept_by(model, images)


@without_interpreter
def test_compiled_without_a_graph_break_it_keeps_less_too():
    plain = adapted("vit").train()
    again = copy.deepcopy(plain)
    recompute_activations(again)
    torch._dynamo.reset()
    kept, drawn = [], tiny_images("vit")
    for model in (plain, again):
        # Inductor's partition of the graph into forward and backward, without its code.
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
        for count in (3, 2):
            images = drawn[:count]
            model.zero_grad()
            backward(compiled, images)
        kept.append(kept_by(compiled, images))
    tokens, size, depth = len(images) * 5, 48, 2
    assert kept[0] - kept[1] >= depth * tokens * (4 * size + 2 * size) * 4
    expected = gradients(plain)
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()
    backward(model, images)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@without_interpreter
def test_finetune_computes_the_same_adapter(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    from safetensors.torch import load_file

    from rlrr_kernels.train.config.train_config import TrainConfig
    from rlrr_kernels.train.finetune import finetune
    from rlrr_kernels.train.run.config import FinetuneConfig
    from tests.support.image_folders import make_splits

    images = make_splits(tmp_path / "images")
    saved = []
    for recompute in (False, True):
        config = FinetuneConfig(
            model="test_vit", data=images, out=tmp_path / str(recompute), weights="none", image_size=32,
            recompute=recompute, train=TrainConfig(epochs=1, mixed_precision="no"),
        )  # fmt: skip
        saved.append(load_file(finetune(config, quiet=True).adapter / "adapter.safetensors"))
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


@without_interpreter
def test_a_model_that_is_not_adapted_is_refused():
    with pytest.raises(ValueError, match=r"model \(VisionTransformer\) is not adapted"):
        recompute_activations(tiny_model("vit"))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        recompute_activations("vit")


# ---------------------------------------------------------------- the MLP


@without_interpreter
def test_what_happens_inside_the_mlp_still_happens():
    images = tiny_images("vit")
    plain = adapted("vit", proj_drop_rate=0.5)
    again = copy.deepcopy(plain)
    recompute_activations(again)
    for model in (plain, again):
        torch.manual_seed(3)
        backward(model, images)  # with dropout between activation and fc2
    expected = gradients(plain)
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, expected[name]), name
    again.eval()
    fused = kept_by(again, images)
    called = []
    handle = again.blocks[0].mlp.act.register_forward_hook(lambda *_: called.append(1))
    assert kept_by(again, images) > fused
    assert called == [1]
    handle.remove()
    assert kept_by(again, images) == fused
    again.blocks[0].mlp.fc2.merge()
    torch.testing.assert_close(again(images), plain.eval()(images))


class Twice(nn.Identity):
    """Something of the user's in place of a dropout or a norm."""

    def forward(self, x):
        return 2 * x


@without_interpreter
@pytest.mark.parametrize("put", [lambda mlp: setattr(mlp, "drop1", Twice()), lambda mlp: setattr(mlp, "norm", Twice())])
def test_what_was_put_inside_the_mlp_still_happens(put):
    images, plain = tiny_images("vit"), adapted("vit")
    again = copy.deepcopy(plain)
    recompute_activations(again)
    before = plain(images)
    for model in (plain, again):
        put(model.blocks[0].mlp)
    assert not torch.allclose(plain(images), before)
    torch.testing.assert_close(again(images), plain(images))
    again.blocks[0].mlp.drop1 = plain.blocks[0].mlp.drop1 = nn.Identity()
    torch.testing.assert_close(again(images), plain(images))


@without_interpreter
def test_a_hook_may_change_what_a_norm_gave():
    images, plain = tiny_images("vit"), adapted("vit")
    again = copy.deepcopy(plain)
    recompute_activations(again)
    for model in (plain, again):
        model.blocks[0].norm1.register_forward_hook(lambda *call: call[2].data.mul_(1.5))
        backward(model, images)
    expected = gradients(plain)
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@without_interpreter
def test_only_mlps_that_the_operator_computes_are_switched():
    timm = pytest.importorskip("timm")
    for options in ({"act_layer": nn.ReLU}, {"norm_layer": nn.LayerNorm}):
        mlp = timm.layers.Mlp(8, 16, **options)
        model = nn.Sequential(mlp, nn.Linear(8, 2))
        adapt_model(model, RLRRConfig(heads=("1",)))
        assert recompute_activations(model) == ()
        assert type(mlp) is timm.layers.Mlp
    tanh = timm.layers.Mlp(8, 16, act_layer=lambda: nn.GELU(approximate="tanh"))
    model = nn.Sequential(tanh, nn.Linear(8, 2))
    adapt_model(model, RLRRConfig(heads=("1",)))
    x = torch.randn(3, 8)
    expected = model(x)
    assert recompute_activations(model) == ("0",)
    assert torch.equal(model(x), expected)


def test_needs_no_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "timm.layers.mlp", raising=False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapt_model(model, RLRRConfig(heads=("1",)))
    assert recompute_activations(model) == ()


# ---------------------------------------------------------------- norms and the layers after them


@pytest.fixture(params=[name for name in BACKENDS if name != "triton.merge"])
def backend(request, poisoned_memory):
    with use_backend(request.param):
        yield request.param


def norm_and_layer(**options) -> tuple[NormRescale, RLRRLinear]:
    norm, layer = NormRescale(nn.LayerNorm(24)), RLRRLinear(24, 12, groups=3, **options)
    for parameter in (norm.weight, norm.bias):
        nn.init.normal_(parameter)
    return norm, layer


def run(norm, layer, u, keep_output: bool, between=lambda z: z, call=lambda f, u: f(u), low=None):
    """Result and gradients of ``layer(between(norm(u)))``, and the bytes kept beside u and the parameters."""
    norm.keep_output = keep_output
    u = u.detach().requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in (u, *norm.parameters(), *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", low or torch.float16, enabled=low is not None):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = call(lambda u: layer(between(norm(u))), u)
        trained = [u, norm.scale, norm.shift, layer.scale_row, layer.scale_col, layer.shift]
        grads = torch.autograd.grad(y.float().square().sum(), trained)
    return [y.detach(), *grads], sum(kept.values())


@pytest.mark.parametrize("low", [None, torch.float16])
def test_the_input_of_a_layer_is_computed_again(backend: str, low: torch.dtype | None):
    norm, layer = norm_and_layer()
    u = torch.randn(4, 5, 24)
    expected, before = run(norm, layer, u, True, low=low)
    actual, after = run(norm, layer, u, False, low=low)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    size = 4 if low is None else 2
    statistics = 2 * 4 * 5 * 4  # mean and reciprocal deviation of each row
    assert (before, after) == (4 * 5 * 24 * size + statistics, statistics)


def test_a_changed_result_is_kept(backend: str):
    norm, layer = norm_and_layer()
    u = torch.randn(4, 5, 24)
    for between in (lambda z: z.add_(1), lambda z: z * 2, lambda z: z.flatten(0, 1)):
        expected, _ = run(norm, layer, u, True, between)
        actual, _ = run(norm, layer, u, False, between)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


def test_a_changed_input_is_noticed():
    norm, layer = norm_and_layer()
    norm.keep_output = False
    for parameter in (norm.scale, norm.shift):
        parameter.requires_grad_(False)
    u = torch.randn(4, 24)
    z = norm(u)
    expected = torch.autograd.grad(layer(z.clone()).sum(), layer.scale_col)
    u.zero_()  # before the layer has seen it: the recipe is void
    assert torch.equal(torch.autograd.grad(layer(z).sum(), layer.scale_col)[0], expected[0])
    u = torch.randn(4, 24)
    y = layer(norm(u))
    u.zero_()  # after: autograd notices
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool):
    norm, layer = norm_and_layer()
    u = torch.randn(4, 5, 24)
    expected, _ = run(norm, layer, u, True)
    norm.keep_output = False
    leaf = u.clone().requires_grad_()
    y = checkpoint(lambda u: layer(norm(u)), leaf, use_reentrant=reentrant)
    y.square().sum().backward()
    actual = [y, leaf.grad, norm.scale.grad, norm.shift.grad, layer.scale_row.grad, layer.scale_col.grad]
    for a, e in zip(actual, expected[:-1], strict=True):
        assert torch.equal(a, e)


def test_several_layers_and_sampled_rows_share_a_norm():
    u = torch.randn(4, 5, 24)
    norm, layer = norm_and_layer(scale_grad_rows=0.5)
    results = []
    for keep_output in (True, False):
        torch.manual_seed(1)
        results.append(run(norm, layer.train(), u, keep_output))
    for a, e in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(a, e)
    assert results[1][1] < results[0][1]
    other = RLRRLinear(24, 8)
    norm.keep_output = True
    z = norm(u)
    expected = torch.autograd.grad(layer.eval()(z).sum() + other(z).sum(), [layer.scale_col, other.scale_col])
    norm.keep_output = False
    z = norm(u)
    actual = torch.autograd.grad(layer(z).sum() + other(z).sum(), [layer.scale_col, other.scale_col])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_without_gradients_and_in_transforms():
    norm, layer = norm_and_layer()
    u = torch.randn(4, 24)
    expected = layer(norm(u)).detach()
    norm.keep_output = False
    with torch.inference_mode():
        inferred = torch.randn(4, 24)
        assert layer(norm(u)).equal(expected)
    layer(norm(inferred.clone())).sum().backward()
    loss = lambda u: layer(norm(u)).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(u), torch.func.vmap(torch.func.grad(loss))(u[:, None])[:, 0])
    with pytest.raises(NotImplementedError, match="where its input is recomputed"):
        torch.autograd.grad(loss(u.requires_grad_()), u, create_graph=True)
    weight, bias = norm.weight, norm.bias
    z = norm_rescale(u, weight, bias, norm.scale, norm.shift, keep_output=False)
    assert torch.equal(z, norm(u))
