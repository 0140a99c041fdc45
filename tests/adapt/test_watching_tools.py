"""Hooks, tracers and feature extractors see of an adapted model what they would see of the plain one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from rlrr_kernels import (
    AdditiveLinear,
    NormRescale,
    RLRRConfig,
    RLRRConv2d,
    RLRRLinear,
    adapt_model,
    is_adapted,
    load_adapter,
    merge_adapter,
    recompute_activations,
    save_adapter,
)
from tests.support.tiny_models import disturb, tiny_images, tiny_model

REPLACED = ("patch_embed.proj", "patch_embed.norm", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "norm")
"""Modules of a ViT that the paper's recipe with convs replaces, one of each kind."""


def adapted(model: nn.Module) -> nn.Module:
    adapt_model(model, RLRRConfig(recipe="paper", convs="patch_embed.proj"))
    disturb(model)
    return model


class Watch:
    """Registers a hook of every kind on a module, and counts what they see."""

    KINDS = ("forward_pre", "forward", "full_backward_pre", "full_backward")

    def __init__(self, module: nn.Module) -> None:
        self.seen: dict[str, list[nn.Module]] = {}
        self.handles = [
            getattr(module, f"register_{kind}_hook")(lambda watched, *_, kind=kind: self.note(kind, watched))
            for kind in self.KINDS
        ]
        self.handles += [
            module.register_forward_hook(lambda watched, *_: self.note("with_kwargs", watched), with_kwargs=True),
            module.register_forward_hook(lambda watched, *_: self.note("always", watched), always_call=True),
            module.register_state_dict_pre_hook(lambda watched, *_: self.note("state_dict_pre", watched)),
            module.register_state_dict_post_hook(lambda watched, *_: self.note("state_dict", watched)),
            module.register_load_state_dict_pre_hook(lambda watched, *_: self.note("load_pre", watched)),
            module.register_load_state_dict_post_hook(lambda watched, *_: self.note("load", watched)),
        ]

    def note(self, kind: str, module: nn.Module) -> None:
        self.seen.setdefault(kind, []).append(module)


def exercise(model: nn.Module, images: torch.Tensor) -> None:
    model(images.clone().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())


def test_hooks_on_replaced_modules_stay_and_can_be_removed():
    model, images = tiny_model("vit"), tiny_images("vit")
    watches = {name: Watch(model.get_submodule(name)) for name in REPLACED}
    plain = {name: type(model.get_submodule(name)) for name in REPLACED}

    def check() -> None:
        for watch in watches.values():
            watch.seen.clear()
        exercise(model, images)
        for name, watch in watches.items():
            assert set(watch.seen) == {
                *Watch.KINDS, "with_kwargs", "always", "state_dict_pre", "state_dict", "load_pre", "load",
            }, name  # fmt: skip
            assert all(seen == [model.get_submodule(name)] for seen in watch.seen.values()), name

    check()
    adapted(model)
    assert all(type(model.get_submodule(name)) is not plain[name] for name in REPLACED)
    check()
    recompute_activations(model)
    check()
    for watch in watches.values():
        watch.handles.pop(0).remove()
    merge_adapter(model)
    assert all(issubclass(plain[name], type(model.get_submodule(name))) for name in REPLACED)
    for watch in watches.values():
        watch.seen.clear()
    exercise(model, images)
    for watch in watches.values():
        assert len(watch.seen) == 9
        for handle in watch.handles:
            handle.remove()
        watch.seen.clear()
    exercise(model, images)
    assert not any(watch.seen for watch in watches.values())


def test_what_others_set_on_layers_stays_on_them_and_goes_back():
    """Flags, buffers, parameters and modules that code around reads; what torch.nn's own layers have, too."""
    model = tiny_model("vit")
    for layer in (qkv := model.blocks[0].attn.qkv, patches := model.patch_embed.proj, norm := model.norm):
        layer.note, layer.inner = "theirs", nn.Identity()
        layer.register_buffer("kept", torch.ones(2))
        layer.register_buffer("fleeting", torch.ones(2), persistent=False)
    names = set(model.state_dict())

    def check(layers):
        for layer in layers:
            assert layer.note == "theirs"
            assert type(layer.inner) is nn.Identity
            assert torch.equal(layer.kept + layer.fleeting, torch.full((2,), 2.0))

    adapted(model)
    layers = model.blocks[0].attn.qkv, model.patch_embed.proj, model.norm
    assert not {*map(id, layers)} & {id(qkv), id(patches), id(norm)}
    check(layers)
    assert model.norm.elementwise_affine
    assert model.patch_embed.proj.transposed is False
    assert names <= set(model.state_dict())
    merge_adapter(model)
    plain = model.blocks[0].attn.qkv, model.patch_embed.proj, model.norm
    assert not is_adapted(model)
    check(plain)
    assert not hasattr(plain[0], "rank")
    assert not hasattr(plain[0], "_own")


