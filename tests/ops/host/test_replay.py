"""Replays: from its second call on a layout's kernels are started past all that chose them, with equal results.

Triton's interpreter stands for compiled kernels: what starts one is handed addresses alone, as the driver is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels import backends, rlrr_linear
from rlrr_kernels.ops.choice import store
from rlrr_kernels.ops.choice.tiles import Tiles
from rlrr_kernels.ops.linear import autograd, library, public
from rlrr_kernels.ops.sampling.row_sample import RowSample
from tests.support.matmul_precision import switched

if not backends.INTERPRETING:
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

import triton

from benchmarks.gpu.correctness import check
from benchmarks.support.common import Problem
from benchmarks.support.fake_cuda import Driver
from rlrr_kernels.ops.host import launch as launching
from rlrr_kernels.ops.host.replay import Replay, choose_anew

pytestmark = pytest.mark.interpreted


def at_address(address: int, like: Tensor) -> Tensor:
    """The memory behind an address, as much of it as ``like`` spans, in one dimension."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * (span * like.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype)


class Recorder:
    """Kernels that replays started."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fault: Callable[[Sequence[int], list[Tensor]], object] | None = None

    def known_start(self, launch: launching.Launch) -> Callable:
        """Stands for ``Launch.known_start``."""
        plan = launch.plan
        like = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in launch.tensors]

        def start(stream: int, pointers: Sequence[int]) -> None:
            self.started.append(plan.kernel.fn.__name__)
            assert len(pointers) == len(like)
            given = [at_address(*pair) for pair in zip(pointers, like, strict=True)]
            plan.kernel[plan.grid](*given, *plan.numbers, **plan.meta)
            if self.fault is not None:
                self.fault(pointers, like)

        return start


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(launching.Launch, "known_start", property(recorder.known_start))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(launching, "watched", lambda *kernels: False)
    for module in (public, library):
        monkeypatch.setattr(module, "_calls", autograd.CallCache())
    return recorder


def problem(
    seed=0, lead=(3, 4), n=24, k=20, scales="r", rank=1, groups=1, bias=torch.float32, dtype=torch.float32,
    weight_dtype=None, frozen=(),
) -> dict[str, Tensor | None]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    row_shape, col_shape = ((n, rank), (groups, rank, k)) if scales == "r" else ((n,), (groups, k)[groups == 1 :])
    tensors = {
        "x": draw(*lead, k),
        "weight": draw(n, k, dtype=weight_dtype or dtype),
        "scale_row": draw(*row_shape, dtype=torch.float32),
        "scale_col": draw(*col_shape, dtype=torch.float32),
        "bias": None if bias is None else draw(n, dtype=bias),
    }
    for name, tensor in tensors.items():
        if tensor is not None and name != "weight" and name not in frozen:
            tensor.requires_grad_()
    return tensors | {"grad_y": draw(*lead, n)}


def run(tensors: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """y and the gradients."""
    inputs = {name: tensor for name, tensor in tensors.items() if name != "grad_y"}
    for tensor in inputs.values():
        if tensor is not None:
            tensor.grad = None
    y = rlrr_linear(**inputs, **({"backend": "triton.fused"} | options))
    y.backward(tensors["grad_y"])
    grads = {name: t.grad for name, t in inputs.items() if t is not None and t.requires_grad}
    return {"y": y.detach(), **grads}


def expected(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """The same with no replay."""
    with monkeypatch.context() as without:
        without.setattr(Replay, "ready", lambda replay: False)
        return run(tensors, **options)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape
        assert tensor.dtype == expected[name].dtype
        assert tensor.isfinite().all()
        assert torch.equal(tensor, expected[name]), name


CASES = {
    "plain": {},
    "two-dimensional x": {"lead": (19,)},
    "short scales": {"scales": "1"},
    "short scales in groups": {"scales": "1", "groups": 3},
    "rank and groups": {"rank": 3, "groups": 2},
    "no bias": {"bias": None},
    "16-bit x": {"dtype": torch.float16},
    "16-bit x beside an fp32 weight, bias of 16 bits": {
        "dtype": torch.float16, "weight_dtype": torch.float32, "bias": torch.float16,
    },
    "x alone": {"frozen": ("scale_row", "scale_col", "bias")},
    "one scale": {"frozen": ("x", "scale_col")},
    "no x": {"frozen": ("x",)},
    "split contraction": {"lead": (3,), "n": 32, "k": 260},
    "split contraction of the gradient": {"lead": (3,), "n": 260, "k": 24},
    "long x": {"lead": (90,), "n": 32, "k": 66},
}  # fmt: skip


def merging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "path_choice", lambda *arguments: store.PathChoice("merge", 2.0, 1.0))


@pytest.mark.parametrize("case", CASES)
def test_replays_give_the_same_bits(case: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, poisoned_memory):
    run(problem(**CASES[case]))
    assert not recorder.started, "the first call of a layout takes the long way"
    for seed in (1, 2):
        tensors = problem(seed, **CASES[case])
        recorder.started.clear()
        actual = run(tensors)
        assert "rlrr_linear_fwd_kernel" in recorder.started
        wanted = "rlrr_linear_bwd_dx_kernel" if tensors["x"].requires_grad else "rlrr_linear_bwd_reduce_kernel"
        assert wanted in recorder.started
        same(actual, expected(monkeypatch, tensors))


def test_a_gradient_in_another_layout_is_replayed_apart(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    """Between layers g may be a view with strides of its own; a copy of it was made, so there is nothing to replay."""
    transposed = lambda tensors: tensors | {"grad_y": tensors["grad_y"].transpose(0, 1).contiguous().transpose(0, 1)}  # noqa: E731
    for seed in range(3):
        for change in (dict, transposed):
            tensors = change(problem(seed))
            recorder.started.clear()
            actual = run(tensors)
            if seed:
                assert "rlrr_linear_fwd_kernel" in recorder.started
                assert ("rlrr_linear_bwd_dx_kernel" in recorder.started) == (change is dict)
            same(actual, expected(monkeypatch, tensors))


@pytest.mark.parametrize("strided", ["x", "scale_row", "bias"])
def test_what_was_copied_is_not_replayed(strided: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    for seed in range(4):
        tensors = problem(seed)
        tensor = tensors[strided].detach()
        if strided == "x":
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        tensors[strided] = tensor.requires_grad_()
        actual = run(tensors)
        same(actual, expected(monkeypatch, tensors))
    assert "rlrr_linear_fwd_kernel" not in recorder.started


@pytest.mark.parametrize(("missing", "scales"), [("scale_row", "1"), ("scale_col", "1"), ("scale_col", "r")])
def test_ones_in_place_of_a_missing_scale_are_not_replayed(missing: str, scales: str, recorder: Recorder, monkeypatch):
    """The call makes them: to a replay they would be memory that nobody fills."""
    for seed in range(3):
        tensors = problem(seed, scales=scales) | {missing: None}
        same(run(tensors), expected(monkeypatch, tensors))
    assert not recorder.started


@pytest.mark.parametrize("frozen", [(), ("scale_row", "scale_col", "bias")])
def test_the_librarys_product_before_an_activations_gradient_is_not_left_out(
    frozen: tuple[str, ...], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """∂a is the library's, and ∂h is written over it by a kernel that a replay could start."""
    merging(monkeypatch)
    for seed in range(3):
        tensors = problem(seed, lead=(12,), frozen=frozen)
        same(run(tensors, input_activation="gelu", backend="triton"),
             expected(monkeypatch, tensors, input_activation="gelu", backend="triton"))  # fmt: skip


