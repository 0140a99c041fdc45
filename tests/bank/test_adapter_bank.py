"""An adapter bank: logits as of each adapter loaded alone, what fits and what is refused, and training in it."""

from __future__ import annotations

import copy
import re
import sys
import threading
import types
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import (
    AdapterBank,
    RLRRConfig,
    adapt_model,
    adapter_info,
    load_adapter,
    parameter_groups,
    save_adapter,
)
from rlrr_kernels.adapt.folder.save_load import trained_tensors
from rlrr_kernels.bank import AdapterState, UnknownAdapterError
from tests.support.tiny_models import disturb, tiny_images, tiny_model

pytest.importorskip("safetensors", reason="needs safetensors, of the extra [models]")

RECIPES = {"vit": "paper", "swin": "paper", "beit": "paper", "deit": "paper", "convnext": None, "resnet": None}
EVERY_CONV = {"convs": ("*",)}


def backbone(family="vit", classes=5):
    model = tiny_model(family)
    if classes != 5:
        torch.manual_seed(1)
        model.reset_classifier(classes)
    return model


def alone(family="vit", seed=0, classes=5, **config):
    """A model adapted as ``config`` says, away from its start, as a bank's adapter is to answer."""
    model = backbone(family, classes)
    adapt_model(model, RLRRConfig(**config))
    torch.manual_seed(seed)
    disturb(model)
    return model


def state(model, metadata=None):
    config = model.rlrr_adaptation.config
    return AdapterState(config, {n: t.detach() for n, t in trained_tensors(model)[0].items()}, metadata or {})


def configurations(family):
    if family == "resnet":
        return [
            EVERY_CONV,
            EVERY_CONV,
            {**EVERY_CONV, "rank": 3, "conv_layout": "out*kh,in*kw"},
            {"convs": ("layer1.*",)},
        ]
    forms = [
        {"recipe": RECIPES[family]},
        {"recipe": RECIPES[family]},
        {"rank": 3, "groups": 2, "shift": "with_bias"},
        {"sides": "left", "shift": False},
        {"sides": "right", "residual": False},
        {"sides": "right", "residual": False},
        {"sides": "right", "groups": 2},
        {"sides": "right", "groups": 2},
        {"sides": "left", "shift": False},
        {"include": ("*.fc1",)},
    ]
    if family == "convnext":
        forms += [
            {"convs": ("*",), "rank": 2},
            {"convs": ("*conv_dw",), "conv_layout": "out*kh,in*kw", "sides": "right"},
        ]
    return forms


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("family", RECIPES)
def test_every_sample_gets_the_logits_of_its_adapter_loaded_alone(family, tmp_path):
    models = [alone(family, i, 3 + i, **config) for i, config in enumerate(configurations(family))]
    bank = AdapterBank(backbone(family))
    for i, model in enumerate(models):
        assert bank.add(f"task {i}", save_adapter(model, tmp_path / str(i))).classes == 3 + i
    plain, images = backbone(family), torch.cat([tiny_images(family) for _ in range(6)])
    names = [None if i % 4 == 3 else f"task {i % len(models)}" for i in range(18)]
    with torch.no_grad():
        logits = bank(images, names)
        for image, name, got in zip(images, names, logits, strict=True):
            wanted = (plain if name is None else models[int(name.split()[1])])(image[None])[0]
            assert got.shape == wanted.shape
            assert relative_error(got, wanted) < 1e-6
        assert torch.equal(torch.stack(bank(images[:3], ["task 1"] * 3)), models[1](images[:3]))  # the same path
        # BEiT adds its biases in another order once its layers are called.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if family == "beit" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(bank.model(images), plain(images), **tolerance)
    assert list(bank.model.state_dict()) == list(plain.state_dict())


def test_16_bit_backbones_round_as_the_adapter_alone_does():
    models = {name: alone(seed=seed, recipe="paper").bfloat16() for seed, name in enumerate("abc")}
    for model in models.values():  # scales stay in fp32
        for name, parameter in trained_tensors(model)[0].items():
            if not name.startswith("head"):
                parameter.data = parameter.data.float()
    bank = AdapterBank(backbone().bfloat16())
    for name, model in models.items():
        bank.add(name, state(model))
    images, names = torch.randn(48, 3, 32, 32).bfloat16(), list("abc") * 16
    with torch.no_grad():
        got = torch.stack(bank(images, names))
        pairs = [(models[name](i[None])[0], copy.deepcopy(models[name]).float()(i[None].float())[0])
                 for i, name in zip(images, names, strict=True)]  # fmt: skip
    wanted, exact = (torch.stack(values) for values in zip(*pairs, strict=True))
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), exact) < 1.1 * relative_error(wanted.float(), exact)