def test_attributes_called_as_an_adapted_layer_s_own_wait_for_the_merged_one():
    model = tiny_model("vit")
    layers = "blocks.0.attn.qkv", "patch_embed.proj", "norm"
    for name in layers:
        layer = model.get_submodule(name)
        layer.rank, layer.init, layer.scale = 7, "theirs", None
    adapted(model)
    assert model.blocks[0].attn.qkv.rank == 1
    model = copy.deepcopy(model)
    merge_adapter(model)
    for name in layers:
        layer = model.get_submodule(name)
        assert (layer.rank, layer.init, layer.scale) == (7, "theirs", None)


def test_what_is_set_on_adapted_layers_stays_on_the_merged_ones():
    model = tiny_model("vit")
    before = {name: {*vars(model.get_submodule(name))} for name in ("blocks.0.attn.qkv", "patch_embed.proj", "norm")}
    adapted(model)
    for name in before:
        layer = model.get_submodule(name)
        layer.note, layer.inner = "theirs", nn.Identity()
        layer.register_buffer("kept", torch.ones(2), persistent=False)
    model(torch.randn(1, 3, *model.patch_embed.img_size)).sum().backward()
    merge_adapter(model)
    for name in before:
        layer = model.get_submodule(name)
        assert layer.note == "theirs"
        assert type(layer.get_submodule("inner")) is nn.Identity
        assert layer.kept.sum() == 2
        assert f"{name}.kept" not in model.state_dict()
        assert {*vars(layer)} == before[name] | {"note"}  # nothing of the adapted layer's


def test_what_others_set_is_put_where_it_was():
    """What hides from ``named_modules`` and ``state_dict`` goes on hiding; what is registered as nothing stays so."""
    model = tiny_model("vit")
    names, count = set(model.state_dict()), len(list(model.modules()))
    layers = "blocks.0.attn.qkv", "patch_embed.proj", "norm"
    for layer in map(model.get_submodule, layers):
        vars(layer)["model"], vars(layer)["cache"] = model, nn.Parameter(torch.ones(2))
        layer.register_parameter("nothing", None)
    adapted(model)
    for change in (lambda: None, lambda: merge_adapter(model)):
        change()
        assert len(list(model.modules())) == count
        for layer in map(model.get_submodule, layers):
            assert vars(layer)["model"] is model
            assert vars(layer)["cache"].sum() == 2
            assert layer._parameters["nothing"] is None
        assert not [name for name in set(model.state_dict()) - names if name.endswith("cache")]


def test_what_others_took_off_an_adapted_layer_does_not_stop_the_merge():
    model, images = tiny_model("vit"), tiny_images("vit")
    model.blocks[0].attn.qkv.note = model.blocks[0].attn.qkv.other = "theirs"
    expected = adapted(model)(images)
    del model.blocks[0].attn.qkv.note
    merge_adapter(model)
    assert not hasattr(model.blocks[0].attn.qkv, "note")
    assert model.blocks[0].attn.qkv.other == "theirs"
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


class Pair(nn.Module):
    """Calls a layer and another one that lies inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.fc1.beside = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc1(x) + self.fc1.beside(x))


def test_a_layer_inside_a_layer_is_adapted_and_merged_with_it():
    model, x = Pair(), torch.randn(4, 6)
    report = adapt_model(model)
    assert [layer.name for layer in report.layers] == ["fc1", "fc1.beside"]
    assert type(model.fc1.beside) is RLRRLinear
    expected = model(x)
    merge_adapter(model)
    assert type(model.fc1.beside) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_a_hook_that_changes_the_result_still_does(tmp_path):
    model, images = tiny_model("vit"), tiny_images("vit")
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    adapt_model(model, RLRRConfig(init="identity"))
    twin = tiny_model("vit")
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.zero_()
        twin.blocks[0].attn.qkv.bias.zero_()
        torch.testing.assert_close(model(images), twin(images))
        merge_adapter(model)
        torch.testing.assert_close(model(images), twin(images))


def test_hooks_on_all_modules_see_inside_a_fused_mlp():
    model, images = adapted(tiny_model("vit")), tiny_images("vit")
    recompute_activations(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        expected = model(images)
    finally:
        handle.remove()
    names = {module: name for name, module in model.named_modules()}
    assert [names[module] for module in seen if ".0.mlp" in names[module]] == [
        f"blocks.0.mlp{part}" for part in (".fc1", ".act", ".drop1", ".norm", ".fc2", ".drop2", "")
    ]
    torch.testing.assert_close(model(images), expected)


# ---------------------------------------------------------------- accelerate


def test_offloaded_models_are_refused_and_adapted_ones_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="offloads with accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model, images = adapted(tiny_model("vit")), tiny_images("vit")
    save_adapter(model, tmp_path)
    expected = model(images)
    fresh = tiny_model("vit")
    accelerate.cpu_offload(fresh, execution_device=torch.device("cpu"))
    for change in (lambda: adapt_model(fresh, RLRRConfig(recipe="paper")), lambda: load_adapter(fresh, tmp_path)):
        with pytest.raises(ValueError, match=r"its forward was replaced on the module itself.*remove_hook_from_subm"):
            change()
    assert not is_adapted(fresh)
    with torch.no_grad():
        fresh(images)
    remove_hook_from_submodules(fresh)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images), expected)

    accelerate.cpu_offload(fresh, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(fresh(images), expected)
    with pytest.raises(ValueError, match=r"cannot be replaced: its forward was replaced on the module itself"):
        merge_adapter(fresh)
    assert is_adapted(fresh)
    remove_hook_from_submodules(fresh)
    merge_adapter(fresh)
    torch.testing.assert_close(fresh(images), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_that_was_patched_is_refused_by_name():
    model = tiny_model("vit")
    model.blocks[1].norm2.forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2 cannot be replaced: its forward was replaced"):
        adapt_model(model, RLRRConfig(recipe="paper"))
    assert not is_adapted(model)
    adapt_model(model)  # which leaves norms alone


# ---------------------------------------------------------------- torch.fx and feature extractors


def nodes(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


class Blocks(nn.Module):
    """Linear layers, a norm and a convolution without timm's control flow."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        return self.head((x + self.body(self.norm(x))).mean(1))


