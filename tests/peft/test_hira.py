"""PEFT's HiRA layers through ``rlrr_linear``: exactness beside PEFT's own, what keeps PEFT's path, and back again."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

peft = pytest.importorskip("peft")
pytest.importorskip("peft.tuners.hira")

from peft.tuners.hira.layer import Linear as HiraLinear

from rlrr_kernels import backends
from rlrr_kernels.numerics import RATIO, Case, error_rule, relative_error
from rlrr_kernels.peft import accelerate_hira, restore


def hira_layer(in_features, out_features, rank, dtype=torch.float32, products=None):
    """One HiRA layer of PEFT, or an accelerated one; its tensors are to be replaced by a functional call."""
    base = nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)
    layer = HiraLinear(base, "default", peft.HiraConfig(r=rank), r=rank)
    if products is not None:
        assert not accelerate_hira(layer, products=products).kept
    return layer


def as_function(rank, products=None):
    """The signature of ``rlrr_linear_reference`` around a HiRA layer."""

    def function(x, weight, scale_row, scale_col, bias, *, residual):
        assert residual
        layer = hira_layer(weight.shape[1], weight.shape[0], rank, weight.dtype, products)
        bias = bias.to(x.dtype)
        tensors = {"base_layer.weight": weight, "base_layer.bias": bias}
        return functional_call(layer, tensors | {"hira_A.default": scale_col[0], "hira_B.default": scale_row}, (x,))

    return function


def model_of(dtype=torch.float32, rank=4, **options):
    """Two linear layers under HiRA whose B is not zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 12)).to(dtype)
    return peft.get_peft_model(base, peft.HiraConfig(r=rank, target_modules=["0", "2"], init_weights=False, **options))


def results(model, x):
    """y and the gradients of everything trained and of x."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads} if x.requires_grad else {"y": y.detach(), **grads}


def kept_by(model, x):
    """Bytes of each storage that autograd saves beyond those of the parameters and x."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return [size for pointer, size in kept.items() if pointer not in known]


# ---------------------------------------------------------------- exactness


cpp = pytest.mark.skipif(backends.CPP_FAILURE is not None, reason="said of the C++ operator; the others keep the rule")


@cpp
@pytest.mark.parametrize("case", [Case(40, 66, 100, rank=1), Case(40, 66, 100, rank=8), Case(9, 130, 70, rank=32)])
def test_float32_is_closer_to_float64_than_peft(case):
    errors = error_rule(as_function(case.rank, "input"), case, reference=as_function(case.rank))
    assert all(errors[name][0] < errors[name][1] for name in ("y", "scale_row", "scale_col")), errors
    assert all(ours <= RATIO * eager for ours, eager in errors.values()), errors


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_float32_agrees_with_peft_to_rounding(rank):
    model, x = model_of(rank=rank), torch.randn(30, 24)
    expected = results(model, x)
    report = accelerate_hira(model)
    assert len(report.accelerated) == 2
    assert not report.kept
    actual = results(model, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value.double()) < 2e-6, name


def test_bfloat16_products_in_float32_are_as_exact_as_peft():
    case = Case(40, 66, 100, rank=8, dtype=torch.bfloat16)
    errors = error_rule(as_function(8, "float32"), case, reference=as_function(8))
    assert all(ours <= RATIO * eager for ours, eager in errors.values()), errors


@cpp
def test_bfloat16_products_by_default_round_the_weight_once():
    """The layer computes what it computes once it is merged in float32 and rounded: the error of one rounding more."""
    case = Case(40, 66, 100, rank=8, dtype=torch.bfloat16)
    errors = error_rule(as_function(8, "input"), case, reference=as_function(8))
    assert 1 < errors["y"][0] / errors["y"][1] < 2
    assert all(ours <= RATIO * eager for name, (ours, eager) in errors.items() if name.startswith("scale")), errors

    layer = hira_layer(100, 66, 8, torch.bfloat16, "input")
    tensors = case.draw(0)
    weight = tensors["weight"].float() * (1 + tensors["scale_row"] @ tensors["scale_col"][0])
    names = "base_layer.weight", "base_layer.bias", "hira_A.default", "hira_B.default"
    bias = tensors["bias"].bfloat16()
    values = tensors["weight"], bias, tensors["scale_col"][0], tensors["scale_row"]
    y = functional_call(layer, dict(zip(names, values, strict=True)), (tensors["x"],))
    exact = nn.functional.linear(tensors["x"].double(), weight.bfloat16().double(), bias.double())
    assert relative_error(y, exact) < torch.finfo(torch.bfloat16).eps / 2  # y's own rounding alone


