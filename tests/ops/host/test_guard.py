"""Kernels that do not compile, are compiled badly or are wrong give way to the library's products, with one warning.

The kernels are Triton's interpreter's, with wrong results and errors planted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlrr_kernels import NormRescale, backends, devices, numerics, rlrr_linear, rlrr_linear_multi, rlrr_mlp, use_backend
from rlrr_kernels.numerics import Case, MultiCase
from rlrr_kernels.ops.host import cache
from rlrr_kernels.reference import rlrr_linear_multi_reference

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels.ops.host import guard, private
from rlrr_kernels.ops.host import launch as launching
from rlrr_kernels.ops.linear import first_use
from rlrr_kernels.ops.sampling.row_sample import RowSample, sample_rows, smallest_keys

pytestmark = pytest.mark.interpreted
needs_interpreter = pytest.mark.skipif(not backends.INTERPRETING, reason="runs the kernels")


@pytest.fixture(autouse=True)
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Checks that are on, with nothing known of any kernel; the file of their verdicts."""
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv(guard.VARIABLE, "on")
    # Plans are kept, and with them their verdicts: every test has its own.
    monkeypatch.setattr(launching.Launch, "key", property(lambda launch: (str(tmp_path), *_key(launch))))
    guard.forget()
    yield tmp_path / "checks.json"
    guard.forget()


_key = launching.Launch.key.fget


def plant(
    monkeypatch: pytest.MonkeyPatch, kernel: str, fault: Callable[[Tensor], object], place: int = -1
) -> list[str]:
    """Lets ``fault`` have its way with a tensor of every launch of a kernel; gives the kernels that ran."""
    run, ran = launching.Launch.run, []

    def run_wrongly(launch: launching.Launch) -> None:
        name = launch.plan.kernel.fn.__name__
        ran.append(name)
        run(launch)
        if name == kernel:
            fault(launch.tensors[place])

    monkeypatch.setattr(launching.Launch, "run", run_wrongly)
    return ran


def fail(tensor: Tensor) -> None:
    raise RuntimeError("PassManager::run failed\nand more lines")


def outputs(tensors: dict[str, Tensor], backend: str = "triton") -> dict[str, Tensor]:
    return numerics.outputs(lambda *args, **options: rlrr_linear(*args, backend=backend, **options), tensors, True)


def check(tensors: dict[str, Tensor]) -> None:
    numerics.check_bound(lambda *args, **options: rlrr_linear(*args, backend="triton", **options), tensors)