def test_parts_of_memory_with_addresses_of_their_own_are_not_replayed(recorder: Recorder):
    """A replay gives each address that it does not know memory of its own."""
    whole = torch.zeros(64)
    x, y, scratch = torch.zeros(16), torch.zeros(16), torch.zeros(32)
    plan = launching.Plan(None, (1,), (), {})
    for given, made in (((x, scratch), True), ((x, scratch[16:]), False), ((whole[16:], scratch), False)):
        launches = [launching.Launch(plan, (*given, y))]
        assert (Replay.of(launches, [whole if given[0] is not x else x, y]) is not None) == made


def test_the_gpu_commands_check_sees_replays(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "replays", lambda device: True)
    sizes = Problem(40, 48, 64, torch.float32, False, "cpu")
    assert not check.flaws_on("triton.fused", sizes)
    assert "rlrr_linear_bwd_dx_kernel" in recorder.started
    recorder.fault = lambda pointers, like: at_address(pointers[-1], like[-1]).add_(1)
    assert "y of a replayed call is not that of the call" in check.flaws_on("triton.fused", sizes)


def test_one_tensor_in_two_places_is_not_replayed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    """By its address alone nobody could tell in which of the two another call has which tensor."""
    for seed in range(3):
        tensors = problem(seed, n=40, k=40, scales="1")
        tensors["bias"] = tensors["scale_row"]
        same(run(tensors), expected(monkeypatch, tensors))
    assert "rlrr_linear_fwd_kernel" not in recorder.started
    tensors = problem(7, n=40, k=40, scales="1")
    same(run(tensors), expected(monkeypatch, tensors))


def test_other_tiles_end_a_replay(recorder: Recorder):
    tensors = problem()
    for _ in range(2):
        run(tensors)
    recorder.started.clear()
    with store.only_tiles("forward", Tiles(16, 16, 16, 4, 1)):
        within = run(tensors)
        assert "rlrr_linear_fwd_kernel" not in recorder.started
        again = run(tensors)
        assert "rlrr_linear_fwd_kernel" in recorder.started
        assert torch.equal(within["y"], again["y"])
    recorder.started.clear()
    store.forget()
    run(tensors)
    assert not recorder.started