@pytest.mark.parametrize("products", ["input", "float32"])
def test_several_active_adapters_are_one_of_their_ranks_sum(products):
    model, x = model_of(rank=3), torch.randn(30, 24)
    model.add_adapter("other", peft.HiraConfig(r=5, target_modules=["0", "2"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = results(model, x)
    assert not accelerate_hira(model, products=products).kept
    actual = results(model, x)
    assert {name.split(".")[-1] for name in actual if "hira" in name} == {"default", "other"}
    for name, value in expected.items():
        assert relative_error(actual[name], value.double()) < 2e-6, name


def test_autocast_agrees_with_peft():
    model, x = model_of(rank=8), torch.randn(30, 24)
    exact = results(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, x)
        accelerate_hira(model, products="float32")  # which is not for autocast
        actual = results(model, x)
    assert actual["y"].dtype == expected["y"].dtype == torch.bfloat16
    for name, value in exact.items():
        assert relative_error(actual[name], value.double()) < 1.2 * relative_error(expected[name], value.double()), name


# ---------------------------------------------------------------- what is kept, compiled, copied


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, "input"), (torch.bfloat16, "float32")])
def test_nothing_the_size_of_a_weight_is_kept(dtype, products):
    layer = hira_layer(64, 96, 8, dtype, products)
    nn.init.normal_(layer.hira_B["default"])
    assert kept_by(layer, torch.randn(5, 64, dtype=dtype, requires_grad=True)) == []
    restore(layer)
    kept = kept_by(layer, torch.randn(5, 64, dtype=dtype, requires_grad=True))
    assert max(kept) == dtype.itemsize * 64 * 96  # PEFT's W ⊙ (B A)


@pytest.mark.parametrize("products", ["input", "float32"])
def test_compile_fullgraph(products):
    model, x = model_of(torch.bfloat16), torch.randn(6, 24, dtype=torch.bfloat16)
    accelerate_hira(model, products=products)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("products", ["input", "float32"])
def test_a_traced_model_is_saved_and_computes_as_peft(products, tmp_path):
    model, x = model_of(), torch.randn(6, 24)
    expected = model(x)
    accelerate_hira(model, products=products)
    torch.jit.trace(model, (x,)).save(tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), expected)