def test_samples_keep_their_order_in_every_output():
    models = {name: alone(seed=seed, classes=2 + seed, recipe="paper") for seed, name in enumerate("abc")}
    bank = AdapterBank(backbone())
    for name, model in models.items():
        bank.add(name, state(model))
    images, names = torch.randn(5, 3, 32, 32), ["c", "a", None, "c", "b"]
    with torch.no_grad(), bank.tasks(names):
        padded, features = bank.model(images), bank.model.forward_features(images)
    assert padded.shape == (5, 5)
    assert padded.isneginf().sum(1).tolist() == [1, 3, 0, 1, 2]
    with torch.no_grad():
        for i, name in enumerate(names):
            model = backbone() if name is None else models[name]
            torch.testing.assert_close(padded[i][padded[i].isfinite()], model(images[i : i + 1])[0])
            torch.testing.assert_close(features[i], model.forward_features(images[i : i + 1])[0])


@pytest.mark.parametrize(("family", "recipe"), [("vit", "paper"), ("swin", None)])
def test_peft_folders(family, recipe, tmp_path):
    """Without the recipe the norms are modules of a task's own, as PEFT has them."""
    pytest.importorskip("peft", reason="needs peft, of the extra [peft]")
    from rlrr_kernels.peft import to_peft

    models = {"paper": alone(family, 1, 4, recipe="paper"), "layers": alone(family, 2, 3, rank=2)}
    bank = AdapterBank(backbone(family))
    for name, model in models.items():
        to_peft(model, tmp_path / name)
    assert bank.add("paper", tmp_path / "paper", recipe=recipe).classes == 4
    assert bank.add("layers", tmp_path / "layers").classes == 3
    images, names = tiny_images(family), ["paper", "layers", "paper"]
    with torch.no_grad():
        for image, name, got in zip(images, names, bank(images, names), strict=True):
            assert relative_error(got, models[name](image[None])[0]) < 1e-5
        assert torch.equal(bank.model(images), backbone(family)(images))


