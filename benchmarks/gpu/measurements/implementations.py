"""What is timed on one layer: ours and what a user could pick instead, each as a step on given tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.estimates import ESTIMATES, estimate_forward
from benchmarks.gpu.plan import Precision
from benchmarks.support.baselines import PEFT, peft_config, peft_module
from benchmarks.support.common import Forward, Step, formula, forward_of
from rlrr_kernels.ops.linear import torch_backend as linear_torch
from rlrr_kernels.reference import rlrr_linear_reference

OURS = ("triton.fused", "triton.merge", "auto", "torch")
PLAIN = ("reference", "frozen", "merged", "floor")

Tensors = dict[str, Tensor]


class _Layers(nn.Module):
    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def peft_forwards(method: str, tensors: list[Tensors]) -> list[tuple[Forward, list[Tensor]]]:
    """One PEFT layer per set of tensors, sharing their W and bias, and the leaves of its gradients, x first."""
    linears = []
    for t in tensors:
        n, k = t["weight"].shape
        linear = nn.Linear(k, n, device="meta")
        linear.weight = nn.Parameter(t["weight"], requires_grad=False)
        linear.bias = nn.Parameter(t["bias"].detach().to(t["weight"].dtype), requires_grad=False)
        linears.append(linear)
    config = peft_config(method, r"layers\.\d+", tensors[0]["scale_row"].shape[1])
    # Adapters in the dtype of W: PEFT would otherwise train 16-bit layers by fp32 products.
    model = peft_module().get_peft_model(_Layers(linears), config, autocast_adapter_dtype=False)
    result = []
    for t, layer in zip(tensors, model.base_model.model.layers, strict=True):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        result.append((functools.partial(layer, t["x"]), [t["x"], *trained]))
    return result


def paper_form(t: Tensors) -> Tensors:
    """Scales of rank 1 as the vectors of the paper's formula, which eager computes without a matrix product."""
    if t["scale_row"].shape[1] > 1:
        return t
    return t | {"scale_row": t["scale_row"][:, 0], "scale_col": t["scale_col"][0, 0]}


def compiled_formula(mode: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """torch.compile of the reference; ``max-autotune`` without graphs of its own, which cannot be captured again."""
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    options = options or ({} if mode == "default" else {"mode": mode})
    return torch.compile(rlrr_linear_reference, fullgraph=True, dynamic=False, **options)


def forwards(name: str, tensors: list[Tensors], compiled: Callable[..., Tensor] | None = None):
    """(forward, leaves of its gradients) of a implementation for every set of tensors."""
    if name in PEFT:
        return peft_forwards(name, tensors)
    if name == "compiled":
        return [formula(compiled, paper_form(t)) for t in tensors]
    if name == "reference":
        return [formula(rlrr_linear_reference, paper_form(t)) for t in tensors]
    if name in ESTIMATES:
        return [estimate_forward(name, t) for t in tensors]
    return [forward_of(name, t) for t in tensors]


def layer_steps(
    name: str,
    work: str,
    tensors: list[Tensors],
    precision: Precision,
    compiled: Callable[..., Tensor] | None = None,
) -> list[Step]:
    """One call without arguments per set of tensors.

    Args:
        name: one of :data:`OURS`, :data:`PLAIN`, :data:`PEFT`, :data:`ESTIMATES` or ``compiled``.
        work: ``forward``, without a graph; ``step``, forward and backward of x and everything trained; ``scales``,
            the gradient of scales and bias alone, without autograd.
        tensors: of :meth:`benchmarks.support.common.Problem.tensors`.
        precision: of the problem.
        compiled: for ``compiled``, see :func:`compiled_formula`.
    """
    device = tensors[0]["x"].device.type
    if name == "floor":
        return [_floor(work, t) for t in tensors]
    if work == "scales":
        return [_scales(name, t) for t in tensors]
    steps = []
    for t, (forward, leaves) in zip(tensors, forwards(name, tensors, compiled), strict=True):
        step = _forward_step(forward) if work == "forward" else _training_step(forward, leaves, t["grad_y"])
        steps.append(_under_autocast(step, precision, device))
    return steps


def _under_autocast(step: Step, precision: Precision, device: str) -> Step:
    if not precision.mixed:
        return step

    def cast():
        with precision.autocast(device):
            return step()

    return cast


def _forward_step(forward: Forward) -> Step:
    def step():
        with torch.no_grad():
            return forward()

    return step


def _training_step(forward: Forward, leaves: list[Tensor], grad_y: Tensor) -> Step:
    return lambda: torch.autograd.grad(forward(), leaves, grad_y)


def _floor(work: str, t: Tensors) -> Step:
    x, grad_y = t["x"].detach(), t["grad_y"]
    weight = t["weight"].to(x.dtype)
    return {
        "forward": lambda: F.linear(x, weight),
        "scales": lambda: grad_y.t() @ x,
        "step": lambda: (F.linear(x, weight), grad_y @ weight, grad_y.t() @ x),
    }[work]


def _scales(name: str, t: Tensors) -> Step:
    if name == "torch":
        backward = linear_torch.backward
    else:
        from rlrr_kernels.ops.linear.triton_backend import backward
    tensors = [t[key].detach() for key in ("grad_y", "x", "weight", "scale_row", "scale_col")]
    return lambda: backward(*tensors, True, (False, True, True, True))