FORWARD, GRAD_X, SCALES = "rlrr_linear_fwd_kernel", "rlrr_linear_bwd_dx_kernel", "rlrr_linear_bwd_scales_kernel"
CASES = [Case(40, 48, 72, 1, 3), Case(20, 48, 72, 4, 1, dtype=torch.float16), Case(19, 34, 51, 2, 2, bias=False)]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_kernels_pass_and_are_looked_at_once(case: Case, checks: Path, monkeypatch: pytest.MonkeyPatch):
    looked_at = []
    for name in ("forward_error", "grad_x_error", "grad_scales_error"):
        check = getattr(first_use, name)
        monkeypatch.setattr(first_use, name, lambda *args, n=name, c=check: looked_at.append(n) or c(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            outputs(case.draw(0))
    assert sorted(looked_at) == ["forward_error", "grad_scales_error", "grad_x_error"]
    assert set(guard.verdicts().values()) == {guard.RIGHT}
    assert not guard.given_up()


@needs_interpreter
@pytest.mark.parametrize("kernel", [FORWARD, GRAD_X, SCALES])
@pytest.mark.parametrize("fault", [lambda tensor: tensor.mul_(1.01), lambda tensor: tensor.fill_(torch.nan), fail])
def test_a_wrong_kernel_gives_way_with_one_warning(kernel: str, fault: Callable, monkeypatch: pytest.MonkeyPatch):
    ran = plant(monkeypatch, kernel, fault)
    tensors = Case(40, 48, 72, 1, 3).draw(0)
    with pytest.warns(UserWarning, match="gives way to the library's products") as caught:
        check(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(tensors)
    (message,) = (str(warning.message) for warning in caught if warning.category is UserWarning)
    assert kernel in message
    assert "BLOCK_M=" in message
    assert "float32" in message
    assert ran.count(kernel) == 1, "it is not run again"
    reason = "RuntimeError: PassManager::run failed" if fault is fail else "unit roundoffs of its bound"
    assert all(reason in why for why in guard.given_up().values())


@needs_interpreter
@pytest.mark.parametrize("kernel", ["fwd", "bwd_dx", "bwd_scales", "mixed"])
def test_a_wrong_kernel_of_several_tasks_gives_way(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlrr_kernels.ops.multi.triton.path.KERNEL_US", 0.0)
    index = [0, -1, 2] if kernel != "mixed" else [0, 1, -1, 0]
    tensors = MultiCase(tuple(index), 19 if kernel != "mixed" else 2, 48, 72, 3, groups=3).draw(0)
    multi = partial(rlrr_linear_multi, index=torch.tensor(index), backend="triton")
    formula = partial(rlrr_linear_multi_reference, index=torch.tensor(index))
    ran = plant(monkeypatch, f"rlrr_linear_multi_{kernel}_kernel", lambda tensor: tensor.mul_(1.01))
    with pytest.warns(UserWarning, match=f"gives way.*\n.*rlrr_linear_multi_{kernel}_kernel"):
        first = numerics.outputs(multi, tensors, True)
    second = numerics.outputs(multi, tensors, True)
    exact = numerics.exact_outputs(tensors, True, formula)
    for found in (first, second):
        assert all(numerics.relative_error(value, exact[name]) < 1e-6 for name, value in found.items())
    forms = 2 if kernel == "mixed" else 1  # forward, and the gradient in parts
    assert ran.count(f"rlrr_linear_multi_{kernel}_kernel") == forms, "none is run again"


@needs_interpreter
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 6e4])
def test_of_results_that_overflow_nothing_is_known(value: float, checks: Path):
    """A gradient scaler's first steps: the kernels are right, and looked at when their results are finite."""
    case = Case(40, 48, 72, dtype=torch.float16)
    for seed in range(2):
        tensors = case.draw(seed)
        tensors["grad_y"][:, 3] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            outputs(tensors)
        assert not guard.given_up()
        assert value == 6e4 or not any("bwd" in name for name in guard.verdicts())  # some sums of it are finite
    outputs(case.draw(2))
    assert any("bwd_dx" in name for name in guard.verdicts())
    assert any("bwd_scales" in name for name in guard.verdicts())
    assert set(guard.verdicts().values()) == {guard.RIGHT}


def test_a_replays_nans_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "direct", True)
    found = torch.tensor([1.0, torch.nan, -torch.inf])
    assert guard.same_bits((found, None), (found.clone(), None))
    with pytest.warns(UserWarning, match="other bits"):
        assert not guard.same_bits((torch.zeros(1),), (-torch.zeros(1),))


@needs_interpreter
def test_one_wrong_element_of_a_column_that_is_looked_at_shows(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, FORWARD, lambda y: y[-1, -1].add_(1.0))
    with pytest.warns(UserWarning, match="gives way"):
        outputs(Case(40, 48, 72).draw(0))


@needs_interpreter
def test_what_is_forced_by_name_is_run_whatever_is_known(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, FORWARD, lambda tensor: tensor.fill_(7.0))
    tensors = Case(40, 48, 72).draw(0)
    with pytest.warns(UserWarning, match="gives way"):
        outputs(tensors)
    assert (outputs(tensors, "triton.fused")["y"] == 7.0).all()


@needs_interpreter
def test_the_switch(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, FORWARD, lambda tensor: tensor.fill_(7.0))
    tensors = Case(40, 48, 72).draw(0)
    monkeypatch.setenv(guard.VARIABLE, "off")
    guard.forget()
    assert (outputs(tensors)["y"] == 7.0).all()
    monkeypatch.setenv(guard.VARIABLE, "sometimes")
    guard.forget()
    with pytest.raises(ValueError, match="RLRR_CHECK must be on or off; got 'sometimes'"):
        outputs(tensors)


def test_gpus_are_checked_and_the_interpreter_is_not_unless_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(guard.VARIABLE)
    guard.forget()
    assert guard.enabled(torch.device("cuda"))
    assert not guard.enabled(torch.device("cpu"))


def of_a_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are what only a GPU's are: of a named GPU, with a source that has a hash."""
    monkeypatch.setattr(guard, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(guard.private, "source_hash", lambda kernel: "0123abcd")


@needs_interpreter
def test_verdicts_are_kept_for_later_processes(checks: Path, monkeypatch: pytest.MonkeyPatch):
    of_a_compiled_kernel(monkeypatch)
    plant(monkeypatch, GRAD_X, lambda tensor: tensor.mul_(1.01))
    tensors = Case(40, 48, 72, 1, 3).draw(0)
    with pytest.warns(UserWarning, match="gives way"):
        outputs(tensors)
    kept = json.loads(checks.read_text())["verdicts"]
    wrong = [name for name, verdict in kept.items() if verdict != guard.RIGHT]
    assert len(wrong) == 1
    assert wrong[0].startswith("a GPU | triton ")
    assert GRAD_X in wrong[0]
    # Another process, in which nothing is wrong any more: it believes what is kept, and looks at nothing.
    monkeypatch.undo()
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(checks.parent))
    monkeypatch.setenv(guard.VARIABLE, "on")
    of_a_compiled_kernel(monkeypatch)
    monkeypatch.setattr(launching.Launch, "key", property(lambda launch: ("another process", *_key(launch))))
    monkeypatch.setattr(first_use, "error", lambda *args: pytest.fail("it was looked at again"))
    guard.forget()
    with pytest.warns(UserWarning, match="when it was first used here"):
        outputs(tensors)
    checks.write_text("{")
    guard.forget()
    assert guard.verdicts() == {}, "a damaged file is as good as none"


@needs_interpreter
def test_a_merge_that_fails_is_plain_torchs(monkeypatch: pytest.MonkeyPatch):
    ran = plant(monkeypatch, "merge_kernel", fail)
    tensors = Case(200, 48, 72, 1, 3).draw(0)  # the interpreter merges from 97 rows on
    with pytest.warns(UserWarning, match="gives way"):
        check(tensors)
    assert "merge_kernel" in ran


def norm(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    module = NormRescale(torch.nn.LayerNorm(35)).to(dtype)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
    x = (torch.randn(37, 35, generator=draw) + 3).to(dtype).requires_grad_()
    with use_backend(backend):
        y = module(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, module.scale, module.shift])


def mlp(backend: str, dtype: torch.dtype, activation: str = "gelu") -> tuple[Tensor, ...]:
    drawn = numerics.MlpCase(6, 24, 40, 32, dtype=dtype).draw(0)
    grad_y = drawn.pop("grad_y")
    leaves = [t.requires_grad_() for name, t in drawn.items() if not name.endswith("weight")]
    return torch.autograd.grad(rlrr_mlp(**drawn, activation=activation, backend=backend), leaves, grad_y)


def sampled(backend: str, dtype: torch.dtype, images: int = 3) -> tuple[Tensor, ...]:
    tensors = Case(3 * 41, 32, 40, 2, 1, dtype=dtype).draw(0)
    kept, weight = 3, 8.0 if images else 2.5
    index = torch.tensor([0, 41, 82, *(41 * image + token for image in range(3) for token in range(1, 41, 3))])
    sample = RowSample(index, kept, weight, images)
    function = partial(rlrr_linear, backend=backend, scale_grad_rows=sample)
    found = numerics.outputs(function, tensors, True)
    return found["scale_row"], found["scale_col"], found["bias"]


def draws(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    if backend == "torch":
        return (smallest_keys(torch.rand(3, 21), torch.tensor([[0], [22], [44]]), 10, 1),)
    with use_backend(backend):
        return (sample_rows(torch.Size((3, 22, 8)), 10 / 21, 1, torch.device("cpu")).index,)


@needs_interpreter
@pytest.mark.parametrize(
    ("operator", "kernel", "place"),
    [
        (norm, "_norm_rescale_fwd_kernel", 5),
        (norm, "_norm_rescale_bwd_kernel", -2),
        (norm, "_norm_rescale_bwd_kernel", -1),
        (norm, "_norm_rescale_bwd_reduce_kernel", -2),
        (norm, "_norm_rescale_bwd_reduce_kernel", -1),
        (mlp, "_activation_bwd_kernel", 0),
        (mlp, "_activation_bwd_kernel", -1),
        (sampled, "_rlrr_linear_bwd_sampled_scales_kernel", -1),
        (sampled, "_rlrr_linear_bwd_image_means_kernel", 3),
        (sampled, "_rlrr_linear_bwd_image_means_kernel", 4),
        (draws, "_smallest_keys_kernel", -1),
    ],
)
def test_the_other_kernels_give_way_too(operator: Callable, kernel: str, place: int, monkeypatch: pytest.MonkeyPatch):
    expected = operator("torch", torch.float32)
    for fault in (lambda tensor: tensor.add_(1), fail):
        with monkeypatch.context() as patch:
            patch.setattr(launching.Launch, "key", property(lambda launch, here=(patch,): (here, *_key(launch))))
            guard.forget()
            ran = plant(patch, kernel, fault, place)
            with pytest.warns(UserWarning, match=f"gives way to the library's products(.*\n)*.*{kernel}"):
                first = operator("triton", torch.float32)
            for actual in (first, operator("triton", torch.float32)):
                for found, right in zip(actual, expected, strict=True):
                    torch.testing.assert_close(found, right)
            assert ran.count(kernel) == 1, "it is not run again"


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "operator", [norm, mlp, partial(mlp, activation="gelu_tanh"), sampled, partial(sampled, images=0), draws]
)
def test_the_other_kernels_pass_where_they_are_right(operator: Callable, dtype: torch.dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        operator("triton", dtype)
    assert guard.verdicts()
    assert set(guard.verdicts().values()) == {guard.RIGHT}


# ---------------------------------------------------------------- eyes on the compiler

TTIR = (
    "%29 = tt.dot %27, %28, %arg9, inputPrecision = tf32 : tensor<64x32x{0}> * tensor<32x64x{0}> -> tensor<64x64xf32>"
)


SASS = {
    "none in a loop": "BRA LBB2;\nSTL [R1], R4;\nLBB1:\nHMMA R0\n@P0 BRA LBB1;\nLDL.LU R3, [R1];\nLBB2:\nBRA LBB2;\n",
    "a loop stores": "LBB1:\nSTL [R1], R4;\n@P0 BRA LBB1;\nBRA LBB1_;\nLDL.LU R3, [R1];\n",
    "a loop loads": "STL [R1], R4;\nLBB1:\nLBB2:\nHMMA R0\n@P1 BRA LBB2;\nLDL.LU R3, [R1];\n@P0 BRA LBB1;\n",
}


@pytest.mark.parametrize(
    ("dtype", "texts", "spilled", "fault"),
    [
        ("bf16", {"ptx": "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"}, 0, None),
        ("f16", {"ptx": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {"}, 0, None),
        ("bf16", {"ptx": "tcgen05.mma.cta_group::1.kind::f16 [%r1]"}, 16, None),
        ("bf16", {"ptx": "fma.rn.f32 %f1, %f2, %f3, %f4;"}, 0, "without matrix instructions"),
        ("f32", {"ptx": "fma.rn.f32 %f1, %f2, %f3, %f4;"}, 0, None),
        ("bf16", {"amdgcn": "v_mfma_f32_32x32x8_bf16 a[0:15]"}, 0, None),
        ("f16", {"amdgcn": "v_wmma_f32_16x16x16_f16 v[0:7]"}, 0, None),
        ("f16", {"amdgcn": "v_fma_f32 v0, v1, v2, v3"}, 0, "without matrix instructions"),
        ("bf16", {}, 0, None),
        ("f32", {"ptx": ""}, 17, "spills 17 registers"),
        ("f32", {"sass": SASS["a loop loads"]}, 17, "spills 17 registers"),
        ("f32", {"sass": SASS["none in a loop"]}, 128, None),
        ("f32", {"sass": SASS["none in a loop"]}, 129, "spills 129 registers"),
    ],
)
def test_what_the_compiler_made_of_a_kernel(dtype: str, texts: dict[str, str], spilled: int, fault: str | None):
    compiled = SimpleNamespace(n_spills=spilled, asm={"ttir": TTIR.format(dtype), **texts})
    found = guard.compiler_fault(compiled)
    assert found is None if fault is None else fault in found
    assert guard.compiler_fault(None) is None
    assert guard.compiler_fault(SimpleNamespace()) is None, "names that a new Triton lacks are no fault"


@pytest.mark.parametrize(("sass", "in_loops"), [*zip(SASS.values(), (False, True, True), strict=True), ("", True)])
def test_a_spill_is_in_a_loop_between_a_label_and_a_branch_back_to_it(sass: str, in_loops: bool):
    assert private.spills_in_loops(SimpleNamespace(asm={"sass": sass})) is in_loops
    assert private.spills_in_loops(SimpleNamespace()), "unknown machine code is taken to have them in its loops"


@pytest.mark.skipif(backends.INTERPRETING, reason="with Triton's interpreter on, nothing compiles")
@pytest.mark.parametrize(("arch", "fault"), [("sm_75", True), ("sm_80", False), ("sm_90", False), ("gfx942", False)])
def test_the_compilers_own_output_is_understood(arch: str, fault: bool):
    """Turing's tensor cores are none that Triton knows."""
    from benchmarks import compile_report
    from rlrr_kernels.ops.choice.tiles import Tiles
    from rlrr_kernels.ops.linear.triton.launches import grad_x_launches

    x, y, weight = (torch.empty(64, 64, dtype=torch.float16, device="meta") for _ in range(3))
    row, col = torch.empty(64, 1, device="meta"), torch.empty(1, 1, 64, device="meta")
    tiles = Tiles(64, 32, 64, 4, 2, max_splits=1)
    launch, *_ = grad_x_launches(y, weight, row, col, True, x, devices.typical(arch), "ieee", tiles)
    compiled = compile_report.compile_launch(launch, arch)
    assert (guard.compiler_fault(compiled) is not None) is fault


@needs_interpreter
def test_a_badly_compiled_kernel_gives_way_from_its_second_call_on(monkeypatch: pytest.MonkeyPatch):
    ran = plant(monkeypatch, "", lambda tensor: None)
    monkeypatch.setattr(guard, "compiler_fault", lambda compiled: "the compiler spills 99 registers")
    tensors = Case(40, 48, 72, 1, 3).draw(0)
    with pytest.warns(UserWarning, match="spills 99 registers"):
        first = outputs(tensors)
    assert {FORWARD, GRAD_X, SCALES} <= set(ran)
    ran.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the merge's kernel, which has its first call now
        outputs(tensors)
        ran.clear()
        again = outputs(tensors)
    assert not ran
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-4)
