"""The short way to start kernels: what reaches the driver is what Triton's own launcher would have sent there."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rlrr_kernels import RLRRLinear, backends, devices

if backends.INTERPRETING or shutil.which("cc") is None:
    pytest.skip("needs Triton's compiler and a C compiler", allow_module_level=True)

import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import host_overhead
from benchmarks.support.fake_cuda import FakeCuda, fake_cuda
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.host import launch as launching
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.launch import Launch
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.norm_rescale import triton_backend as norm_rescale_triton

SM_90 = devices.typical("sm_90")
TILES = Tiles(16, 32, 32, 4, 1)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as fake:
        yield fake


def by_triton(launch: Launch) -> None:
    launch.plan.kernel[launch.plan.grid](*launch.args, **launch.plan.meta)


def kinds(value: object) -> list[str]:
    if isinstance(value, TensorDescriptor):
        return ["tensordesc", "i32", "i32", "i64", "i64"]  # Triton adds sizes and strides
    if isinstance(value, Tensor):
        return [f"*{value.dtype}"]
    return [] if value == 1 else ["i32"]


def sent(fake: FakeCuda, launch: Launch, start=Launch.run) -> dict:
    """What a launch hands to the driver; numbers that are 1 are part of the kernel and not handed over."""
    fake.record([kind for value in launch.args for kind in kinds(value)])
    before = fake.count
    start(launch)
    assert fake.count == before + 1
    return fake.last()


def every_launch(count=20, rows=64, cols=96, dtype=torch.float16, groups=1, x: Tensor | None = None) -> list[Launch]:
    """Every kernel of ``rlrr_linear`` on one problem."""
    x = torch.zeros(count, cols, dtype=dtype) if x is None else x
    y, weight = torch.zeros(len(x), rows, dtype=dtype), torch.zeros(rows, cols, dtype=dtype)
    row, col, bias = torch.zeros(rows, 1), torch.zeros(groups, 1, cols), torch.zeros(rows)
    grads = torch.zeros_like(row), torch.zeros_like(col), torch.zeros_like(bias)
    return [
        *linear_launches.forward_launches(x, weight, row, col, bias, True, y, SM_90, "ieee", TILES),
        *linear_launches.grad_x_launches(y, weight, row, col, True, torch.zeros_like(x), SM_90, "ieee", TILES),
        *linear_launches.grad_scales_launches(y, x, weight, row, col, grads, SM_90, "ieee", TILES),
        linear_launches.merge_launch(weight, row, col, True, torch.zeros_like(weight)),
    ]


def norm_launches() -> list[Launch]:
    x, vectors, statistics = torch.zeros(20, 64), [torch.zeros(64) for _ in range(4)], [torch.zeros(20)] * 2
    forward = norm_rescale_triton.forward_launch(x, *vectors, 1e-6, torch.zeros_like(x), *statistics)
    grads = torch.zeros_like(x), *vectors[2:]
    return [forward, *norm_rescale_triton.backward_launches(x, x, *vectors[:3], *statistics, grads)]


def starts(launch: Launch) -> int:
    """Compiled kernels that the launch's plan can start on its own."""
    return len(launch.plan.starts)


def test_the_driver_is_sent_the_same(cuda: FakeCuda):
    for launch in [*every_launch(), *every_launch(groups=2), *norm_launches()]:
        expected = sent(cuda, launch, by_triton)
        for _ in range(3):
            assert sent(cuda, launch) == expected
        assert starts(launch) == 1


def test_every_change_that_needs_another_kernel_gets_it(cuda: FakeCuda):
    """Sizes that are 1 or multiples of 16 or not, dtypes, strides and alignment, in turn and back again."""
    storage = torch.zeros(20 * 128 + 8, dtype=torch.float16)
    variants = [
        {},
        {"count": 1},
        {"count": 16},
        {"rows": 72},
        {"cols": 90},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32},
        {"x": storage[1:1921].view(20, 96)},  # 2 bytes past a multiple of 16
        {"x": storage[8:1928].view(20, 96)},  # 16 bytes past one
        {"x": storage[: 20 * 128].view(20, 128)[:, :96]},
        {"x": torch.zeros(96, 20, dtype=torch.float16).t()},
    ]
    functions = set()
    for _ in range(2):
        for variant in variants:
            launches = every_launch(**variant)
            for launch in launches:
                actual = sent(cuda, launch)
                assert actual == sent(cuda, launch, by_triton), variant
            functions.add(sent(cuda, launches[0])["function"])
    assert len(functions) > 6