def test_fx_records_the_calls_that_it_records_of_the_plain_model():
    model, images = Blocks(), torch.randn(2, 3, 4, 4)
    expected = nodes(torch.fx.symbolic_trace(model).graph)
    adapt_model(model, RLRRConfig(convs="*"))
    model.norm = NormRescale(model.norm)
    disturb(model)
    graph = torch.fx.symbolic_trace(model)
    assert nodes(graph.graph) == expected
    assert ("call_module", "body.0") in expected
    torch.testing.assert_close(graph(images), model(images))
    ours, theirs = ([*graph.parameters()], [*model.parameters()])
    assert {id(p) for p in ours} == {id(p) for p in theirs}
    graph(images).sum().backward()
    assert all(p.grad is not None for p in ours if p.requires_grad)
    additive = nn.Sequential(AdditiveLinear(nn.Linear(4, 4)))
    assert nodes(torch.fx.symbolic_trace(additive).graph)[1] == ("call_module", "0")


@pytest.mark.parametrize("recompute", [False, True])
def test_feature_extractors_find_the_same_nodes(recompute):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="needs torchvision")
    from timm.layers import Mlp

    model, x = nn.Sequential(Mlp(4, 8), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = extraction.get_graph_node_names(model)
    adapt_model(model)
    disturb(model)
    if recompute:
        assert recompute_activations(model) == ("0",)
    assert extraction.get_graph_node_names(model) == expected
    extractor = extraction.create_feature_extractor(model, {"0.fc1": "hidden", "1": "last"})
    found = extractor(x)
    torch.testing.assert_close(found["hidden"], model[0].fc1(x))
    torch.testing.assert_close(found["last"], model(x))


# ---------------------------------------------------------------- torch.jit.trace

LAYERS = {
    "linear": (lambda: RLRRLinear(6, 8), (3, 6)),
    "rank and groups": (lambda: RLRRLinear(6, 8, rank=3, groups=2), (2, 3, 6)),
    "left side": (lambda: RLRRLinear(6, 8, sides="left", residual=False), (3, 6)),
    "additive": (lambda: AdditiveLinear(nn.Linear(6, 8), rank=2, groups=2), (3, 6)),
    "norm": (lambda: NormRescale(nn.LayerNorm(6)), (3, 6)),
    "convolution": (lambda: RLRRConv2d(4, 6, 3, padding="same", groups=2, rank=2), (2, 4, 5, 5)),
    "kernel rows": (lambda: RLRRConv2d(4, 6, (3, 2), layout="out*kh,in*kw", padding_mode="circular"), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_traced_layers_are_saved_and_train(kind, dtype):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape, dtype=dtype)
    disturb(layer)
    layer = layer.to(dtype)
    model = nn.Sequential(layer)
    traced = torch.jit.trace(model, x, check_tolerance=1e-5 if dtype == torch.float64 else 0.1)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    other = torch.randn(5, *shape[1:], dtype=dtype)
    for images in (x, other):
        y = loaded(images)
        assert y.dtype == model(images).dtype
        torch.testing.assert_close(y, model(images), **tolerance)
    if dtype == torch.float64:
        for one in (loaded, model):
            one(other).square().sum().backward()
        for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
            if theirs.requires_grad:
                torch.testing.assert_close(ours.grad, theirs.grad)
    if kind != "norm":
        layer.eval().merge()
        torch.testing.assert_close(torch.jit.trace(model, x)(other), model(other))


def test_scripting_is_refused_until_the_adapter_is_merged():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    adapt_model(model)
    model[0] = NormRescale(model[0])
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.script cannot compile NormRescale; merge_adapter\(model\) first"
    ):
        torch.jit.script(model)
    model[0] = model[0].to_layer_norm()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile RLRRLinear"):
        torch.jit.script(model)
    merge_adapter(model)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_traced_model_gives_the_same_logits(recompute):
    model, images = adapted(tiny_model("vit")), tiny_images("vit")
    expected = model(images)
    if recompute:
        recompute_activations(model)
    traced = torch.jit.trace(model, images)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(images), expected, rtol=1e-4, atol=1e-5)
