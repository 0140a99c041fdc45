"""``RLRRConv2d`` and its function: the error rule, exact gradients, memory, merging, compilation and transforms."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels import RLRRConv2d, numerics
from rlrr_kernels.ops.conv import CONV_LAYOUTS, matrix_shape, rlrr_conv2d
from rlrr_kernels.reference import rlrr_conv2d_reference

on_both_layouts = pytest.mark.parametrize("layout", CONV_LAYOUTS)

GEOMETRIES = {
    "3x3": {"kernel": (6, 5, 3, 3), "padding": (1, 1)},
    "patches": {"kernel": (7, 3, 6, 6), "stride": (6, 6)},
    "strided and dilated": {"kernel": (5, 4, 3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (2, 3)},
    "grouped": {"kernel": (6, 2, 3, 3), "padding": (1, 1), "groups": 3},
    "depthwise": {"kernel": (4, 1, 7, 7), "padding": (3, 3), "groups": 4},
    "1x1": {"kernel": (8, 6, 1, 1)},
}


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """A problem as ``numerics`` draws it."""

    kernel: tuple[int, int, int, int]
    layout: str
    rank: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    batch: int = 3

    @property
    def options(self) -> dict:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "layout")}

    def draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        rows, cols = matrix_shape(self.kernel, self.layout)
        x = normal(self.batch, self.kernel[1] * self.groups, 12, 14, dtype=self.dtype)
        conv = {name: value for name, value in self.options.items() if name != "layout"}
        grad_shape = F.conv2d(x.double(), torch.zeros(self.kernel, dtype=torch.float64), **conv).shape
        return {
            "x": x,
            "weight": normal(*self.kernel, dtype=self.weight_dtype or self.dtype),
            "scale_row": normal(rows, self.rank, dtype=wide, scale=self.rank**-0.25),
            "scale_col": normal(1, self.rank, cols, dtype=wide, scale=self.rank**-0.25),
            "bias": normal(self.kernel[0], dtype=wide),
            "grad_y": normal(*grad_shape, dtype=self.dtype),
        }

    def check(self) -> None:
        function = partial(rlrr_conv2d, **self.options)
        numerics.check_error_rule(function, self, 64, partial(rlrr_conv2d_reference, **self.options))


@pytest.mark.usefixtures("poisoned_memory")
@on_both_layouts
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("rank", [1, 10])
def test_error_rule(geometry: str, rank: int, layout: str):
    for dtype in (torch.float32, torch.float64):
        ConvCase(**GEOMETRIES[geometry], layout=layout, rank=rank, dtype=dtype).check()


@on_both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_error_rule_of_16_bits(dtype, weight_dtype, layout: str):
    ConvCase(**GEOMETRIES["3x3"], layout=layout, rank=2, dtype=dtype, weight_dtype=weight_dtype).check()


@on_both_layouts
def test_error_rule_without_the_residual(layout: str):
    ConvCase(**GEOMETRIES["strided and dilated"], layout=layout, residual=False).check()


def test_layouts_are_what_their_names_say():
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    for layout, (row, col) in {
        "out,in*kh*kw": (lambda o, i, h, w: o, lambda o, i, h, w: (i * 4 + h) * 5 + w),
        "out*kh,in*kw": (lambda o, i, h, w: o * 4 + h, lambda o, i, h, w: i * 5 + w),
    }.items():
        rows, cols = matrix_shape(weight.shape, layout)
        scale_row, scale_col = (torch.randn(n, dtype=torch.float64) for n in (rows, cols))
        kernel = weight.clone()
        for o, i, h, w in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
            kernel[o, i, h, w] *= 1 + scale_row[row(o, i, h, w)] * scale_col[col(o, i, h, w)]
        y = rlrr_conv2d(x, weight, scale_row[:, None], scale_col[None, None], layout=layout)
        torch.testing.assert_close(y, F.conv2d(x, kernel), rtol=1e-12, atol=1e-12)


def layer_and_input(layout: str = CONV_LAYOUTS[0], dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    conv = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1} | options
    layer = RLRRConv2d(**conv, layout=layout, dtype=dtype, scale_dtype=scale_dtype)
    nn.init.normal_(layer.shift)
    return layer, torch.randn(2, 4, 7, 8, dtype=dtype)


@on_both_layouts
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"rank": 2}, {"groups": 2, "stride": 2}, {"padding_mode": "reflect"}, {"kernel_size": (2, 3), "padding": "same"}],
    ids=str,
)
def test_gradcheck(layout: str, residual: bool, options: dict):
    layer, x = layer_and_input(layout, residual=residual, **options)
    names = ("scale_row", "scale_col", "shift")

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [x[:1, :, :5, :5].clone().requires_grad_(), *(getattr(layer, name) for name in names)]
    torch.autograd.gradcheck(function, leaves, fast_mode=True)


@on_both_layouts
@pytest.mark.parametrize(
    "options",
    [
        {"padding": (2, 1), "dilation": 2},
        {"padding": "same", "kernel_size": (2, 3)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"padding": 2, "stride": 2, "padding_mode": "circular"},
        {"padding": "same", "kernel_size": 4, "padding_mode": "replicate"},
        {"groups": 4, "out_channels": 8},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_identity_is_the_frozen_layer_and_merging_gives_a_plain_one(layout: str, options: dict):
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}, dtype=torch.float64).eval()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = conv(x)
    layer = RLRRConv2d.from_conv(conv, rank=3, layout=layout, init="identity", scale_dtype=torch.float64)
    assert layer.weight is conv.weight
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in (layer.scale_row, layer.scale_col, layer.shift):
            parameter.normal_()
    y, plain = layer(x), layer.to_conv()
    assert type(plain) is nn.Conv2d
    assert repr(plain).replace(", bias=False", "") == repr(conv).replace(", bias=False", "")
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-12, atol=1e-12)
    assert layer.merge_error(x) < 1e-14
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="this RLRRConv2d is merged"):
        layer.train()(x)
    assert torch.equal(layer.unmerge()(x), y)


def test_keeps_the_input_and_the_parameters_alone():
    layer, x = layer_and_input(rank=2)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    y_needs = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(y_needs).sum().backward()
    allowed = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.scale_row, layer.scale_col)}
    assert set(kept) == allowed


def test_every_pattern_of_needed_gradients():
    layer, x = layer_and_input(rank=2)
    names = ("x", "scale_row", "scale_col", "shift")
    leaves = {"x": x, **{name: getattr(layer, name) for name in names[1:]}}
    full = dict(zip(names, torch.autograd.grad(layer(x.requires_grad_()).square().sum(), leaves.values()), strict=True))
    for pattern in range(1, 16):
        for bit, leaf in enumerate(leaves.values()):
            leaf.requires_grad_(bool(pattern >> bit & 1)).grad = None
        layer(x).square().sum().backward()
        for bit, (name, leaf) in enumerate(leaves.items()):
            if pattern >> bit & 1:
                torch.testing.assert_close(leaf.grad, full[name], rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


@on_both_layouts
def test_autocast_computes_in_16_bits_and_gives_gradients_in_the_parameters_dtype(layout: str):
    layer, x = layer_and_input(layout, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in (x, layer.scale_row, layer.scale_col, layer.shift)} == {torch.float32}


def test_meta_device():
    layer = RLRRConv2d(4, 6, 3, device="meta")
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 6, 6, 6)
    assert layer.to_conv().weight.is_meta


@on_both_layouts
def test_compiles_in_one_graph(layout: str):
    layer, x = layer_and_input(layout, rank=3)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = candidate(leaf)
        y.square().sum().backward()
        parameters = dict(getattr(candidate, "_orig_mod", candidate).named_parameters())
        results.append([y, leaf.grad, *(parameters[name].grad for name in ("scale_row", "scale_col", "shift"))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@on_both_layouts
def test_transforms_see_through_it(layout: str):
    layer, x = layer_and_input(layout, rank=2)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(scale_row, x):
        return torch.func.functional_call(layer, {**parameters, "scale_row": scale_row}, (x,)).square().sum()

    gradient = torch.func.grad(loss)(parameters["scale_row"], x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.scale_row.grad, rtol=1e-12, atol=1e-12)
    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters["scale_row"], x)
    torch.testing.assert_close(per_sample.sum(0), gradient, rtol=1e-12, atol=1e-12)
    tangent = torch.randn_like(gradient)
    _, derivative = torch.func.jvp(lambda row: loss(row, x), (parameters["scale_row"],), (tangent,))
    torch.testing.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-10, atol=1e-10)


def test_bad_arguments_are_named():
    layer, x = layer_and_input(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layout must be one of 'out,in\*kh\*kw' or 'out\*kh,in\*kw'; got 'rows'"):
        RLRRConv2d(4, 6, 3, layout="rows")
    with pytest.raises(ValueError, match="rank must be from 1 to 64; got 0"):
        RLRRConv2d(4, 6, 3, rank=0)
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d; got Linear"):
        RLRRConv2d.from_conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"x must be \[B, in, H, W\] .* with in = 4; got shape \(2, 3, 7, 8\)"):
        layer(x[:, :3])
    with pytest.raises(TypeError, match=r"weight must be torch\.float64 for x of torch\.float64; got torch\.float32"):
        layer(x.double())
    with pytest.raises(TypeError, match=r"^x must be a dense tensor; got layout torch\.sparse_coo"):
        layer(x.to_sparse())
    with pytest.raises(TypeError, match=r"^x must be a dense tensor; got layout torch\.sparse_coo"):
        RLRRConv2d(4, 6, 3, padding=1, padding_mode="reflect")(x.to_sparse())
    with pytest.raises(TypeError, match=r"^x must be a Tensor; got ndarray"):
        layer(x.numpy())
    good = {"weight": layer.weight, "scale_row": layer.scale_row, "scale_col": layer.scale_col}
    for name, bad, message in (
        ("weight", torch.randn(6, 4, 3, 3, requires_grad=True), "weight must be frozen"),
        ("weight", torch.randn(6, 4), r"weight must be \[out, in / groups, kh, kw\]; got shape \(6, 4\)"),
        ("scale_row", torch.randn(5, 1), r"scale_row must be \[R, r\] with R = 6 .* got shape \(5, 1\)"),
        ("scale_col", torch.randn(1, 1, 4), r"scale_col must be \[1, r, C\] with r = 1 and C = 36 .*\(1, 1, 4\)"),
        ("bias", torch.randn(4), r"bias must be \[out\] with out = 6; got shape \(4,\)"),
        ("scale_row", torch.randn(6, 1, device="meta"), "scale_row must be on the device of x, cpu; got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            rlrr_conv2d(x, **{**good, name: bad})


@pytest.mark.parametrize("layout", ["out,in*kh*kw", "out*kh,in*kw"])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "groups"), [(3, 1), (1, 1), (3, 4)])
def test_results_have_the_memory_format_of_the_plain_convolution(layout: str, of_x, of_weight, size: int, groups: int):
    conv = torch.nn.Conv2d(4, 8, size, groups=groups).to(memory_format=of_weight)
    x = torch.randn(2, 4, 7, 9).to(memory_format=of_x)
    layer = RLRRConv2d.from_conv(conv, layout=layout).eval()
    for y in (layer(x), layer.merge()(x)):
        assert y.stride() == conv(x).stride()
