"""``adapt_model`` on every family: what is trained, what is reported, what is refused, and that it still runs."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from rlrr_kernels import RLRRConfig, RLRRLinear, adapt_model, check_gradients, is_adapted, parameter_groups
from tests.support.tiny_models import SIZES, backward, disturb, tiny_images, tiny_model


class Mlp(nn.Module):
    """A module of nobody's library."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("family", SIZES)
def test_trains_scales_and_head_and_nothing_else(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = adapt_model(model, RLRRConfig(rank=2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = [name for name in trained if name.startswith("head")]
    assert heads
    assert {name.rpartition(".")[2] for name in trained if name not in heads} == {"scale_row", "scale_col", "shift"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert report.trained == sum(p.numel() for p in trained.values())
    assert report.head == sum(trained[name].numel() for name in heads)
    assert report.total == sum(p.numel() for p in model.parameters())
    linears = [
        n for n, m in tiny_model(family).named_modules() if isinstance(m, nn.Linear) and not n.startswith("head")
    ]
    assert [layer.name for layer in report.layers] == linears

    backward(model, tiny_images(family))
    check_gradients(model)
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and name not in trained]
    assert not frozen


@pytest.mark.parametrize("family", SIZES)
def test_identity_init_gives_the_backbone_s_logits(family):
    model, images = tiny_model(family), tiny_images(family)
    with torch.no_grad():
        expected = model(images)
        adapt_model(model, RLRRConfig(init="identity"))
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2"])
def test_bypassed_qkv_layers_are_called_after_a_switch(family):
    model, images = tiny_model(family), tiny_images(family)
    report = adapt_model(model, RLRRConfig(init="identity", groups={"qkv": 3}))
    qkv = [layer.name for layer in report.layers if layer.name.endswith(".qkv")]
    assert list(report.patched) == qkv
    assert "qkv_bias_separate switched on" in str(report)
    with torch.no_grad():
        before = model(images)
        for name in qkv:
            model.get_submodule(name).scale_row.fill_(3.0)
        assert (model(images) - before).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2"])
def test_a_bypass_without_the_switch_is_refused_by_name(family, monkeypatch):
    model = tiny_model(family)
    qkv = [name for name, _ in model.named_modules() if name.endswith(".qkv")]
    for name in qkv:  # as in versions of timm before the switch
        del model.get_submodule(name.rpartition(".")[0]).qkv_bias_separate
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"bypasses the forward of") as error:
        adapt_model(model)
    assert all(name in str(error.value) for name in qkv)
    assert [type(module) for module in model.modules()] == before
    suggestion = str(error.value).partition("exclude=")[2]
    assert adapt_model(model, RLRRConfig(exclude=ast.literal_eval(suggestion))).layers


def test_multihead_attention_is_refused_by_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc1": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"attention\.out_proj \(nn\.MultiheadAttention takes its weight"):
        adapt_model(model)
    assert [layer.name for layer in adapt_model(model, RLRRConfig(exclude=["out_proj"])).layers] == ["fc1"]


def test_a_fast_path_past_the_layers_is_refused_by_name():
    with pytest.raises(ValueError, match="TransformerEncoderLayer") as error:
        adapt_model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert all(name in str(error.value) for name in ("self_attn.out_proj", "linear1", "linear2"))


def test_a_bypass_in_the_user_s_own_module_is_refused_by_name():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.called = nn.Linear(4, 4)

        @property
        def tied(self):
            return self.parts[1].weight

        def project(self, x):
            return x @ self.tied.t()

    class Model(Base):
        def forward(self, x):
            x = self.project(x)
            if isinstance(self.called.weight, nn.Parameter) and self.called.bias is not None:
                x = x.to(self.called.weight.dtype)
            return self.called(x)

    message = r"parts\.1 \(Model\.forward reads self\.parts\.1\.weight.*Leave them alone with exclude=\['parts\.1'\]"
    with pytest.raises(ValueError, match=message):
        adapt_model(Model())
    assert len(adapt_model(Model(), RLRRConfig(exclude=["parts.1"])).layers) == 2


def test_check_gradients_names_what_a_source_search_cannot_see():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            part = self.bypassed
            return self.seen(x) @ part.weight.t()

    model = Hidden()
    adapt_model(model)
    with pytest.raises(
        RuntimeError, match="none of the 6 adapter parameters has a gradient; call check_gradients after"
    ):
        check_gradients(model)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"3 of 6 .*: bypassed\.scale_row, bypassed\.scale_col, bypassed\.shift\."):
        check_gradients(model)
    with pytest.raises(ValueError, match=r"Mlp.* is not adapted"):
        check_gradients(Mlp())


def test_any_module_and_default_heads():
    model = Mlp()
    report = adapt_model(model)
    assert report.heads == ("head",)
    assert [layer.name for layer in report.layers] == ["body.0", "body.2"]
    assert isinstance(model.body[0], RLRRLinear)
    model(torch.randn(2, 5, 6)).sum().backward()
    check_gradients(model)


def test_heads_groups_and_patterns_follow_the_configuration():
    model = tiny_model("vit")
    config = RLRRConfig(groups={"*.qkv": 3, "fc1": 4}, exclude=["blocks.0.*"], heads=["norm", "head"], shift=False)
    report = adapt_model(model, config)
    assert {layer.name: layer.groups for layer in report.layers} == {
        "blocks.1.attn.qkv": 3,
        "blocks.1.attn.proj": 1,
        "blocks.1.mlp.fc1": 4,
        "blocks.1.mlp.fc2": 1,
    }
    assert report.heads == ("norm", "head")
    assert model.norm.weight.requires_grad
    assert model.blocks[1].attn.qkv.shift is None


def test_report_prints_the_counts():
    text = str(adapt_model(tiny_model("vit"), RLRRConfig(recipe="paper")))
    for part in (
        "VisionTransformer",
        "blocks.*.attn.qkv",
        "144 x 48",
        "patch_embed.norm",
        "head",
        "trained parameters",
    ):
        assert part in text


@pytest.mark.parametrize("family", SIZES)
def test_works_on_the_meta_device(family):
    with torch.device("meta"):
        model = tiny_model(family)
    report = adapt_model(model, RLRRConfig(rank=2))
    assert report.layers
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.slow
def test_every_family_of_timm_is_adapted_whole_or_refused():
    timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    adapted, wrong = 0, []
    for module in timm.list_modules():
        name = min(timm.list_models(module=module), key=len, default=None)
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
                adapt_model(model)
        except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError):
            continue  # no linear layer, a bypassed one, or no support of the meta device in timm
        with torch.device("meta"):
            outputs = model(torch.empty(2, *model.pretrained_cfg["input_size"]))
            outputs = outputs if isinstance(outputs, torch.Tensor) else torch.cat([o.flatten() for o in outputs])
            outputs.sum().backward()
        try:
            check_gradients(model)
        except RuntimeError as error:
            wrong.append(f"{name}: {error}")
        adapted += 1
    assert not wrong
    assert adapted >= 40


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"include": ["*.query"]}, r"no linear layer matches include=\['\*\.query'\].*blocks\.0\.attn\.qkv"),
        ({"include": []}, r"no linear layer matches include=\[\]"),
        ({"include": ["qkv", "query"]}, "include patterns match no linear layer: query"),
        ({"exclude": ["*"]}, r"no linear layer matches include=\['\*'\] and exclude=\['\*'\]"),
        ({"groups": 5}, r"groups must divide.*blocks\.0\.attn\.qkv: G = 5, N = 144"),
        ({"groups": {"fc2": 7}}, r"blocks\.0\.mlp\.fc2: G = 7, N = 48$"),
        ({"groups": {"query": 3}}, "groups patterns match no adapted layer: query"),
        ({"groups": {"query": 3}, "recipe": "paper"}, "groups patterns match no adapted layer: query"),
        ({"heads": ["classifier"]}, "heads pattern 'classifier' matches no module.*patch_embed"),
    ],
)
def test_refuses_what_cannot_be_meant_and_changes_nothing(config, message):
    model = tiny_model("vit")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapt_model(model, RLRRConfig(**config))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert not is_adapted(model)


