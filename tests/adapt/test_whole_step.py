"""A training step as a whole: how many kernels and optimizer calls it takes."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlrr_kernels import NormRescale, RLRRConfig, RLRRLinear, adapt_model, backends, parameter_groups
from tests.support.tiny_models import disturb, tiny_images, tiny_model


def adapted(**overrides) -> nn.Module:
    model = tiny_model("vit", **overrides).train()
    adapt_model(model, RLRRConfig(recipe="paper"))
    disturb(model)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def fused_adamw(model: nn.Module) -> torch.optim.AdamW:
    from rlrr_kernels.train.loop.optimizer import adamw

    return adamw(parameter_groups(model, lr=1e-2, weight_decay=0.1), torch.device("cpu"))


def test_the_fused_optimizer_takes_the_same_steps():
    ours, plain = adapted(), adapted()
    plain_optimizer = torch.optim.AdamW(parameter_groups(plain, lr=1e-2, weight_decay=0.1), foreach=False)
    fused_optimizer = fused_adamw(ours)
    before = [p.detach().clone() for p in ours.parameters()]
    for seed in range(5):
        for model, optimizer in ((ours, fused_optimizer), (plain, plain_optimizer)):
            set_gradients(model, seed)
            optimizer.step()
    for start, a, b in zip(before, ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.requires_grad is not torch.equal(a, start)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_step_of_the_optimizer_is_one_call_a_group_however_many_vectors_there_are(depth: int):
    model = adapted(depth=depth)
    optimizer = fused_adamw(model)
    set_gradients(model, 0)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert calls.counts["_fused_adamw_"] == len(optimizer.param_groups) == 2
    assert sum(count for name, count in calls.counts.items() if "record" not in name) <= 6


def test_the_training_loop_uses_it_where_it_exists():
    from rlrr_kernels.train.loop.optimizer import adamw

    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3}]
    for device, fused in (("cpu", True), ("cuda", True), ("meta", False)):
        assert adamw(groups, torch.device(device)).defaults["fused"] is fused


@pytest.mark.skipif(backends.INTERPRETING or shutil.which("cc") is None, reason="needs Triton's and a C compiler")
def test_the_kernels_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """Four launches a layer and three a norm, the same at every step, on a driver that does nothing.

    Named while no call is replayed, as a replay starts kernels past their plans; only counted while some are.
    """
    pytest.importorskip("triton", reason="needs Triton")
    from benchmarks.support.fake_cuda import fake_cuda
    from rlrr_kernels.ops.host import launch, replay
    from rlrr_kernels.ops.linear import autograd, public

    model = adapted()
    images, labels = tiny_images("vit"), torch.tensor([0, 1, 2])
    layers, norms = (sum(isinstance(m, kind) for m in model.modules()) for kind in (RLRRLinear, NormRescale))
    assert (layers, norms) == (8, 5)
    started, run = [], launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda launch: started.append(launch.plan.kernel.fn.__name__) or run(launch)
    )
    monkeypatch.setattr(backends, "INTERPRETING", True)  # lets CPU tensors take the Triton road
    monkeypatch.setattr(public, "_calls", autograd.CallCache())
    counts = []
    with fake_cuda() as cuda, backends.use_backend("triton.fused"):
        for step in range(4):
            monkeypatch.setattr(replay, "_MOST_ATTEMPTS", 0 if step < 2 else 3)
            started.clear()
            before = cuda.count
            F.cross_entropy(model(images), labels).backward()
            if step < 2:
                assert cuda.count - before == len(started)
                counts.append(Counter(started))
            else:
                assert cuda.count - before == counts[0].total() > len(started)
    assert counts[0] == counts[1]
    for kernel in ("fwd", "bwd_dx", "bwd_scales", "bwd_reduce"):
        assert counts[0][f"rlrr_linear_{kernel}_kernel"] == layers
    for kernel in ("fwd", "bwd", "bwd_reduce"):
        assert counts[0][f"_norm_rescale_{kernel}_kernel"] == norms
    others = set(counts[0]) - {"sum_splits_kernel", "_activation_bwd_kernel"}
    assert len(others) == 7, others
