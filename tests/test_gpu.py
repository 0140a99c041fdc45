"""What only a CUDA GPU can show; CI has none. Run with ``make test-gpu``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.correctness.check import CHECKED, draw, flaws, flaws_on, subject
from benchmarks.gpu.estimates import exact_by_sampling
from benchmarks.support.common import Problem
from rlrr_kernels import (
    RLRRConfig,
    RLRRLinear,
    adapt_model,
    backends,
    numerics,
    parameter_groups,
    rlrr_linear,
    use_backend,
)
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.host import cache
from rlrr_kernels.ops.sampling.row_sample import sample_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or backends.INTERPRETING, reason="needs a CUDA GPU"),
]

BACKENDS = ("triton.fused", "triton.merge", "torch")


def captured(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of one step, after three on a side stream, and what the captured step returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize(
    "sizes",
    [(1, 768, 768, 1, 1), (16, 768, 3072, 1, 1), (64, 768, 768, 4, 1), (333, 774, 771, 4, 3), (12608, 2304, 768, 1, 3)],
    ids=str,
)
def test_no_wrong_element_stray_access_or_changing_bit(name: str, dtype: torch.dtype, sizes: tuple):
    m, n, k, rank, groups = sizes
    problem = Problem(m, n, k, dtype, False, "cuda", None, rank, groups)
    with use_backend("triton"):
        assert flaws_on(name, problem) == []


@pytest.mark.parametrize("name", ["triton.fused", "triton.merge", "sampled rows"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_of_the_largest_batch(name: str, weight_dtype: torch.dtype):
    problem = Problem(50432, 5120, 1280, torch.bfloat16, False, "cuda", weight_dtype)
    with use_backend("triton"):
        assert flaws_on(name, problem) == []


@pytest.mark.parametrize("backend", ["triton.fused", "triton.merge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", ["x", "weight", "grad_y"])
def test_transposed_and_strided_tensors(backend: str, dtype: torch.dtype, transposed: str):
    tensors = draw(backend, Problem(200, 320, 192, dtype, False, "cuda"))
    for layout in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], -1)[..., 0]):
        given = tensors | {transposed: layout(tensors[transposed])}
        assert not given[transposed].is_contiguous()
        assert flaws(subject(backend), given) == []


@pytest.mark.parametrize("backend", ["triton.fused", "triton.merge"])
def test_streams_and_threads_do_not_disturb_one_another(backend: str):
    tensors = [Case(777, 768, 768, dtype=torch.bfloat16, device="cuda").draw(seed) for seed in range(2)]
    function = partial(rlrr_linear, backend=backend)
    alone = [numerics.outputs(function, t, True) for t in tensors]
    torch.cuda.synchronize()
    found: list[list[dict]] = [[], []]

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[number].append(numerics.outputs(function, tensors[number], True))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 20
        for outputs in found[number]:
            for name, value in outputs.items():
                torch.testing.assert_close(value, alone[number][name], rtol=2e-2, atol=2e-2 * value.abs().max().item())
                assert backend == "triton.merge" or torch.equal(value, alone[number][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 768, 768, 1, 1), (197, 2304, 768, 1, 3), (1576, 768, 3072, 1, 1), (61, 771, 773, 4, 3), (40, 512, 256, 64, 1)],
    ids=str,
)
def test_error_rule(backend: str, dtype: torch.dtype, shape: tuple):
    numerics.check_error_rule(partial(rlrr_linear, backend=backend), Case(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1576, 768, 3072, 1, 1), (197, 2304, 768, 1, 3), (61, 771, 773, 4, 3)], ids=str)
def test_error_rule_of_sampled_scale_gradients(dtype: torch.dtype, shape: tuple):
    with use_backend("triton"):
        numerics.check_error_rule(exact_by_sampling, Case(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [768, 771])
def test_images_means_are_those_of_the_torch_path(dtype: torch.dtype, size: int):
    sample = sample_rows(torch.Size((8, 197, size)), 0.25, 1, torch.device("cuda"))
    tensors = Case(8 * 197, 768, size, 1, 3, dtype=dtype, device="cuda").draw(0)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    exact = numerics.outputs(partial(rlrr_linear, backend="torch", scale_grad_rows=sample), wide, True)
    errors = {}
    for backend in ("triton", "torch"):
        actual = numerics.outputs(partial(rlrr_linear, backend=backend, scale_grad_rows=sample), tensors, True)
        errors[backend] = {name: numerics.relative_error(actual[name], exact[name]) for name in exact}
    for name, error in errors["triton"].items():
        assert error <= 1.5 * errors["torch"][name] + torch.finfo(dtype).eps, name


def test_the_draw_of_the_kernel_is_the_draw_by_torch():
    for images, tokens, prefix, share in ((64, 197, 1, 0.25), (3, 50, 5, 0.5), (2, 1024, 0, 0.125)):
        samples = []
        for backend in ("triton", "torch"):
            torch.manual_seed(3)
            with use_backend(backend):
                samples.append(sample_rows(torch.Size((images, tokens, 8)), share, prefix, torch.device("cuda")))
        assert torch.equal(samples[0].index, samples[1].index)


def test_sampled_rows_are_repeatable_and_drawn_anew_in_a_cuda_graph():
    layer = RLRRLinear(768, 768, device="cuda", dtype=torch.bfloat16, scale_grad_rows=0.25, prefix_tokens=1)
    x = torch.randn(8, 197, 768, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        layer.zero_grad()
        layer(x).float().square().mean().backward()
        return layer.scale_row.grad

    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(step().clone())
    assert torch.equal(*results)
    graph, grad = captured(step)
    graph.replay()
    first = grad.clone()
    graph.replay()
    assert not torch.equal(first, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_capture(backend: str):
    layer = RLRRLinear(768, 2304, groups=3, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> torch.Tensor:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        y = rlrr_linear(x, layer.weight, layer.scale_row, layer.scale_col, layer.shift, backend=backend)
        y.float().square().mean().backward()
        return y

    graph, y = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in (y, x.grad, layer.scale_row.grad, layer.scale_col.grad, layer.shift.grad)]
    eager = [step(), x.grad, layer.scale_row.grad, layer.scale_col.grad, layer.shift.grad]
    for a, b in zip(replayed, eager, strict=True):
        if backend == "triton.fused":
            assert torch.equal(a, b)
        else:  # the library may take another product in a graph, where it has another workspace
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@contextmanager
def persistent(number: int) -> Iterator[None]:
    """Makes the scale gradients take one of their persistent candidates."""
    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.choice import tiles as configs
    from rlrr_kernels.ops.tuning import tiles as tuning

    values = tuning.PERSISTENT_CANDIDATES["grad_scales", 2][number]
    with store.only_tiles("grad_scales", configs.Tiles(*values, schedule="persistent")):
        yield


needs_tma = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)),
    reason="the persistent kernels are for Hopper and Blackwell",
)


@needs_tma
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("shape", [(1576, 2304, 768, 1, 3), (1001, 1200, 784, 1, 3), (61, 768, 3072, 1, 1)], ids=str)
def test_error_rule_of_persistent_kernels(dtype: torch.dtype, number: int, shape: tuple):
    with persistent(number):
        numerics.check_error_rule(
            partial(rlrr_linear, backend="triton.fused"), Case(*shape, dtype=dtype, device="cuda")
        )


@needs_tma
def test_descriptors_in_a_cuda_graph_and_same_bits():
    tensors = Case(1576, 2304, 768, 1, 3, dtype=torch.bfloat16, device="cuda").draw(0)
    leaves = [tensors[name].requires_grad_() for name in ("x", "scale_row", "scale_col", "bias")]

    def step() -> list[torch.Tensor]:
        y = rlrr_linear(leaves[0], tensors["weight"], *leaves[1:], backend="triton.fused")
        return [y, *torch.autograd.grad(y, leaves, tensors["grad_y"])]

    with persistent(0):
        graph, results = captured(step)
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
        graph.replay()
        for ours, eager in zip([value.clone() for value in results], step(), strict=True):
            assert torch.equal(ours, eager)


def test_same_input_same_bits():
    tensors = Case(1576, 768, 768, 2, 3, dtype=torch.bfloat16, device="cuda").draw(0)
    first, again = (numerics.outputs(partial(rlrr_linear, backend="triton"), tensors, True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_x_and_the_parameters_is_alive_after_the_forward(backend: str):
    layer = RLRRLinear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        return rlrr_linear(x, layer.weight, layer.scale_row, layer.scale_col, layer.shift, backend=backend)

    forward().sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    assert torch.cuda.memory_allocated() - before == y.nbytes


@pytest.mark.parametrize("backend", ["triton.fused", "triton.merge"])
def test_addresses_beyond_two_to_the_31(backend: str):
    count, cols, rows, last = 2**31 // 1024 + 64, 1024, 64, 256
    layer = RLRRLinear(cols, rows, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(count, cols, device="cuda", dtype=torch.bfloat16)
    x[-last:] = torch.randn(last, cols, device="cuda", dtype=torch.bfloat16)  # so the sums are those of the last rows
    results = []
    for part in (x, x[-last:].clone()):
        part.requires_grad_()
        y = rlrr_linear(part, layer.weight, layer.scale_row, layer.scale_col, layer.shift, backend=backend)
        grad_y = torch.zeros_like(y)
        grad_y[-last:] = 1
        leaves = [part, layer.scale_row, layer.scale_col, layer.shift]
        grad_x, *grads = torch.autograd.grad(y, leaves, grad_y)
        assert grad_x[:-last].count_nonzero() == 0
        results.append([y[-last:], grad_x[-last:], *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    tensors = Case(64, 256, 256, dtype=torch.bfloat16, device="cuda:1").draw(0)
    numerics.check_bound(partial(rlrr_linear, backend="triton"), tensors)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model(mode: str):
    model = torch.nn.Sequential(
        RLRRLinear(256, 512, device="cuda"), torch.nn.GELU(), RLRRLinear(512, 256, device="cuda")
    )
    x = torch.randn(128, 256, device="cuda")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        model.zero_grad(set_to_none=True)  # gradients lie in the graph's memory, which its next replay overwrites
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        y.float().sum().backward()
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(y.float(), model(x).float(), rtol=2e-2, atol=2e-2)


def test_the_tuner_keeps_what_is_faster_and_dispatch_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rlrr_kernels import devices
    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.choice import tiles as configs
    from rlrr_kernels.ops.tuning import tiles as tuning

    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path))
    store.forget()
    results = tuning.tune([(768, 768)], [16, 1576], kernels=("forward",))  # all kernels are minutes of compilation
    assert [result.kernel for result in results] == ["forward"] * 2
    kept = sum(result.kept for result in results)
    assert len(store.read(store.cache_file())) == kept
    for rows in (16, 1576):
        case = Case(rows, 768, 768, dtype=torch.bfloat16, device="cuda")
        numerics.check_bound(partial(rlrr_linear, backend="triton.fused"), case.draw(0))
    x, weight = (torch.empty(16, 768, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    shipped = configs.tiles_for("forward", devices.gpu_of(x.device), x.dtype, 16)
    for switch in ("on", "off"):
        monkeypatch.setenv(store.SWITCH_VARIABLE, switch)
        store.forget()
        tiles = store.choose_tiles("forward", devices.gpu_of(x.device), "ieee", x, weight, weight.dtype, 1)
        assert tiles == (results[0].tiles if switch == "on" and results[0].kept else shipped)
    store.forget()


def test_a_whole_training_step_in_a_cuda_graph():
    timm = pytest.importorskip("timm", reason="needs timm, of the extra [models]")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    adapt_model(model, RLRRConfig(recipe="paper"))
    model.cuda().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=1e-2), fused=True, capturable=True)
    images, labels = torch.randn(8, 3, 224, 224, device="cuda"), torch.randint(10, (8,), device="cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    graph, loss = captured(step)
    start = [tensor.clone() for tensor in (*model.state_dict().values(), *_states(optimizer))]
    losses = []
    for replay in (True, False):
        with torch.no_grad():  # the same start for both
            for tensor, value in zip((*model.state_dict().values(), *_states(optimizer)), start, strict=True):
                tensor.copy_(value)
        losses.append([])
        for _ in range(4):
            if replay:
                graph.replay()
                losses[-1].append(loss.item())
            else:
                losses[-1].append(step().item())
    # The backward of attention adds up in any order.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-2, atol=1e-2)
    assert losses[0][-1] < losses[0][0]


def _states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]