def test_refuses_a_second_adaptation():
    model = tiny_model("vit")
    adapt_model(model)
    with pytest.raises(ValueError, match="is adapted already"):
        adapt_model(model)
    alone = nn.Sequential(RLRRLinear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="is adapted already: 0"):
        adapt_model(alone)


def test_refuses_models_and_layers_it_cannot_adapt():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got dict"):
        adapt_model({})
    with pytest.raises(TypeError, match="config must be an RLRRConfig; got dict"):
        adapt_model(Mlp(), {"rank": 1})
    with pytest.raises(ValueError, match=r"model is itself an nn\.Linear"):
        adapt_model(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the model has none beside its head"):
        adapt_model(nn.Conv2d(3, 3, 1))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"only a plain floating-point nn\.Linear can be adapted; 0 are of type"):
        adapt_model(normed)


def test_a_layer_in_two_places_stays_one():
    model = Mlp()
    model.body.append(model.body[2])
    report = adapt_model(model)
    assert model.body[3] is model.body[2]
    assert report.adapter == sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "body" in n)


@pytest.mark.parametrize("family", ["vit", "swin", "beit"])
def test_compiles_into_one_graph(family):
    model, images = tiny_model(family), tiny_images(family)
    recipe = "paper" if family != "beit" else None
    adapt_model(model, RLRRConfig(recipe=recipe))
    disturb(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    backward(model, images)
    backward(compiled, images)
    check_gradients(compiled)
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_copies_and_state_dicts_round_trip():
    model, images = tiny_model("vit"), tiny_images("vit")
    adapt_model(model, RLRRConfig(recipe="paper"))
    disturb(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    assert is_adapted(twin)
    other = tiny_model("vit")
    adapt_model(other, RLRRConfig(recipe="paper"))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), model(images))