def test_another_precision_ends_a_replay_of_fp32(recorder: Recorder):
    tensors = problem()
    for _ in range(2):
        run(tensors)
    recorder.started.clear()
    with switched("high"):
        run(tensors)
        assert not recorder.started
        run(tensors)
        assert recorder.started


def test_watched_launches_and_misaligned_tensors_are_not_replayed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    tensors = problem()
    for _ in range(2):
        run(tensors)
    recorder.started.clear()
    with monkeypatch.context() as watching:
        watching.setattr(launching, "watched", lambda *kernels: True)
        run(tensors)
    assert not recorder.started
    storage = torch.empty(tensors["x"].numel() + 1)
    misaligned = storage[1:].view_as(tensors["x"]).copy_(tensors["x"].detach()).requires_grad_()
    same(run(tensors | {"x": misaligned}), run(tensors))
    recorder.started.clear()
    run(tensors | {"x": misaligned})
    assert "rlrr_linear_fwd_kernel" not in recorder.started


def test_activations_and_samples_beside_replays(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    """Calls of the same layout that need other launches must not get the replay's."""
    for _ in range(2):
        run(problem())
    tensors = problem(3)
    sample = RowSample(torch.arange(0, 12, 2), 0, 2.0)
    for options in ({"input_activation": "gelu"}, {"scale_grad_rows": sample}, {"residual": False}):
        same(run(tensors, **options), expected(monkeypatch, tensors, **options))
        same(run(tensors, **options), expected(monkeypatch, tensors, **options))


def test_the_weight_is_still_checked_after_many_calls(recorder: Recorder):
    tensors = problem()
    for _ in range(3):
        run(tensors)
    tensors["weight"].requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        run(tensors)
    tensors["weight"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"x must be \[..., K\]"):
        run(tensors | {"x": torch.zeros(3, 4, 21)})
    with pytest.raises(TypeError, match=r"scale_row must be torch\.float32"):
        run(tensors | {"scale_row": tensors["scale_row"].detach().double()})


def test_autocast_and_its_absence_do_not_share_a_call(recorder: Recorder):
    tensors = problem()
    inputs = {name: tensor for name, tensor in tensors.items() if name != "grad_y"}
    call = lambda: rlrr_linear(**inputs, backend="triton.fused").dtype  # noqa: E731
    for _ in range(3):
        assert call() == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert call() == torch.float16
            weight, bias = inputs["weight"].half(), inputs["bias"].half()
            assert F.linear(inputs["x"], weight, bias).dtype == torch.float16


@pytest.mark.parametrize(("sizes", "buffers"), [({"n": 24, "k": 260}, [1, 1]), ({"n": 260, "k": 24}, [0, 2])])
def test_scratch_buffers_do_not_overlap(sizes: dict[str, int], buffers: list[int], recorder: Recorder):
    """Parts of a product and of the scale gradients lie in one piece of memory."""
    run(problem(lead=(3,), **sizes))
    (call,) = public._calls.values()
    replays = [*call._replays._replays.values()]
    assert [len(replay._offsets) for replay in replays] == buffers
    for replay in replays:
        edges = [*replay._offsets, replay._scratch]
        assert edges[0] == 0
        assert all(edge % 256 == 0 for edge in edges)
        assert edges == sorted(set(edges))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], 1)[:, 0]