def test_a_misaligned_tensor_takes_tritons_way(cuda: FakeCuda):
    x = torch.zeros(20 * 96 + 1, dtype=torch.float16)[1:].view(20, 96)
    aligned, misaligned = every_launch()[0], every_launch(x=x)[0]
    assert aligned.plan is misaligned.plan
    first, other = sent(cuda, aligned), sent(cuda, misaligned)
    assert first["function"] != other["function"], "Triton loads 16 bytes at once where all pointers are aligned"
    assert sent(cuda, aligned) == first
    assert sent(cuda, misaligned) == other


def persistent_launches(count=40, rows=64, cols=96, dtype=torch.float16) -> list[Launch]:
    """The persistent form of the scale gradients on new tensors, with and without a bias."""
    x, y, weight = (torch.zeros(*shape, dtype=dtype) for shape in ((count, cols), (count, rows), (rows, cols)))
    row, col, tiles = torch.zeros(rows, 1), torch.zeros(1, 1, cols), Tiles(16, 32, 64, 4, 2, schedule="persistent")
    return [
        linear_launches.grad_scales_launches(
            y, x, weight, row, col, (torch.zeros_like(row), torch.zeros_like(col), bias), SM_90, "ieee", tiles
        )[0]
        for bias in (torch.zeros(rows), None)
    ]


def test_descriptors_are_of_the_tensors_of_each_launch(cuda: FakeCuda):
    first, others = persistent_launches(), persistent_launches()
    for launch, other in zip(first, others, strict=True):
        assert launch.plan is other.plan
        for given in (launch, other, launch):
            parameters = sent(cuda, given)["parameters"]
            for tensor, (height, width) in zip(given.tensors, given.plan.blocks, strict=False):
                address, columns, rows, stride, box_width, box_height = parameters[:6]
                assert (address, rows, columns) == (tensor.data_ptr(), *tensor.shape)
                assert stride == tensor.stride(0) * tensor.itemsize
                assert width % box_width == height % box_height == 0  # a block may come in several copies
                assert parameters[16:20] == [*tensor.shape, *tensor.stride()]
                parameters = parameters[20:]
            assert parameters[0] == given.tensors[2].data_ptr()
        assert starts(launch) == 1
        assert sent(cuda, launch) == sent(cuda, launch, by_triton)


def test_a_descriptor_is_of_its_tensors_strides(cuda: FakeCuda):
    """One plan serves tensors of a shape whatever their strides, which only descriptors know."""
    (launch, *_), storage = persistent_launches(count=56), torch.zeros(56, 128, dtype=torch.float16)
    grad_y = storage[:, :64]
    wide = Launch(launch.plan, (grad_y, *launch.tensors[1:]))
    for _ in range(2):
        for given in (launch, wide):
            assert sent(cuda, given) == sent(cuda, given, by_triton)
    assert starts(launch) == 2


