"""Kernels and bytes of an adapted ViT's block as Inductor schedules it, ours beside the literal formula: no GPU needed.

    python -m benchmarks.compiled_graphs [--batch 64]

ViT-B/16 in bfloat16, ``recipe="paper"``, forward and backward. The model is traced with fake tensors on the road of a
CUDA tensor, and Inductor fuses by its rules for Triton; nothing is compiled or run. One and two blocks are compared.
Bytes are what each kernel reads and writes; those of an operator that Inductor cannot see into are its arguments and
results alone, without what it does in scratch (W' and partial sums). By the internals of PyTorch 2.15.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func
from torch import nn
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.support.baselines import use_reference
from benchmarks.support.fake_cuda import Driver
from rlrr_kernels import RLRRConfig, adapt_model, backends, recompute_activations

VARIANTS = ("reference", "rlrr", "recompute", "frozen")
"""The paper's recipe by the literal formula; by our operators; with ``recompute_activations``; nothing trained."""


class Scheduled(NamedTuple):
    """Kernels that Inductor writes, and calls of operators and libraries, with the bytes they take and give."""

    fused: int
    fused_bytes: int
    calls: int
    call_bytes: int


def build(variant: str, depth: int, **overrides: int) -> nn.Module:
    """A ViT-B/16, or a smaller one, prepared as the variant says."""
    import timm

    model = timm.create_model("vit_base_patch16_224", depth=depth, num_classes=10, **overrides).to(torch.bfloat16)
    if variant == "frozen":
        return model.requires_grad_(False)
    adapt_model(model, RLRRConfig(recipe="paper"))
    if variant == "reference":
        use_reference(model)
        model.to(torch.bfloat16)
    recompute_activations(model, variant == "recompute")
    return model.train()


def scheduled(model: nn.Module, batch: int) -> Scheduled:
    """All of a step's forward and backward, the loss left out."""
    found: list[tuple[bool, int]] = []
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "INTERPRETING", True))  # lets CPU tensors take the road
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        stack.enter_context(config.patch(cpu_backend="triton"))
        stack.enter_context(backends.use_backend("triton"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = copy.deepcopy(model)
        size = model.patch_embed.img_size
        x = torch.randn(batch, 3, *size, dtype=torch.bfloat16, requires_grad=True)
        compiled = torch.compile(model, backend=_scheduling(found), fullgraph=True, dynamic=False)
        compiled(x).float().square().mean().backward()
    fused = [size for is_call, size in found if not is_call]
    calls = [size for is_call, size in found if is_call and size]  # parts of a result are no calls
    return Scheduled(len(fused), sum(fused), len(calls), sum(calls))


def _scheduling(found: list[tuple[bool, int]]) -> Callable:
    """A compiler that schedules a graph, notes whether each node is a call and its bytes, and runs the graph."""

    def inner(graph: torch.fx.GraphModule, example_inputs: list, **options: object) -> Callable:
        lowered = copy.deepcopy(graph)
        with V.set_fake_mode(torch._guards.detect_fake_mode(example_inputs)):
            compile_fx._recursive_post_grad_passes(lowered, False)
            compile_fx.record_original_output_strides(lowered)
            lowering = GraphLowering(lowered, example_inputs=example_inputs)
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*example_inputs)
                lowering.init_wrapper_code()
                lowering._update_scheduler()
                for node in lowering.scheduler.nodes:
                    is_call = isinstance(node, ExternKernelSchedulerNode)
                    found.append((is_call, node.get_read_write_buffers_sizes()))
        return make_boxed_func(graph.forward)

    return lambda graph, example_inputs: compile_fx.compile_fx(graph, example_inputs, inner_compile=inner)


def block(variant: str, batch: int, **overrides: int) -> Scheduled:
    """What one block adds."""
    one, two = (scheduled(build(variant, depth, **overrides), batch) for depth in (1, 2))
    return Scheduled(*(b - a for a, b in zip(one, two, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    print("| a block | fused kernels | MB | calls | MB |\n|---|---|---|---|---|")
    for variant in VARIANTS:
        fused, fused_bytes, calls, call_bytes = block(variant, arguments.batch)
        print(f"| {variant} | {fused} | {fused_bytes / 1e6:,.0f} | {calls} | {call_bytes / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