def shifted(tensor: Tensor) -> Tensor:
    """At an address that is no multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def negated(tensor: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


MOVES = {"nothing": torch.clone, "transposed": transposed, "shifted": shifted, "negated": negated}


@pytest.mark.parametrize("name", ["x", "weight", "scale_row", "scale_col"])
@pytest.mark.parametrize("start", ["nothing", "transposed"])
def test_saved_tensors_may_move_before_the_backward(name: str, start: str, recorder: Recorder):
    """As hooks on saved tensors, ``.data``, offloading and sharding move them: addresses and strides change.

    A replay of another layout would read them wrongly in silence.
    """
    tensors = problem(lead=(5,))
    tensors[name] = MOVES[start](tensors[name].detach()).requires_grad_(tensors[name].requires_grad)
    expected = run(tensors | {"x": tensors["x"]})
    size = tensors[name].shape

    def unpack(move: str) -> Callable[[Tensor], Tensor]:
        return lambda saved: MOVES[move](saved) if saved.shape == size else saved

    for move in (*MOVES, *MOVES, "nothing", "transposed"):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), unpack(move)):
            found = run(tensors)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=lambda text, m=move, k=key: f"{m}, {k}: {text}")
    assert len(recorder.started) > 8


@pytest.mark.parametrize("name", ["weight", "scale_row", "scale_col"])
def test_data_may_be_replaced_between_calls(name: str, recorder: Recorder):
    tensors = problem(lead=(5,))
    for turn, move in enumerate((*MOVES, *MOVES)):
        values = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(turn))
        tensors[name].data = MOVES[move](values)
        torch.testing.assert_close(run(tensors), run_torch(tensors))
        y = rlrr_linear(**{k: t for k, t in tensors.items() if k != "grad_y"}, backend="triton.fused")
        tensors[name].data = MOVES["transposed"](values)  # between forward and backward
        grads = torch.autograd.grad(y, [tensors["scale_row"], tensors["scale_col"]], tensors["grad_y"])
        expected = run_torch(tensors)
        torch.testing.assert_close(grads, (expected["scale_row"], expected["scale_col"]))


def run_torch(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    with backends.use_backend("torch"):
        return run(tensors, backend="auto")


def test_recording_twice_within_itself(recorder: Recorder):
    """The outer list has what the inner one has, and no call is replayed past it."""
    tensors = problem()
    for _ in range(3):
        run(tensors)
    with launching.recorded() as outer:
        run(tensors)
        with launching.recorded() as inner:
            run(tensors)
        run(tensors)
    assert len(inner) > 2
    assert len(outer) == 3 * len(inner)


def test_a_layout_is_tried_again_when_other_choices_are_in_force(recorder: Recorder):
    """Merged calls are not replayed; after a switch to the fused path they are."""
    tensors = problem(lead=(3,))
    inputs = {name: t for name, t in tensors.items() if name != "grad_y"}
    path = "merge"
    call = autograd.Call("triton", True, eager=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "path_choice", lambda *arguments: store.PathChoice(path, 0.0, 1.0))
        for _ in range(10):
            call.forward(**inputs)
        assert not recorder.started
        path = "fused"
        for _ in range(2):
            call.forward(**inputs)
        assert not recorder.started  # nobody has said that anything changed
        choose_anew()
        for _ in range(2):
            call.forward(**inputs)
    assert recorder.started


@pytest.mark.parametrize("frozen", [(), ("x", "scale_col")])
def test_compiled_code_replays_too(recorder: Recorder, frozen: tuple[str, ...]):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors: rlrr_linear(**tensors, backend="triton.fused"), backend="aot_eager", fullgraph=True
    )
    for seed in range(3):
        tensors = problem(seed, frozen=frozen)
        expected = run(tensors)
        inputs = {name: tensor.detach() for name, tensor in tensors.items() if name != "grad_y"}
        leaves = {name: inputs[name].requires_grad_() for name in expected if name != "y"}
        started = len(recorder.started)
        y = compiled(inputs)
        y.backward(tensors["grad_y"])
        if seed > 1:
            # Forward, the gradient of x where it is wanted, partial sums for the scales and their reduction.
            assert len(recorder.started) - started >= 3 + (not frozen)
        for name, value in {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}.items():
            assert torch.equal(value, expected[name]), name


# ---------------------------------------------------------------- the first replay


def test_a_replays_first_bits_are_those_of_the_call_that_it_repeats(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """A start that writes something else ends all replays, with the right results and one warning."""
    monkeypatch.setattr("rlrr_kernels.ops.host.guard.enabled", lambda device: True)
    monkeypatch.setattr(launching, "direct", True)
    for seed in range(3):
        run(problem(seed))
    recorder.started.clear()
    tensors = problem(3)
    same(run(tensors), expected(monkeypatch, tensors))
    assert recorder.started.count("rlrr_linear_fwd_kernel") == 1, "what was checked once is not computed twice"

    recorder.fault = lambda pointers, like: at_address(pointers[-1], like[-1]).add_(1)
    tensors = problem(4, n=28)
    run(tensors)
    with pytest.warns(UserWarning, match="a replayed call gave other bits than the call that it repeats") as caught:
        same(run(tensors), expected(monkeypatch, tensors))
    assert [warning.category for warning in caught].count(UserWarning) == 1
    recorder.started.clear()
    same(run(tensors), expected(monkeypatch, tensors))
    assert not recorder.started
    assert not launching.direct_allowed()


def test_a_replay_that_fails_is_computed_anew(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "direct", True)
    tensors = problem()
    run(tensors)

    def fault(pointers: Sequence[int], like: list[Tensor]) -> None:
        raise TypeError("function takes exactly 16 arguments (38 given)")

    recorder.fault = fault
    with pytest.warns(UserWarning, match=r"by Triton's own launcher from now on.*exactly 16 arguments") as caught:
        same(run(tensors), expected(monkeypatch, tensors))
    assert [warning.category for warning in caught].count(UserWarning) == 1
    same(run(tensors), expected(monkeypatch, tensors))