def test_hooks_still_run(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    (launch, *_), seen = every_launch(count=24), []
    launch.run()
    hook = lambda *args, **kwargs: seen.append("pre-run")  # noqa: E731
    monkeypatch.setattr(launch.plan.kernel, "pre_run_hooks", [hook])
    launch.run()
    monkeypatch.undo()
    knobs.runtime.launch_enter_hook.add(enter := lambda metadata: seen.append(metadata.get()["name"]))
    try:
        launch.run()
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    launch.run()
    assert seen == ["pre-run", "rlrr_linear_fwd_kernel"]


def test_debugging_compiles_and_takes_tritons_way(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    launch = every_launch(count=28)[0]
    plain = sent(cuda, launch)["function"]
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert sent(cuda, launch)["function"] != plain
    monkeypatch.undo()
    assert sent(cuda, launch)["function"] == plain


def test_an_unknown_triton_launches_its_own_way(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "_make_start", None)
    launch = every_launch(count=36)[0]
    assert sent(cuda, launch) == sent(cuda, launch) == sent(cuda, launch, by_triton)
    assert starts(launch) == 0


def test_the_one_switch_leaves_everything_to_tritons_launcher(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    launch, known = every_launch(count=52)[0], every_launch(count=53)[0]
    known.run()
    assert starts(known) == 1
    monkeypatch.setattr(launching, "direct", None)
    monkeypatch.setenv(launching.LAUNCH_VARIABLE, "triton")
    assert not launching.direct_allowed()
    assert sent(cuda, launch) == sent(cuda, launch, by_triton)
    assert starts(launch) == 0
    monkeypatch.setitem(known.plan.starts, known.key, (None, pytest.fail))
    assert sent(cuda, known) == sent(cuda, known, by_triton)
    assert known.known_start is None, "nor is it replayed"
    monkeypatch.setattr(launching, "direct", None)
    monkeypatch.setenv(launching.LAUNCH_VARIABLE, "quickly")
    with pytest.raises(ValueError, match="RLRR_LAUNCH must be direct or triton; got 'quickly'"):
        launch.run()


def older(plan, compiled):
    """The start of a nightly that passes for its release: its C function takes other arguments."""

    def start(stream: int, pointers) -> None:
        compiled.run.launch(stream, *pointers)

    return start


def unlike(plan, compiled):
    raise AttributeError("'CudaLauncher' object has no attribute 'launch_pdl'")


@pytest.mark.parametrize(("maker", "reason"), [(older, "function takes|function missing"), (unlike, "launch_pdl")])
def test_what_goes_wrong_past_tritons_launcher_is_left_to_it_with_one_warning(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, maker, reason: str
):
    monkeypatch.setattr(launching, "direct", True)
    monkeypatch.setattr(launching, "_make_start", maker)
    launch, other = every_launch(count=60 + (maker is older))[:2]
    expected = sent(cuda, launch, by_triton)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert sent(cuda, launch) == expected
        assert sent(cuda, other) == sent(cuda, other, by_triton)
    (warning,) = caught
    assert re.search(f"by Triton's own launcher from now on.*({reason})", str(warning.message))
    assert not launching.direct_allowed()
    assert launch.known_start is None


@pytest.mark.parametrize("version", ["3.9.0", "3.9.0.dev20260901", "3.7.0+git1a2b3c", "3.5.1"])
def test_a_nightly_or_local_build_passes_for_its_release(version: str):
    assert private.start_maker(version) is private.start_maker(".".join(version.split(".")[:2]) + ".0") is not None


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0", "main", ""])
def test_a_version_that_is_not_known_launches_its_own_way(version: str):
    assert private.start_maker(version) is None


def test_another_driver_is_not_sent_this_ones_kernels(cuda: FakeCuda):
    launch = every_launch(count=44)[0]
    launch.run()
    with fake_cuda() as other:
        assert sent(other, launch) == sent(other, launch, by_triton)


def test_a_record_is_of_one_launch(cuda: FakeCuda):
    """A kernel with fewer parameters than were announced would have what lies behind them read."""
    many, few = every_launch()[2], every_launch()[4]
    recorded = sent(cuda, many)["parameters"]
    assert len(recorded) > len(sent(cuda, few)["parameters"])
    assert sent(cuda, many)["parameters"] == recorded
    assert not any(cuda._sizes)


def leaked(launch: Launch, times: int) -> dict[str, int]:
    """References gained or lost by ``times`` launches, of everything that Triton's C function is handed."""
    constants = {name: value for name, value in launch.plan.meta.items() if not name.startswith("num_")}
    values = {"None": None, "number": launch.plan.numbers[0], **constants, "plan": launch.plan}
    values |= {f"tensor {i}": tensor for i, tensor in enumerate(launch.tensors)}
    before = {name: sys.getrefcount(value) for name, value in values.items()}
    for _ in range(times):
        launch.run()
    after = {name: sys.getrefcount(value) for name, value in values.items()}
    return {name: after[name] - before[name] for name in values if abs(after[name] - before[name]) > 20}


@pytest.mark.parametrize("times", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_launches_keep_and_lose_no_reference(cuda: FakeCuda, times: int, request: pytest.FixtureRequest):
    gc.collect()
    gc.disable()  # what others left must not be freed in between
    request.addfinalizer(gc.enable)
    for launch in [*every_launch(), *norm_launches(), *persistent_launches()]:
        launch.run()
        before = cuda.count
        assert not leaked(launch, times), launch.plan.kernel
        assert cuda.count == before + times
        assert starts(launch) == 1


def test_a_whole_call_is_started_past_everything(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    """From the second call on, with launches that were built anew or by Triton as the first had."""
    monkeypatch.setattr(backends, "INTERPRETING", True)  # lets CPU tensors stand for a GPU's
    layer = RLRRLinear(64, 96, dtype=torch.float16)
    x = torch.zeros(4, 20, 64, dtype=torch.float16, requires_grad=True)
    with backends.use_backend("triton.fused"):
        launches = []
        for _ in range(3):
            before = cuda.count
            layer(x).sum().backward()
            launches.append(cuda.count - before)
            monkeypatch.setattr(launching.Launch, "run", lambda launch: pytest.fail("a launch was built"))
    assert launches[0] == launches[1] == launches[2] >= 4
    assert x.grad.shape == x.shape


def test_the_installed_triton_is_known():
    assert launching._make_start is not None, (
        f"the launcher of Triton {triton.__version__} is not in ops/host/private.py"
    )


def test_the_host_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(host_overhead, "CALLS", 2)
    monkeypatch.setattr(host_overhead, "ROUNDS", 2)
    host_overhead.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("rlrr_linear, triton: forward + backward")]