def test_a_backbone_checkpoint_loads_and_misses_only_what_is_trained():
    model, checkpoint = tiny_model("vit"), tiny_model("vit").state_dict()
    adapt_model(model, RLRRConfig(recipe="paper"))
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert not unexpected
    assert set(missing) == {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(dtype):
    model, images = tiny_model("vit"), tiny_images("vit")
    adapt_model(model, RLRRConfig(recipe="paper"))
    with torch.autocast("cpu", dtype=dtype):
        logits = model.train()(images)
    assert logits.dtype == dtype
    logits.float().square().sum().backward()
    check_gradients(model)


def test_parameter_groups_decay_by_role():
    model = tiny_model("vit")
    adapt_model(model, RLRRConfig(recipe="paper"))
    names = {id(p): name for name, p in model.named_parameters()}
    decay, no_decay = parameter_groups(model, lr=1e-3, weight_decay=5e-2)
    assert (decay["weight_decay"], no_decay["weight_decay"], decay["lr"], no_decay["lr"]) == (5e-2, 0.0, 1e-3, 1e-3)
    decayed = {names[id(p)] for p in decay["params"]}
    plain = {names[id(p)] for p in no_decay["params"]}
    assert decayed | plain == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not decayed & plain
    scales = {n for n in names.values() if n.endswith(("scale_row", "scale_col"))}
    assert decayed == scales | {"patch_embed.norm.scale", "patch_embed.norm.shift", "head.weight"}
    torch.optim.AdamW([decay, no_decay])


def test_parameter_groups_refuses_nonsense():
    with pytest.raises(ValueError, match="is not adapted"):
        parameter_groups(Mlp(), 1e-3, 0.0)
    model = Mlp()
    adapt_model(model)
    for lr, weight_decay, name in ((-1.0, 0.0, "lr"), (1e-3, -1.0, "weight_decay"), (float("nan"), 0.0, "lr")):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
            parameter_groups(model, lr, weight_decay)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, 1e-3, 0.0)


def test_import_needs_torch_alone():
    code = "import sys, rlrr_kernels; print(sorted({'timm', 'safetensors', 'typer', 'accelerate'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_head_that_shares_its_weight_with_an_adapted_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"2 is to be trained, but shares a weight with 0, which is to be adapted"):
        adapt_model(model, RLRRConfig(heads=("2",)))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    adapt_model(model, RLRRConfig(heads=("2",)))
    model(torch.ones(1, 8)).sum().backward()
