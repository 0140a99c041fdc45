"""The estimate of the scale gradients as a user meets it: what is drawn, bias and variance, layer, model, files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import (
    RLRRConfig,
    RLRRConv2d,
    RLRRLinear,
    RowSample,
    adapt_model,
    load_adapter,
    rlrr_linear,
    save_adapter,
)
from rlrr_kernels.ops.sampling.row_sample import sample_rows
from tests.support.tiny_models import backward, disturb, tiny_images, tiny_model

CPU = torch.device("cpu")


def make_layer(**options) -> RLRRLinear:
    torch.manual_seed(1)
    return RLRRLinear(10, 12, groups=3, dtype=torch.float64, scale_dtype=torch.float64, **options)


def gradients(layer: nn.Module, x: Tensor, grad_y: Tensor) -> Tensor:
    """All scale gradients in one vector."""
    layer.zero_grad()
    layer(x).backward(grad_y)
    return torch.cat([layer.scale_row.grad.flatten(), layer.scale_col.grad.flatten()])


def token_like(images: int, tokens: int) -> tuple[Tensor, Tensor]:
    """x and g of which one token an image has the largest gradient, and the tokens of an image are alike."""
    x = torch.randn(images, 1, 10, dtype=torch.float64) + 0.5 * torch.randn(images, tokens, 10, dtype=torch.float64)
    grad_y = torch.randn(images, 1, 12, dtype=torch.float64) + 0.5 * torch.randn(images, tokens, 12).double()
    grad_y[:, 0] *= 8
    return x, grad_y


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("fraction", "drawn"), [(0.5, 8), (0.25, 4), (0.125, 2), (0.03, 1), (0.34, 5), (0.9, 14)])
def test_every_image_gives_its_prefix_and_as_many_of_its_other_tokens(fraction: float, drawn: int):
    index, kept, weight, images = sample_rows(torch.Size((5, 18, 10)), fraction, 2, CPU)
    assert index[:kept].tolist() == [18 * image + token for image in range(5) for token in (0, 1)]
    rows = index[kept:].view(5, drawn)
    assert (weight, images) == ((15 / (drawn - 1), 5) if drawn >= 4 else (16 / drawn, 0))
    for image in range(5):
        numbers = rows[image].tolist()
        assert numbers == sorted(set(numbers))
        assert all(18 * image + 2 <= number < 18 * (image + 1) for number in numbers)


def test_every_token_is_drawn_equally_often():
    counts = torch.zeros(3 * 9)
    for _ in range(2000):
        index, kept, *_ = sample_rows(torch.Size((3, 3, 3, 10)), 0.3, 1, CPU)
        counts[index[kept:]] += 1
    counts = counts.view(3, 9)
    assert (counts[:, 0] == 0).all()
    expected, deviation = 2000 / 4, math.sqrt(2000 * (1 / 4) * (3 / 4))
    assert ((counts[:, 1:] - expected).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize(
    ("shape", "fraction", "prefix"),
    [
        ((4, 1, 10), 0.5, 1),
        ((4, 2, 10), 0.5, 1),
        ((0, 9, 10), 0.5, 0),
        ((10,), 0.5, 0),
        ((1, 10), 0.1, 0),
        ((4, 9, 10), 0.99, 0),
    ],
)
def test_nothing_is_drawn_where_it_would_be_every_row(shape: tuple, fraction: float, prefix: int):
    assert sample_rows(torch.Size(shape), fraction, prefix, CPU) is None


def test_rows_of_a_matrix_are_one_image_without_prefix():
    index, kept, weight, images = sample_rows(torch.Size((40, 10)), 0.25, 3, CPU)
    assert (len(set(index.tolist())), kept, weight, images) == (10, 0, 4.0, 0)


# ---------------------------------------------------------------- bias and variance


def z_scores(estimates: Tensor, exact: Tensor) -> Tensor:
    """(mean - exact) in standard errors, by coordinate, of estimates [draws, size]."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error > 0).all()
    return (estimates.mean(0) - exact) / error


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("prefix", [0, 1])
def test_unbiased(prefix: int, share: float):
    """Of eight or nine tokens two are drawn or, with images, four or five."""
    x, grad_y = token_like(4, 9)
    layer = make_layer(scale_grad_rows=share, prefix_tokens=prefix)
    assert (layer._draw_rows(x).images > 0) == (share == 0.5)
    exact = gradients(layer.eval(), x, grad_y)
    layer.train()
    estimates = torch.stack([gradients(layer, x, grad_y) for _ in range(800)])
    assert z_scores(estimates, exact).abs().max() < 4.5
    assert z_scores(0.8 * estimates, exact).abs().max() > 4.5, "a bias of a fifth would not be seen"


