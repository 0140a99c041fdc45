"""``explain``: what it says of a call is what the call then does."""

from __future__ import annotations

import json

import pytest
import torch

from rlrr_kernels import RLRRLinear, backends, devices, explain, rlrr_linear, use_backend
from rlrr_kernels.numerics import Case

pytestmark = pytest.mark.interpreted


def arguments(**changes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = Case(**({"rows": 12, "out_features": 24, "in_features": 20} | changes)).draw(0)
    tensors.pop("grad_y")
    return tensors, tensors.pop("x")


def test_it_is_data_and_prints():
    layer, x = RLRRLinear(20, 24, groups=3, rank=2), torch.randn(3, 4, 20)
    found = explain(layer, x)
    assert json.loads(json.dumps(found.as_dict()))["problem"] == {
        "M": 12, "N": 24, "K": 20, "r": 2, "G": 3, "x": "float32", "W": "float32"
    }  # fmt: skip
    assert found.backend == backends.resolve("auto", x.device, x.dtype)
    lines = str(found).splitlines()
    assert lines[0] == "M 12, N 24, K 20, r 2, G 3, x float32, W float32"
    assert all(f"  {step.name}: {step.path}, {step.why}" in lines for step in found.steps)


@pytest.mark.skipif(backends.CPP_FAILURE is not None, reason="the C++ operator is not built")
@pytest.mark.parametrize(("rows", "path"), [(1, "fused"), (60, "panels")])
def test_the_path_of_the_cpp_operator(rows: int, path: str):
    if backends.cpu_level() == "portable":
        pytest.skip("few instructions, other crossovers")
    tensors, x = arguments(rows=rows)
    found = explain({**tensors, "backend": "cpp"}, x)
    assert [step.path for step in found.steps] == [path, path]
    half = {name: tensor.half() for name, tensor in tensors.items()}
    assert {step.path for step in explain({**half, "backend": "cpp"}, x.half()).steps} == {"library"}


@pytest.mark.parametrize(
    ("gpu", "backend"), [("sm_75", "torch"), ("sm_80", "triton"), ("sm_90", "triton"), ("gfx1100", "torch")]
)
def test_a_gpu_that_is_not_here(gpu: str, backend: str):
    pytest.importorskip("triton", reason="needs Triton")
    tensors, x = arguments(rows=4096, out_features=768, in_features=768, dtype=torch.bfloat16)
    found = explain(tensors, x, gpu=gpu)
    assert (found.device, found.backend) == (gpu, backend)
    assert not found.replayed
    few = explain(tensors, x[:16], gpu=gpu)
    if backend == "triton":
        assert [step.path for step in found.steps] == ["merge", "merge", "fused"]
        assert [step.path for step in few.steps] == ["fused"] * 3
        assert few.steps[0].tiles["block_m"] == 16
        assert found.steps[2].schedule == ("persistent" if gpu == "sm_90" else "tiled")


@pytest.mark.skipif(not backends.INTERPRETING, reason="set TRITON_INTERPRET=1")
@pytest.mark.parametrize("rows", [3, 300])
def test_the_kernels_are_those_that_run(rows: int):
    from rlrr_kernels.ops.host.launch import recorded

    tensors, x = arguments(rows=rows)
    scales = [tensors[name].requires_grad_() for name in ("scale_row", "scale_col", "bias")]
    with use_backend("triton"):
        found = explain(tensors, x)
        with recorded() as launches:
            y = rlrr_linear(x.requires_grad_(), **tensors)
            torch.autograd.grad(y.sum(), [x, *scales])
    said = [name.split(" ")[0] for step in found.steps for name in step.launches if "library" not in name]
    assert said == [launch.plan.kernel.fn.__name__ for launch in launches]
    assert {step.path for step in found.steps[:2]} == {"merge" if rows == 300 else "fused"}


@pytest.mark.skipif(not backends.INTERPRETING, reason="set TRITON_INTERPRET=1")
@pytest.mark.parametrize("share", [0.2, 0.5])  # without and with the means of images
def test_the_kernels_of_sampled_rows_are_those_that_run(share: float):
    from rlrr_kernels.ops.host.launch import recorded

    layer, x = RLRRLinear(20, 24, scale_grad_rows=share), torch.randn(2, 12, 20, requires_grad=True)
    with use_backend("triton"):
        found = explain(layer, x)
        with recorded() as launches:
            layer(x).sum().backward()
    said = [name.split(" ")[0] for step in found.steps for name in step.launches if "library" not in name]
    ran = [launch.plan.kernel.fn.__name__ for launch in launches]
    assert said == [name for name in ran if "linear" in name]  # the draw has kernels of its own
    assert found.steps[-1].why.startswith(f"estimated from {2 * round(share * 12)} rows: ")


@pytest.mark.parametrize("backend", ["torch", *(["cpp"] if backends.CPP_FAILURE is None else [])])
def test_sampled_rows_are_told_without_being_drawn(backend):
    layer, x = RLRRLinear(20, 24, scale_grad_rows=0.25, prefix_tokens=1), torch.randn(2, 17, 20)
    state = torch.get_rng_state()
    with use_backend(backend):
        found = explain(layer, x)
        exact = explain(layer.eval(), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.problem["M"], found.problem["S"]) == (34, 2 * (1 + 4))
    names = [step.name for step in found.steps]
    # The C++ operator is called for the kept rows, the drawn ones and the means of the images.
    assert names == ["forward", "grad_x", *["grad_scales"] * (3 if backend == "cpp" else 1)]
    assert all(step.why.startswith("estimated from 10 rows: ") for step in found.steps[2:])
    assert "S" not in exact.problem
    assert not any("estimated" in step.why for step in exact.steps)


def test_bad_arguments_are_named():
    tensors, x = arguments()
    with pytest.raises(TypeError, match=r"layer must be an RLRRLinear or the arguments of rlrr_linear; got Linear"):
        explain(torch.nn.Linear(20, 24), x)
    with pytest.raises(ValueError, match=r"layer must hold .* alone; got wieght"):
        explain(tensors | {"wieght": x}, x)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., K\] with K = 20"):
        explain(tensors, x[:, 1:])
    with pytest.raises(ValueError, match="input_activation must be one of gelu, gelu_tanh; got 'relu'"):
        explain(tensors | {"input_activation": "relu"}, x)
    for gpu in ("h100", "sm90", ""):
        with pytest.raises(ValueError, match=f"gpu must be a name such as sm_90 or gfx942; got '{gpu}'"):
            explain(tensors, x, gpu=gpu)
    with pytest.raises(ValueError, match=r"backend must be another one than cpp, .* for gpu='sm_90'"):
        explain(tensors, x, gpu="sm_90", backend="cpp")
    for gpu in ("sm_90", None):
        with pytest.raises(ValueError, match=r"backend must be one of auto, .*; got 'tritn'"):
            explain(tensors, x, gpu=gpu, backend="tritn")


