"""What the benchmarks share: problems, implementations to compare, and the counting of bytes."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrr_kernels import rlrr_linear
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.reference import rlrr_linear_reference

LAYER_SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072))
"""(N, K) of the four linear layers in a ViT-B block."""


class Problem(NamedTuple):
    """One layer call: x [M, K] to y [M, N]."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    backward: bool
    device: str = "cpu"
    weight_dtype: torch.dtype | None = None  # None: dtype
    rank: int = 1
    groups: int = 1

    def empty(self, device: str) -> dict[str, Tensor]:
        """The arguments of rlrr_linear, and ``grad_y``, without values."""
        m, n, k, weight_dtype = self.m, self.n, self.k, self.weight_dtype or self.dtype
        shapes = {
            "x": ((m, k), self.dtype), "weight": ((n, k), weight_dtype), "scale_row": ((n, self.rank), torch.float32),
            "scale_col": ((self.groups, self.rank, k), torch.float32), "bias": ((n,), torch.float32),
            "grad_y": ((m, n), self.dtype),
        }  # fmt: skip
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The same, normal; W and s_c of variance 1 / K. What is trained requires a gradient if ``backward``."""
        generator = torch.Generator(self.device).manual_seed(seed)
        tensors = {}
        for name, like in self.empty("meta").items():
            std = self.k**-0.5 if name in ("weight", "scale_col") else 1.0
            drawn = torch.randn(like.shape, generator=generator, device=self.device) * std
            trained = self.backward and name not in ("weight", "grad_y")
            tensors[name] = drawn.to(like.dtype).requires_grad_(trained)
        return tensors


Step = Callable[[], object]


def steps(problem: Problem, names: tuple[str, ...]) -> dict[str, Step]:
    """A call without arguments for every name: ``floor``, or one that :func:`forward_of` knows.

    ``floor``: the three matrix products that an exact backward needs (one in forward), called bare, without autograd.
    """
    t = problem.tensors()
    x, weight, grad_y = t["x"].detach(), t["weight"], t["grad_y"]

    def step_of(name: str) -> Step:
        if name != "floor":
            forward, trained = forward_of(name, t)
            return _training_step(forward, trained, grad_y) if problem.backward else forward
        if problem.backward:
            return lambda: (F.linear(x, weight), grad_y @ weight, grad_y.t() @ x)
        return lambda: F.linear(x, weight)

    return {name: step_of(name) for name in names}


Forward = Callable[[], Tensor]


def forward_of(name: str, t: dict[str, Tensor]) -> tuple[Forward, list[Tensor]]:
    """The forward of an implementation on the tensors ``t``, and what it trains, x first.

    ``reference``: the literal formula, eager. ``compiled``: torch.compile of it. ``frozen``: the layer without an
    adapter, which computes ∂x and ∂b. ``merged``: F.linear with W', forward only. Any other name is a backend's.
    """
    x, weight, bias = t["x"], t["weight"], t["bias"]
    if name == "frozen":
        return lambda: F.linear(x, weight, bias.to(x.dtype)), [x, bias]
    if name == "merged":
        merged = linear_torch.merge(weight, t["scale_row"].detach(), t["scale_col"].detach(), True, x.dtype)
        same = bias.detach().to(x.dtype)
        return lambda: F.linear(x, merged, same), [x]
    if name == "compiled":
        torch._dynamo.reset()
        return formula(torch.compile(rlrr_linear_reference, fullgraph=True, dynamic=False), t)
    if name == "reference":
        return formula(rlrr_linear_reference, t)
    leaves = [x, t["scale_row"], t["scale_col"], bias]
    return lambda: rlrr_linear(x, weight, *leaves[1:], backend=name), leaves


def formula(function: Callable[..., Tensor], t: dict[str, Tensor]) -> tuple[Forward, list[Tensor]]:
    """:func:`forward_of` for the literal formula, compiled or not: its scales have the dtype of W, as in a model."""
    x, weight = t["x"], t["weight"]
    same = [t[name].detach().to(weight.dtype) for name in ("scale_row", "scale_col", "bias")]
    for scale in same:
        scale.requires_grad_(x.requires_grad)
    return lambda: function(x, weight, *same), [x, *same]


def _training_step(forward: Forward, trained: list[Tensor], grad_y: Tensor) -> Step:
    def step():
        forward().backward(grad_y)
        for tensor in trained:
            tensor.grad = None

    return step


def synchronize(device: str) -> None:
    """Waits for the device's queue; nothing to wait for on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Most bytes torch's allocator held for one call of ``step`` beyond what it held before."""
    step()
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def kept_bytes(forward: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, beyond the storages of the tensors ``given``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a result that its own function keeps (attention's) would hold itself for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def layer_kept_bytes(problem: Problem, name: str) -> int:
    """:func:`kept_bytes` of the implementation ``name`` on ``problem``."""
    tensors = problem.tensors()
    return kept_bytes(forward_of(name, tensors)[0], list(tensors.values()))


def environment() -> dict[str, str | int]:
    """What a row must say about where it was measured."""
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "cpu": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in values.get("flags", "")]
    return f"{values.get('model name', platform.machine())} ({', '.join(extensions)})"


def number(value: object) -> str:
    """A cell of a table: numbers to three digits, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def markdown_table(heads: list[str], lines: list[list[object]]) -> list[str]:
    """Lines of Markdown, numbers to three digits, with a blank one behind; "None." without any line."""
    if not lines:
        return ["None.", ""]
    table = [f"| {' | '.join(map(number, line))} |" for line in lines]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *table, ""]