@pytest.mark.parametrize("products", ["input", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_and_torch_func(products, dtype):
    model, x = model_of(dtype), torch.randn(6, 24).to(dtype).requires_grad_()
    model.base_model.model[0].base_layer.bias.requires_grad_()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def second():
        (grad,) = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
        inputs = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(grad.float().square().sum(), inputs, allow_unused=True)

    def by_func():
        return torch.func.grad(lambda p: functional_call(model, p, (x,)).float().square().sum())(trained)

    expected = [*second(), *by_func().values()]
    accelerate_hira(model, products=products)
    for actual, value in zip([*second(), *by_func().values()], expected, strict=True):
        assert (actual is None) == (value is None)
        if value is not None:
            assert relative_error(actual, value.double()) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_copies_and_pickles_stay_accelerated():
    model, x = model_of(), torch.randn(6, 24)
    accelerate_hira(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert restore(other) == 2
    assert restore(model) == 2


# ---------------------------------------------------------------- back again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_is_bit_for_bit(dtype):
    model, x = model_of(dtype), torch.randn(30, 24, dtype=dtype)
    before, state = results(model, x), copy.deepcopy(model.state_dict())
    attributes = [sorted(module.__dict__) for module in model.modules()]
    assert restore(model) == 0
    accelerate_hira(model)
    results(model, x)
    assert restore(model) == 2
    after = results(model, x)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert restore(model) == 0


def test_a_layer_that_was_given_another_class_since_is_not_restored():
    """``fully_shard`` makes its layers' classes anew, with its own manners and those of the class before."""
    model = model_of()
    accelerate_hira(model)
    layer = model.base_model.model[2]
    layer.__class__ = type("FSDPAcceleratedLinear", (type(layer),), {})
    with pytest.raises(ValueError, match="given other classes since, by fully_shard: FSDPAcceleratedLinear"):
        restore(model)
    assert type(model.base_model.model[0]) is not HiraLinear
    assert "accelerate the model first" in accelerate_hira(model).kept["base_model.model.2"]


def test_peft_goes_on_as_before(tmp_path):
    """Disabling, merging, saving and deleting work on accelerated layers; a new adapter is accelerated at once."""
    model, x = model_of(), torch.randn(6, 24)
    accelerate_hira(model)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
        assert "disabled" in accelerate_hira(model).kept["base_model.model.0"]
    assert not torch.allclose(y, base)
    model.merge_adapter()
    assert "merged" in accelerate_hira(model).kept["base_model.model.2"]
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    y_after = model(x)  # PEFT divides W' again, which rounds
    torch.testing.assert_close(y_after, y)
    y = y_after
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(model(x), y)
    model.delete_adapter("default")
    assert torch.equal(model(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


# ---------------------------------------------------------------- what keeps PEFT's path


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(12, 24))


def _hooked(model):
    for layer in model.modules():
        if isinstance(layer, HiraLinear):
            layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def _trained(model):
    for layer in model.modules():
        if isinstance(layer, HiraLinear):
            layer.base_layer.weight.requires_grad_()


def _monte_carlo(model):
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def _replaced_forward(model):
    base = model.base_model.model[0].base_layer
    forward = base.forward
    base.forward = lambda x: forward(x) + 100


def _replaced_class(model):
    model.base_model.model[0].base_layer.__class__ = _Scaled


def _two_of_rank_40(model):
    model.add_adapter("other", peft.HiraConfig(r=40, target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _plain():
    return nn.Sequential(nn.Linear(24, 12))


KEPT = {
    "rank": (_plain, {"r": 65}, None, "rank 65 is over 64"),
    "ranks": (_plain, {"r": 40}, _two_of_rank_40, "rank 80 is over 64"),
    "dropout": (_plain, {"hira_dropout": 0.5}, None, "dropout of adapter 'default' in training mode"),
    "dropout in eval mode": (_plain, {"hira_dropout": 0.5}, _monte_carlo, "dropout of adapter 'default' in training"),
    "forward": (_plain, {}, _replaced_forward, "hooks on its base layer, or another forward"),
    "class": (_plain, {}, _replaced_class, "base layer is _Scaled"),
    "subclass": (lambda: nn.Sequential(_Scaled(24, 12)), {}, None, "base layer is _Scaled"),
    "hook": (_plain, {}, _hooked, "hooks on its base layer"),
    "trained": (_plain, {}, _trained, "its base weight is trained"),
    "conv": (lambda: nn.Sequential(nn.Conv2d(24, 12, 1)), {}, None, "Conv2d is no linear layer"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(24, 12)), {}, None, "Embedding is no linear layer"),
    "transposed": (_conv1d, {"fan_in_fan_out": True}, None, "fan_in_fan_out"),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("before", [True, False])
def test_what_keeps_the_path_of_peft(name, before):
    """Whether it is so before the model is accelerated or becomes so afterwards."""
    build, options, prepare, message = KEPT[name]
    config = peft.HiraConfig(**{"r": 4, "target_modules": ["0"], "init_weights": False} | options)
    model = peft.get_peft_model(build(), config).train()
    if not before:
        accelerate_hira(model)
    if prepare is not None:
        prepare(model)
    shape = {"conv": (2, 24, 3, 3), "embedding": (7,)}.get(name, (7, 24))
    x = torch.arange(7) if name == "embedding" else torch.randn(shape)
    torch.manual_seed(1)
    after = results(model, x)
    restore(model)
    torch.manual_seed(1)
    expected = results(model, x)
    report = accelerate_hira(model)
    assert not report.accelerated
    assert message in report.kept["base_model.model.0"]
    assert message in str(report)
    torch.manual_seed(1)
    for found in (after, results(model, x)):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    if name == "dropout":
        assert accelerate_hira(model.eval()).accelerated == ("base_model.model.0",)


def test_dropout_that_drops_nothing_is_accelerated():
    model, x = model_of(hira_dropout=0.5).train(), torch.randn(6, 24)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = model(x)
    assert not accelerate_hira(model).kept
    torch.testing.assert_close(model(x), expected)


def test_dtypes_that_do_not_fit_are_refused_by_peft():
    model = model_of()
    accelerate_hira(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(3, 24, dtype=torch.bfloat16))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="model must have HiRA layers"):
        accelerate_hira(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="products must be one of input, float32; got 'bfloat16'"):
        accelerate_hira(model_of(), products="bfloat16")
