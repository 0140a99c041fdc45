"""Whole training steps of a ViT: forward, loss, backward and optimizer, eager, compiled and as one CUDA graph."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.correctness.check import Checks
from benchmarks.gpu.estimates import ESTIMATES
from benchmarks.gpu.plan import PRECISIONS, Precision, RunPlan
from benchmarks.gpu.timing import MAX_ROUNDS, MIN_ROUNDS, capture, explain, release
from benchmarks.gpu.work import Row, Unit, announce
from benchmarks.support.baselines import PEFT, PEFT_TARGETS, peft_config, peft_module, peft_reason, use_reference
from benchmarks.support.common import Step, peak_bytes, synchronize
from rlrr_kernels import RLRRConfig, adapt_model, parameter_groups, recompute_activations

OURS = ("auto", "recompute")
"""``recompute``: with :func:`rlrr_kernels.recompute_activations`, which saves memory for a little time."""

IMPLEMENTATIONS = (*OURS, "reference", "hira", "lora")
RECOMPUTED_ESTIMATE = "rows 1/4, recompute"
"""The least memory: an estimate with :func:`rlrr_kernels.recompute_activations`."""

IN_MODE = {
    "compile": ("auto", "reference"),
    "estimate": (*OURS, *ESTIMATES, RECOMPUTED_ESTIMATE, "lora"),
}
"""Implementations by mode, where not all: a compiler takes a minute each; estimates are timed eagerly."""

_KERNELS_OF = {"recompute": "auto", RECOMPUTED_ESTIMATE: "rows 1/4"}
"""Which implementation's kernels one that recomputes runs."""


def build_model(
    plan: RunPlan, name: str, model_name: str, precision: Precision
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and its optimizer's groups. Trained beside the adapter is the head, whatever the method.

    A 16-bit reference has 16-bit scales, its cheapest form: fp32 ones would make every product fp32.
    """
    torch.manual_seed(0)
    with torch.device(plan.device):  # drawing a large model on the host takes many seconds
        model = plan.build(model_name).to(precision.weight_dtype)
    kernels = _KERNELS_OF.get(name, name)
    if kernels in ("auto", "reference", *ESTIMATES):
        adapt_model(model, RLRRConfig(recipe="paper", scale_grad_rows=ESTIMATES.get(kernels, 1.0)))
        if name in _KERNELS_OF:
            recompute_activations(model)
        if name == "reference":
            use_reference(model)
            model.to(precision.weight_dtype)
        return model.train(), parameter_groups(model, lr=1e-4, weight_decay=5e-5)
    wrapped = peft_module().get_peft_model(model, peft_config(name, PEFT_TARGETS), autocast_adapter_dtype=False)
    model.get_classifier().requires_grad_(True)
    return wrapped.train(), [{"params": [p for p in wrapped.parameters() if p.requires_grad]}]


def training_step(
    plan: RunPlan, model: nn.Module, groups: list[dict[str, Any]], batch: int, precision: Precision, compiled: bool
) -> Step:
    """A call that makes one step of AdamW on fixed random images and labels."""
    config = model.get_base_model() if hasattr(model, "get_base_model") else model
    size = config.patch_embed.img_size
    classes = config.get_classifier().out_features
    dtype = precision.dtype if not precision.mixed else precision.weight_dtype
    images = torch.randn(batch, 3, *size, device=plan.device).to(dtype)
    labels = torch.randint(classes, (batch,), device=plan.device)
    options = {"fused": True, "capturable": True} if plan.graphs else {}
    optimizer = torch.optim.AdamW(groups, lr=1e-4, **options)
    forward = torch.compile(model, dynamic=False, **plan.compile_options) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(plan.device):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def _check_names(name: str) -> list[str]:
    """The correctness checks that ``name`` must have passed before it is timed; the last is what it is called there."""
    kernels = _KERNELS_OF.get(name, name)
    names = ["model"] if kernels in ("auto", *ESTIMATES) else [name]
    names += [kernels] if kernels in ESTIMATES else []
    return names + (["recompute"] if name in _KERNELS_OF else [])


def step_rows(plan: RunPlan, checks: Checks, model_name: str, batch: int, precision: Precision, mode: str) -> list[Row]:
    """Every implementation of one model, steps interleaved; ``mode``: eager, graph, compile or estimate."""
    if mode == "compile":
        torch._dynamo.reset()
    pool = torch.cuda.graph_pool_handle() if mode == "graph" else None  # shared: a step reads no other's results
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name in IN_MODE.get(mode, IMPLEMENTATIONS):
        row = rows[name] = {"section": "steps", "model": model_name, "batch": batch, "precision": precision.name}
        row |= {"mode": mode, "implementation": name}
        checked = [] if plan.tiny else [checks.reason_against(check, precision) for check in _check_names(name)]
        reason = next(filter(None, checked), None) or (peft_reason(name) if name in PEFT else None)
        if reason:
            row["skipped"] = reason
            continue
        announce(_check_names(name)[-1], precision.name, model=model_name, batch=batch, mode=mode)
        try:
            model, groups = build_model(plan, name, model_name, precision)
            step = training_step(plan, model, groups, batch, precision, mode == "compile")
            for _ in range(1 if plan.tiny else 3):
                step()
            peak = peak_bytes(step, plan.device) if not plan.tiny else None
            steps[name] = capture([step], pool).replay if mode == "graph" else step
            row |= {"peak_bytes": peak, "trained": sum(p.numel() for group in groups for p in group["params"])}
        except Exception as error:
            row["skipped"] = explain(error, plan.device)
    for name, ms in _interleaved(plan, steps).items():
        rows[name] |= {"ms": ms, "images_per_s": 1e3 * batch / ms}
    steps = model = groups = step = None
    release(plan.device)
    return list(rows.values())


def _interleaved(plan: RunPlan, steps: dict[str, Step]) -> dict[str, float]:
    """Median milliseconds of each step, to the end of its work on the device."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    started, rounds = time.perf_counter(), 0
    least, seconds = (1, 0.0) if plan.tiny else (MIN_ROUNDS, 20 * plan.seconds)
    while steps and (rounds < least or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds)):
        rounds += 1
        for name, step in steps.items():
            synchronize(plan.device)
            before = time.perf_counter()
            step()
            synchronize(plan.device)
            times[name].append(time.perf_counter() - before)
    return {name: 1e3 * median(values) for name, values in times.items()}


def _estimated_seconds(model_name: str, batch: int, mode: str) -> float:
    """Of a unit on an H200: models are built, warmed up and timed; a compiler takes a minute for each of two."""
    operations = {"base": 17.5, "large": 61.6, "huge": 167.0}  # G multiply-adds of a forward of one image
    step = 6e9 * batch * next((value for key, value in operations.items() if key in model_name), 0.0) / 2e14
    each = 2.0 + (60.0 if mode == "compile" else 0.0) + step * (4 + MIN_ROUNDS)
    return len(IN_MODE.get(mode, IMPLEMENTATIONS)) * each + 3.0


def step_units(plan: RunPlan) -> list[Unit]:
    """One unit for each model, batch, precision and mode."""
    return [
        Unit(
            tier, "steps", f"{name}, batch {batch}, {precision}, {mode}", _estimated_seconds(name, batch, mode),
            lambda bench, n=name, b=batch, p=PRECISIONS[precision], m=mode: step_rows(plan, bench.checks, n, b, p, m),
        )
        for tier, name, batch, precision, mode in plan.models
    ]  # fmt: skip
