"""The road a CUDA tensor takes, traced by the compiler without a GPU: fake tensors, the Triton branch forced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.tiny_models import tiny_model
from tests.support.versions import version_of

triton = pytest.importorskip("triton", reason="needs Triton")
from benchmarks.support.fake_cuda import Driver
from rlrr_kernels import NormRescale, RLRRConfig, RLRRLinear, adapt_model, backends, recompute_activations

if version_of("torch") < (2, 11):
    pytest.skip("compilers before PyTorch 2.11 take no fake tensors that they did not make", allow_module_level=True)


@pytest.fixture(autouse=True)
def triton_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "INTERPRETING", True)  # lets CPU tensors take the Triton road; no kernel runs
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    torch._dynamo.reset()
    with backends.use_backend("triton"):
        yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that runs what it is given as it is, and keeps the names of the operators."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.modules: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    def _keep(self, names: list[str]) -> Callable:
        def compiler(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
            self.modules.append(graph)
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        return compiler


def trace(module: nn.Module, sizes: list[tuple[int, ...]], dynamic: bool) -> tuple[nn.Module, Graphs]:
    """Forward and backward of a fake copy of a module on inputs of these sizes, in one graph each way."""
    graphs = Graphs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = copy.deepcopy(module)
        compiled = torch.compile(module, backend=graphs.backend, fullgraph=True, dynamic=dynamic)
        for size in sizes:
            x = torch.randn(size, requires_grad=True)
            y = compiled(x)
            y.float().square().mean().backward()
            assert y.shape[0] == size[0]
            assert x.grad.shape == x.shape
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    return module, graphs


def count(names: list[str], operator: str) -> int:
    return sum(name.startswith(f"rlrr_kernels.{operator}.") for name in names)


def assert_can_be_captured(graphs: Graphs) -> None:
    """What mode="reduce-overhead" asks before it captures a graph: nothing waits for the device or is marked unsafe."""
    assert len(graphs.modules) == 2
    assert [get_first_incompatible_cudagraph_node(module) for module in graphs.modules] == [None, None]


class UnderAutocast(nn.Module):
    """A layer under bf16 autocast beside its fp32 weight, as on a GPU."""

    def __init__(self, layer: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.layer, self.enabled = layer, enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.layer(x)


def sizes(dynamic: bool, *rest: int) -> list[tuple[int, ...]]:
    return [(2, *rest), (4, *rest)] if dynamic else [(2, *rest)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer(dynamic: bool, autocast: bool):
    layer = UnderAutocast(RLRRLinear(32, 48, groups=3), autocast)
    _, graphs = trace(layer, sizes(dynamic, 5, 32), dynamic)
    assert count(graphs.forward, "linear") == count(graphs.backward, "linear_backward") == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_norm_under_a_scale_and_shift(dynamic: bool):
    trace(NormRescale(nn.LayerNorm(32)), sizes(dynamic, 5, 32), dynamic)


@pytest.mark.parametrize(("dynamic", "recompute"), [(False, False), (True, True)])
def test_adapted_model(dynamic: bool, recompute: bool):
    model = tiny_model("vit").train()
    adapt_model(model, RLRRConfig(recipe="paper"))
    recompute_activations(model, recompute)
    model, graphs = trace(model, sizes(dynamic, 3, 32, 32), dynamic)
    layers = sum(isinstance(module, RLRRLinear) for module in model.modules())
    assert layers == 8
    assert count(graphs.forward, "linear") == count(graphs.backward, "linear_backward") == layers
    assert_can_be_captured(graphs)


def test_sampled_layer():
    layer = RLRRLinear(32, 48, groups=3, scale_grad_rows=0.5, prefix_tokens=1).train()
    _, graphs = trace(layer, sizes(False, 5, 32), False)
    assert_can_be_captured(graphs)