def test_add_swap_and_remove(tmp_path):
    old, new = alone(seed=1), alone(seed=2, classes=3, rank=2)
    bank = AdapterBank(backbone())
    bank.add("solar cells", state(old, {"classes": ["a"]}))
    with pytest.raises(ValueError, match=r"has an adapter 'solar cells' already; swap\(\)"):
        bank.add("solar cells", state(new))
    images = torch.randn(2, 3, 32, 32)
    assert bank.info("solar cells").metadata == {"classes": ["a"]}
    assert torch.equal(bank(images, ["solar cells"] * 2)[0], old(images)[0])
    bank.swap("solar cells", save_adapter(new, tmp_path))
    assert torch.equal(bank(images, ["solar cells"] * 2)[0], new(images)[0])
    assert (bank.info("solar cells").classes, bank.info("solar cells").folder) == (3, tmp_path)
    for call in (lambda name: bank(images[:1], [name]), bank.remove, lambda name: bank.swap(name, tmp_path), bank.info):
        with pytest.raises(UnknownAdapterError, match="no adapter 'solar cell'; did you mean 'solar cells'"):
            call("solar cell")
    bank.remove("solar cells")
    assert (bank.names, len(bank), "solar cells" in bank, bank.nbytes) == ((), 0, False, 0)
    assert torch.equal(bank.model(images), backbone()(images))


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    bank = AdapterBank(backbone())
    other = tiny_model("vit", embed_dim=96)
    adapt_model(other)
    with pytest.raises(
        ValueError, match=r"does not fit this VisionTransformer:\n.*blocks.0.attn.qkv.scale_row"
    ) as error:
        bank.add("wide", save_adapter(other, tmp_path / "wide"))
    assert str(error.value).count("\n") > 10
    unfrozen = alone(recipe="paper")
    unfrozen.pos_embed.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains more than adapter and head.*pos_embed"):
        bank.add("unfrozen", save_adapter(unfrozen, tmp_path / "unfrozen"))
    with pytest.raises(ValueError, match="form='rescaled'; got form='additive'"):
        bank.add("additive", state(alone(form="additive")))
    broken = state(alone())
    next(iter(broken.tensors.values()))[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        bank.add("broken", broken)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        bank.add("missing", tmp_path / "missing")
    with pytest.raises(ValueError, match="name must be a text"):
        bank.add("", state(alone()))
    foreign = tiny_model("vit", seed=7)
    adapt_model(foreign)
    with pytest.warns(UserWarning, match="is this the right checkpoint"):
        bank.add("foreign", save_adapter(foreign, tmp_path / "foreign"))
    assert bank.names == ("foreign",)
    with pytest.raises(ValueError, match="belongs to a bank already"):
        AdapterBank(bank.model)
    with pytest.raises(ValueError, match="adapted already"):
        AdapterBank(alone())
    with pytest.raises(ValueError, match="memory_budget must be"):
        AdapterBank(backbone(), memory_budget=-1)


def test_batches_that_do_not_fit_their_names():
    bank = AdapterBank(backbone())
    bank.add("a", state(alone()))
    images = torch.randn(4, 3, 32, 32)
    with pytest.raises(ValueError, match="each of the 4 samples; got 2 names"):
        bank(images, ["a", "a"])
    several = pytest.raises(
        ValueError, match=r"as many samples as tasks were named, 2; got tensors of \[\[4, 3, 32, 32\]\]"
    )
    with several, bank.tasks(["a", None]):
        bank.model(images)
    with pytest.raises(TypeError, match="got the text 'aaaa'"), bank.tasks("aaaa"):
        pass
    assert torch.equal(bank.model(images), backbone()(images))  # nothing is left of the failed ones


def test_a_layer_that_does_not_see_samples_apart_is_named():
    bank = AdapterBank(tiny_model("swinv2"))
    model = tiny_model("swinv2")
    adapt_model(model, RLRRConfig(include=("cpb_mlp.*",)))  # of positions, the same for all samples
    bank.add("a", state(model))
    with pytest.raises(RuntimeError, match=r"cpb_mlp.0 must get the 3 samples .* got shape \(1, 15, 15, 2\)"):
        bank(tiny_images("swinv2"), ["a", None, "a"])


class Net(torch.nn.Module):
    """Any module, whose answer comes in a container."""

    def __init__(self, container=lambda logits: {"logits": logits}):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.container = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), container

    def forward(self, x, *, scale=1.0):
        return self.container(self.fc(self.body(x[0] if isinstance(x, tuple) else x).relu()) * scale)


def test_any_module_and_answers_in_containers():
    banks = {
        kind: AdapterBank(Net(container)) for kind, container in (("tensor", lambda x: x), ("list", lambda x: [x, 1]))
    }
    models = {}
    for name, heads in (("a", None), ("b", None), ("shared head", ())):
        models[name] = Net(lambda x: x)
        adapt_model(models[name], RLRRConfig(heads=heads))
        disturb(models[name])
        for bank in banks.values():
            info = bank.add(name, state(models[name]))
            assert info.classes == (3 if heads is None else None)
    x, names = torch.randn(5, 4, 6)[:, 0], ["b", "a", "shared head", None, "b"]
    got = banks["tensor"](x, names)
    for i, name in enumerate(names):
        torch.testing.assert_close(got[i], (Net(lambda x: x) if name is None else models[name])(x[i : i + 1])[0])
    with banks["list"].tasks(names):
        torch.testing.assert_close(banks["list"].model((x,), scale=2.0)[0], 2 * torch.stack(got))
    with pytest.raises(TypeError, match="must return logits"):
        banks["list"](x, names)
    assert banks["tensor"](x[:0], []) == []


def test_what_may_hold_samples_and_cannot_be_sorted_is_refused():
    bank = AdapterBank(Net(lambda logits: types.SimpleNamespace(logits=logits)))
    model = Net(lambda x: x)
    adapt_model(model)
    bank.add("a", state(model))
    x = torch.randn(2, 6)
    assert torch.equal(bank(x, ["a", "a"])[0], model(x)[0])  # nothing to sort
    with pytest.raises(TypeError, match="a SimpleNamespace of the model may hold tensors"):
        bank(x, ["a", None])


def test_a_copied_model_is_bare():
    bank = AdapterBank(backbone())
    bank.add("a", state(alone()))
    images = torch.randn(2, 3, 32, 32)
    with bank.tasks(["a", "a"]):
        twin = copy.deepcopy(bank.model)
        assert torch.equal(twin(images), backbone()(images))
    twin.head.weight.data.zero_()
    assert bank.model.head.weight.any()