@pytest.mark.parametrize("dynamic", [False, True])
def test_unbiased_when_compiled(dynamic: bool):
    """With images. A draw made anew for the backward would pair rows of g with other rows of x."""
    x, grad_y = token_like(4, 9)
    layer = make_layer(scale_grad_rows=0.5, prefix_tokens=1)
    exact = gradients(layer.eval(), x, grad_y)
    torch._dynamo.reset()
    compiled = torch.compile(layer.train(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for images in (3, 4):  # 3 alone would not show a number of images that the first call left in the graph
        estimates = []
        for _ in range(400):
            layer.zero_grad()
            compiled(x[:images]).backward(grad_y[:images])
            estimates.append(torch.cat([layer.scale_row.grad.flatten(), layer.scale_col.grad.flatten()]))
    assert z_scores(torch.stack(estimates), exact).abs().max() < 4.5


def test_two_processes_average_to_the_gradient_of_the_whole_batch():
    """Each has half of the batch and a generator of its own, as DistributedDataParallel's processes do."""
    x, grad_y = token_like(4, 9)
    layer = make_layer(scale_grad_rows=0.5, prefix_tokens=1)
    exact = gradients(layer.eval(), x, grad_y) / 2
    layer.train()
    states, estimates = [torch.Generator().manual_seed(rank).get_state() for rank in (3, 4)], []
    for _ in range(800):
        parts = []
        for rank in range(2):
            torch.set_rng_state(states[rank])
            half = slice(2 * rank, 2 * rank + 2)
            parts.append(gradients(layer, x[half], grad_y[half]))
            states[rank] = torch.get_rng_state()
        estimates.append((parts[0] + parts[1]) / 2)
    assert z_scores(torch.stack(estimates), exact).abs().max() < 4.5


def test_prefix_images_and_means_take_variance_away():
    """Beside as many uniformly drawn rows, and beside the same rows without their means."""
    x, grad_y = token_like(8, 33)
    layer = make_layer(scale_grad_rows=0.25, prefix_tokens=1)
    exact = gradients(layer.eval(), x, grad_y)
    layer.train()

    def variance(draw) -> float:
        """The total over all coordinates, of 200 draws."""
        layer._draw_rows = draw
        estimates = torch.stack([gradients(layer, x, grad_y) for _ in range(200)])
        return (estimates - exact).square().sum(1).mean().item()

    def sampled(x: Tensor) -> RowSample:
        return sample_rows(x.shape, 0.25, 1, CPU)

    def without_means(x: Tensor) -> RowSample:
        return sampled(x)._replace(weight=32 / 8, images=0)

    def uniform(x: Tensor) -> RowSample:
        return RowSample(torch.randperm(8 * 33)[: 8 * 9], 0, 33 / 9)

    ours, plain = variance(sampled), variance(without_means)
    assert ours < 0.6 * plain
    assert plain < variance(uniform) / 4


# ---------------------------------------------------------------- the layer


def test_repeatable_under_a_seed_and_exact_in_eval_mode():
    x, grad_y = token_like(4, 9)
    layer, exact = make_layer(scale_grad_rows=0.5, prefix_tokens=1), make_layer()
    results = []
    for number in (5, 5, 6):
        torch.manual_seed(number)
        results.append(gradients(layer, x, grad_y))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    state = torch.get_rng_state()
    assert torch.equal(gradients(layer.eval(), x, grad_y), gradients(exact, x, grad_y))
    layer.train().scale_row.requires_grad_(False)
    layer.scale_col.requires_grad_(False)
    layer(x).backward(grad_y)
    assert torch.equal(state, torch.get_rng_state())
    assert "scale_grad_rows=0.5" in repr(layer)


def test_only_the_scales_are_estimated():
    x, grad_y = token_like(4, 9)
    results = []
    for share in (1.0, 0.25):
        layer, leaf = make_layer(scale_grad_rows=share), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad_y)
        results.append((y, leaf.grad, layer.shift.grad))
    for exact, estimated in zip(*results, strict=True):
        torch.testing.assert_close(exact, estimated, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_finds_the_same_rows_and_the_same_dropout(reentrant: bool):
    x, grad_y = token_like(4, 9)
    layer = make_layer(scale_grad_rows=0.25)
    block = nn.Sequential(layer, nn.Dropout(0.5))
    results = []
    for again in (False, True):
        torch.manual_seed(2)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(block, leaf, use_reentrant=reentrant) if again else block(leaf)
        y.backward(grad_y)
        results.append(
            [leaf.grad, layer.scale_row.grad.clone(), layer.scale_col.grad.clone(), layer.shift.grad.clone()]
        )
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale_grad_rows": 0.0}, ValueError, "scale_grad_rows must be over 0 and at most 1, .*; got 0.0"),
        ({"scale_grad_rows": 1.5}, ValueError, "scale_grad_rows must be over 0 and at most 1, .*; got 1.5"),
        ({"scale_grad_rows": math.nan}, ValueError, "scale_grad_rows must be .*; got nan"),
        ({"scale_grad_rows": "half"}, TypeError, "scale_grad_rows must be a number; got 'half'"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens must be at least 0; got -1"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make_layer(**options)
    if "prefix_tokens" not in options:
        with pytest.raises(error, match=message):
            RLRRConfig(**options)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (0.5, TypeError, "scale_grad_rows must be a RowSample or None; got float"),
        (RowSample([1]), TypeError, "scale_grad_rows.index must be a Tensor of torch.int32 or torch.int64; got list"),
        (RowSample(torch.ones(3)), TypeError, "scale_grad_rows.index must be .*; got torch.float32"),
        (RowSample(torch.zeros(2, 2).long()), ValueError, r"scale_grad_rows.index must be \[S\]; got shape \(2, 2\)"),
        (RowSample(torch.arange(3), 4), ValueError, "scale_grad_rows.kept must be from 0 to S = 3; got 4"),
        (RowSample(torch.arange(3), 1, math.inf), ValueError, "scale_grad_rows.weight must be a finite number .* inf"),
        (RowSample(torch.empty(3, device="meta").long()), ValueError, "must be on the device of x, cpu; got meta"),
        (RowSample(torch.arange(4), 2, 2.0, 4), ValueError, "images must divide the rows of x, 6, .*; got 4"),
        (
            RowSample(torch.arange(3), 1, 2.0, 2),
            ValueError,
            "kept entries, 1, and the others, 2, .*; got 2",
        ),
        (RowSample(torch.arange(2), 2, 2.0, 2), ValueError, "and the others, 0, of which it needs some; .* got 2"),
        (RowSample(torch.arange(2), 0, 2.0, -1), ValueError, "scale_grad_rows.images must .*; got -1"),
        (RowSample(torch.tensor([7])), IndexError, "index"),
    ],
)
def test_bad_samples(sample, error: type[Exception], message: str):
    layer = make_layer()
    with pytest.raises(error, match=message):
        rlrr_linear(torch.randn(6, 10).double(), layer.weight, layer.scale_row, layer.scale_col, scale_grad_rows=sample)


# ---------------------------------------------------------------- models, files


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(images)  # alive while its tensors are counted
        return sum(size for pointer, size in seen.items() if pointer not in parameters) + 0 * len(y)


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit", 2), ("swin", 0), ("convnext", 0)])
def test_a_model_keeps_less_and_trains_all_but_the_scales_exactly(family: str, prefix: int):
    images, found = tiny_images(family), []
    for share in (1.0, 0.5):
        model = tiny_model(family)
        adapt_model(model, RLRRConfig(scale_grad_rows=share))
        torch.manual_seed(4)
        disturb(model)
        layers = [module for module in model.modules() if isinstance(module, RLRRLinear)]
        assert {(layer.scale_grad_rows, layer.prefix_tokens) for layer in layers} == {(share, prefix)}
        backward(model, images)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        found.append((saved_bytes(model, images), grads))
    (kept, exact), (less, estimated) = found
    assert less < kept
    for name, gradient in exact.items():
        if "scale_" not in name:
            torch.testing.assert_close(estimated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    scales = [name for name in exact if "scale_" in name and not torch.equal(exact[name], estimated[name])]
    assert scales


def test_an_adapter_file_does_not_hold_how_it_was_trained(tmp_path):
    config = RLRRConfig(scale_grad_rows=0.25)
    assert "scale_grad_rows" not in config.to_dict()
    assert RLRRConfig.from_dict(config.to_dict()) == RLRRConfig()
    with pytest.raises(ValueError, match="does not know: scale_grad_rows"):
        RLRRConfig.from_dict(config.to_dict() | {"scale_grad_rows": 0.25})
    model = tiny_model("vit")
    adapt_model(model, config)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    fresh, adapted, images = tiny_model("vit"), tiny_model("vit"), tiny_images("vit")
    adapt_model(adapted, RLRRConfig(scale_grad_rows=0.5))
    for other, share in ((fresh, 1.0), (adapted, 0.5)):
        load_adapter(other, tmp_path / "adapter")
        assert {m.scale_grad_rows for m in other.modules() if isinstance(m, RLRRLinear)} == {share}
        torch.testing.assert_close(other.eval()(images), model.eval()(images))


def test_convolutions_stay_exact():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(16, 8))
    adapt_model(model, RLRRConfig(convs="*", scale_grad_rows=0.5, heads=()))
    assert isinstance(model[0], RLRRConv2d)
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert model[0].scale_row.grad is not None