def test_a_merged_layer_calls_no_kernel():
    layer, x = RLRRLinear(20, 24).merge(), torch.randn(3, 20)
    found = explain(layer, x)
    assert (found.backend, found.why) == ("torch", "the layer is merged")
    assert [(step.name, step.path) for step in found.steps] == [("forward", "library"), ("grad_x", "library")]
    assert explain(layer, x, gpu="sm_90").steps == found.steps
    assert explain(layer.unmerge(), x).why != found.why


@pytest.mark.parametrize("backend", ["torch", *(["cpp"] if backends.CPP_FAILURE is None else [])])
def test_many_adapters_in_one_batch(backend):
    stacks = {"weight": torch.ones(6, 40), "scale_row": torch.ones(9, 6), "scale_col": torch.ones(9, 2, 40)}
    index = torch.tensor([3, -1, 0, 3, 3, 3])
    found = explain(stacks | {"index": index, "backend": backend}, torch.ones(6, 2, 40))
    expected = {"M": 12, "N": 6, "K": 40, "r": 1, "G": 2, "T": 9, "adapters with rows": 3}
    assert expected.items() <= found.problem.items()
    assert found.backend == backend
    forward = [step for step in found.steps if step.name == "forward"]
    if backend == "torch":
        assert [step.path for step in forward] == ["merge"]
        assert forward[0].why.startswith("one call of rlrr_linear for each of 3 adapters")
    elif backends.cpu_level() != "portable":
        assert [(step.path, step.why.split(",")[0]) for step in forward] == [
            ("fused", "2 adapters of 2 rows"), ("panels", "1 adapter of 8 rows")
        ]  # fmt: skip
    empty = {name: tensor[..., :0] for name, tensor in stacks.items() if name != "scale_row"}
    found = explain(stacks | empty | {"index": index, "backend": backend}, torch.ones(6, 2, 0))
    assert (found.problem["M"], found.problem["K"]) == (12, 0)
    with pytest.raises(IndexError, match="got 12 for sample 0"):
        explain(stacks | {"index": index + 9}, torch.ones(6, 2, 40))
    with pytest.raises(ValueError, match="alone; got input_activation"):
        explain(stacks | {"index": index, "input_activation": "gelu"}, torch.ones(6, 2, 40))


def test_many_adapters_in_one_batch_on_a_gpu():
    pytest.importorskip("triton", reason="needs Triton")
    stacks = {"weight": torch.ones(768, 768), "scale_row": torch.ones(70, 768), "scale_col": torch.ones(70, 768)}
    stacks = {name: tensor.bfloat16() for name, tensor in stacks.items()}
    x = torch.ones(64, 197, 768, dtype=torch.bfloat16)

    def forward(index: list[int], x: torch.Tensor, backend: str = "auto") -> dict:
        found = explain(stacks | {"index": torch.tensor(index), "backend": backend}, x, gpu="sm_90")
        assert found.steps[-1].name == "grad_scales"
        return {step.path: step.why for step in found.steps if step.name == "forward"}

    apart = forward([*range(64)], x)
    assert apart == {"fused": "64 adapters of 197 rows, 64 tiles of rows, 23% of whose rows are no sample's"}
    assert forward([*range(64)], x[:, 0]) == {"mixed": "64 adapters of 1 rows, whose tiles they share"}
    many = forward([0] * 20 + [1] * 40 + [-1] * 4, x)
    assert many.keys() == {"library", "merge"}
    assert many["library"] == f"{4 * 197} rows of the bare W"
    assert many["merge"].startswith(f"2 adapters of {20 * 197} to {40 * 197} rows")
    assert "merge" not in forward([0] * 20 + [1] * 44, x, "triton.fused")
    assert forward([5] * 64, x)["merge"].startswith("one call of rlrr_linear for each of 1 adapters")


def test_many_adapters_are_told_of_the_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch):
    """That of x, not that of the copies on meta by which a GPU that is not here is asked for."""
    pytest.importorskip("triton", reason="needs Triton")
    here, asked = devices.typical("sm_90"), []
    monkeypatch.setattr(devices, "gpu_of", lambda device: asked.append(device.type) or here)
    monkeypatch.setattr(backends, "resolve", lambda *call: "triton")
    stacks = {"weight": torch.ones(768, 768), "scale_row": torch.ones(2, 768), "index": torch.tensor([0, 1])}
    explain(stacks | {"backend": "triton"}, torch.ones(2, 197, 768))
    assert asked == ["cpu"]