def test_loading_weights_into_the_model_reaches_every_module():
    bank = AdapterBank(backbone())
    bank.add("a", state(alone(recipe="paper")))
    other = tiny_model("vit", seed=3)
    bank.model.load_state_dict(other.state_dict(), assign=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(bank.model(images), other(images))


@pytest.mark.slow  # every composition of a batch compiles
def test_a_compiled_model_answers_as_the_eager_one():
    bank = AdapterBank(backbone())
    for seed, name in enumerate("abc"):
        bank.add(name, state(alone(seed=seed, recipe="paper")))
    torch._dynamo.reset()
    compiled, images = torch.compile(bank.model, backend="aot_eager"), torch.randn(6, 3, 32, 32)
    for names in ("abcabc", "cbacba", "bbbbbb", "aabacb"):
        with torch.no_grad(), bank.tasks(list(names)):
            torch.testing.assert_close(compiled(images), bank.model(images))


# ---------------------------------------------------------------- training


def test_gradients_reach_each_tasks_own_parameters_exactly():
    bank = AdapterBank(backbone())
    configs = {"a": {"recipe": "paper"}, "b": {"recipe": "paper"}, "c": {"rank": 2}, "frozen": {"recipe": "paper"}}
    configs |= {name: {"sides": "right", "groups": 3} for name in "de"}
    models = {}
    for i, (name, config) in enumerate(configs.items()):
        models[name] = bank.trainable(name, RLRRConfig(**config), classes=3 + i)
        torch.manual_seed(i)
        disturb(models[name])
    bank.freeze("frozen")
    del models["frozen"]
    torch.manual_seed(0)
    names = ["a", "b", "frozen", "a", "c", "b", "c", None, "d", "e"]
    images, labels = torch.randn(10, 3, 32, 32), torch.randint(3, (10,))
    losses = [cross_entropy(row[None], label[None]) for row, label in zip(bank(images, names), labels, strict=True)]
    sum(losses).backward()
    for name, model in models.items():
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        got = {n: p.grad for n, p in trained.items()}
        model.zero_grad(set_to_none=True)
        mine = [i for i, task in enumerate(names) if task == name]
        cross_entropy(model(images[mine]), labels[mine], reduction="sum").backward()
        for key, parameter in trained.items():
            assert relative_error(got[key], parameter.grad) < 1e-5, (name, key)
    assert not any(p.requires_grad or p.grad is not None for p in bank.model.parameters())


def trained_bank():
    """A bank with trained adapters a and b, four images, weights of their logits, and what takes the gradients."""
    bank = AdapterBank(backbone())
    models = [bank.trainable(name, RLRRConfig(recipe="paper"), classes=3) for name in "ab"]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        disturb(model)
    images, weights = torch.randn(4, 3, 32, 32, requires_grad=True), torch.randn(4, 3)
    trained = [p for model in models for p in model.parameters() if p.requires_grad]

    def taken():
        found = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        return found

    return bank, images, weights, taken


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names", ["aabb", "baab"])
@pytest.mark.parametrize("call", ["whole", "parts", "both"])
def test_gradients_of_a_checkpointed_model(reentrant, names, call):
    bank, images, weights, taken = trained_bank()

    def gradients():
        with bank.tasks(list(names)):
            y = bank.model.forward_head(bank.model.forward_features(images)) if call == "parts" else bank.model(images)
            if call == "both":
                bank.model.forward_features(images)
            (y * weights).sum().backward()
        return taken()

    expected = gradients()
    for block in bank.model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    if (call, names) == ("both", "baab"):
        with pytest.raises(RuntimeError, match="as a whole and in parts"):
            gradients()
    else:
        for got, wanted in zip(gradients(), expected, strict=True):
            assert relative_error(got, wanted) < 1e-5


def in_a_thread_of_autograd(function):
    """Runs ``function`` within a backward in a thread other than this one, as those of GPUs are.

    On a CPU autograd takes one for backwards that are nested more than 60 deep.
    """

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                if ctx.depth:
                    Deeper.apply(torch.zeros(1, requires_grad=True), ctx.depth - 1).backward()
                else:
                    assert threading.get_ident() != here
                    function()
            return grad, None

    here = threading.get_ident()
    Deeper.apply(torch.zeros(1, requires_grad=True), 70).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_another_thread_computes_again_have_their_tasks(reentrant):
    bank, images, weights, taken = trained_bank()

    def gradients(run):
        with bank.tasks(list("baab")):
            loss = (bank.model(images) * weights).sum()
            run(loss.backward)
        return taken()

    expected = gradients(lambda backward: backward())
    for block in bank.model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    for got, wanted in zip(gradients(in_a_thread_of_autograd), expected, strict=True):
        assert relative_error(got, wanted) < 1e-5
    in_a_thread_of_autograd(lambda: torch.testing.assert_close(bank.model(images), bank.model.eval()(images)))


def test_a_batch_lives_as_long_as_it_is_used():
    """Before torch 2.12 thread-local objects of autograd's took over references of others."""
    bank = AdapterBank(backbone())
    for _ in range(3):
        with bank.tasks([None]) as batch:
            held = sys.getrefcount(batch)
            with bank.tasks([None]):
                pass
            assert sys.getrefcount(batch) == held
        assert sys.getrefcount(batch) == 2  # the name and the argument


def test_a_tasks_optimizer_step_changes_its_answers_alone(tmp_path):
    bank = AdapterBank(backbone())
    torch.manual_seed(0)
    models = {name: bank.trainable(name, RLRRConfig(recipe="paper"), classes=3) for name in "ab"}
    assert all(m.blocks[0].attn.qkv.weight is bank.model.blocks[0].attn.qkv.weight for m in models.values())
    optimizer = torch.optim.SGD(parameter_groups(models["a"], lr=0.1, weight_decay=0.01))
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    before = [row.detach() for row in bank(images, list("abab"))]
    with bank.tasks(list("abab")):
        cross_entropy(bank.model(images), labels).backward()
    optimizer.step()
    after = bank(images, list("abab"))
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [False, True, False, True]
    assert relative_error(after[0], models["a"](images[:1])[0]) < 1e-5  # libraries sum fewer rows in another order
    assert bank.trainable("a") is models["a"]
    assert bank.info("a").trainable
    assert not bank.freeze("a").trainable
    with torch.no_grad():
        models["a"].head.weight.zero_()  # no longer the bank's
    torch.testing.assert_close(bank(images, ["a"] * 4)[0], after[0])
    folder = bank.save("a", tmp_path / "a", metadata={"classes": list("xyz")})
    assert adapter_info(folder).base_model["num_classes"] == 3
    fresh = backbone(classes=3)
    load_adapter(fresh, folder)
    torch.testing.assert_close(fresh(images)[0], after[0])
    assert bank.trainable("a") is not models["a"]  # trained on, from its values
    torch.testing.assert_close(bank.trainable("a")(images)[0], after[0])
    with pytest.raises(ValueError, match=re.escape("has an adapter 'a' already; trainable(name)")):
        bank.trainable("a", RLRRConfig())


def test_values_loaded_into_a_trainable_model_are_those_of_the_batch():
    bank, other = AdapterBank(backbone()), AdapterBank(backbone())
    model, donor = (each.trainable("a", RLRRConfig(recipe="paper")) for each in (bank, other))
    disturb(donor)
    model.load_state_dict(donor.state_dict(), assign=True)
    images = torch.randn(2, 3, 32, 32)
    rows = bank(images, ["a", "a"])
    assert relative_error(torch.stack(rows), donor(images)) < 1e-5
    assert bank.freeze("a").trainable is False
    assert relative_error(torch.stack(bank(images, ["a", "a"])), donor(images)) < 1e-5


def test_what_is_made_trainable_in_inference_mode_trains():
    bank = AdapterBank(tiny_model("vit"))
    with torch.inference_mode():
        models = [bank.trainable("new", RLRRConfig(recipe="paper"), classes=4)]
        bank.freeze("new")
        models.append(bank.trainable("new"))
        models.append(bank.trainable("other", RLRRConfig(rank=2)))
    disturb(models[2])
    sum(row.sum() for row in bank(torch.randn(2, 3, 32, 32), ["new", "other"])).backward()
    assert all(p.grad is not None for model in models[1:] for p in model.parameters() if p.requires_grad)


def test_a_new_adapter_starts_as_adapt_model_starts_it():
    bank, plain = AdapterBank(backbone()), backbone()
    torch.manual_seed(3)
    trained = bank.trainable("a", RLRRConfig(recipe="paper"))
    torch.manual_seed(3)
    plain.head.reset_parameters()
    adapt_model(plain, RLRRConfig(recipe="paper"))
    ours, theirs = trained_tensors(trained)[0], trained_tensors(plain)[0]
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
