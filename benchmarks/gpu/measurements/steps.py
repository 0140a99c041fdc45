"""Whole training steps of a ViT: forward, loss, backward and optimizer, eager, compiled and as one CUDA graph."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Step, peak_bytes, synchronize
from benchmarks.gpu.correctness.check import Gate
from benchmarks.gpu.measurements.baselines import PEFT, peft_config, peft_module, peft_reason
from benchmarks.gpu.measurements.estimates import ESTIMATES
from benchmarks.gpu.measurements.timing import MAX_ROUNDS, MIN_ROUNDS, capture, explain, release
from benchmarks.gpu.plan import PRECISIONS, Plan, Precision
from benchmarks.gpu.session.work import Row, Unit, announce
from rlrr_kernels import (
    NormRescale,
    RLRRConfig,
    RLRRLinear,
    adapt_model,
    parameter_groups,
    recompute_activations,
)
from rlrr_kernels.reference import norm_rescale_reference, rlrr_linear_reference

OURS = ("auto", "recompute")
"""``recompute``: with :func:`rlrr_kernels.recompute_activations`, which saves memory for a little time."""

RIVALS = (*OURS, "reference", "hira", "lora")
COMPILED = ("auto", "reference")
"""Those that are timed under torch.compile too, which takes a minute each."""
RECOMPUTED_ESTIMATE = "rows 1/4, recompute"
"""The least memory: an estimate with :func:`rlrr_kernels.recompute_activations`."""

ESTIMATED = (*OURS, *ESTIMATES, RECOMPUTED_ESTIMATE, "lora")
"""The estimates of the scale gradients, eager, between the exact ones and LoRA."""

_KERNELS_OF = {"recompute": "auto", RECOMPUTED_ESTIMATE: "rows 1/4"}
"""Which rival's kernels one that recomputes runs."""

PEFT_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


class ReferenceLinear(RLRRLinear):
    """The layer by the literal formula, as eager PyTorch computes it."""

    def forward(self, x: Tensor) -> Tensor:
        row, col = self.scale_row, self.scale_col
        if self.rank == 1:  # the paper's vectors, which eager computes without a matrix product
            row, col = row[:, 0], col[:, 0]
            col = col[0] if self.groups == 1 else col
        return rlrr_linear_reference(x, self.weight, row, col, self._total_bias(), residual=self.residual)


class ReferenceNorm(NormRescale):
    """LayerNorm, then scale and shift, as eager PyTorch computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_rescale_reference(x, self.weight, self.bias, self.scale, self.shift, self.eps)


def use_reference(model: nn.Module) -> None:
    """Makes every adapted layer of ``model`` compute the literal formula; parameters and names stay."""
    for module in model.modules():
        if type(module) is RLRRLinear:
            module.__class__ = ReferenceLinear
        elif type(module) is NormRescale:
            module.__class__ = ReferenceNorm


def build_model(plan: Plan, rival: str, name: str, precision: Precision) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and its optimizer's groups. Trained beside the adapter is the head, whatever the method.

    A 16-bit reference has 16-bit scales, its cheapest form: fp32 ones would make every product fp32.
    """
    torch.manual_seed(0)
    with torch.device(plan.device):  # drawing a large model on the host takes many seconds
        model = plan.build(name).to(precision.weight_dtype)
    kernels = _KERNELS_OF.get(rival, rival)
    if kernels in ("auto", "reference", *ESTIMATES):
        adapt_model(model, RLRRConfig(recipe="paper", scale_grad_rows=ESTIMATES.get(kernels, 1.0)))
        if rival in _KERNELS_OF:
            recompute_activations(model)
        if rival == "reference":
            use_reference(model)
            model.to(precision.weight_dtype)
        return model.train(), parameter_groups(model, lr=1e-4, weight_decay=5e-5)
    wrapped = peft_module().get_peft_model(model, peft_config(rival, PEFT_TARGETS), autocast_adapter_dtype=False)
    model.get_classifier().requires_grad_(True)
    return wrapped.train(), [{"params": [p for p in wrapped.parameters() if p.requires_grad]}]


def training_step(
    plan: Plan, model: nn.Module, groups: list[dict[str, Any]], batch: int, precision: Precision, compiled: bool
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


def _gate_names(rival: str) -> list[str]:
    """What the gate must have passed before ``rival`` may be timed; the last is what it is called there."""
    kernels = _KERNELS_OF.get(rival, rival)
    names = ["model"] if kernels in ("auto", *ESTIMATES) else [rival]
    names += [kernels] if kernels in ESTIMATES else []
    return names + (["recompute"] if rival in _KERNELS_OF else [])


def step_rows(plan: Plan, gate: Gate, name: str, batch: int, precision: Precision, mode: str) -> list[Row]:
    """Every rival on one model, steps interleaved. ``mode``: ``eager``, ``graph``, ``compile`` or ``estimate``."""
    rivals = {"compile": COMPILED, "estimate": ESTIMATED}.get(mode, RIVALS)
    if mode == "compile":
        torch._dynamo.reset()
    pool = torch.cuda.graph_pool_handle() if mode == "graph" else None  # shared: a step reads no other's results
    skipped, steps, peaks, trained = {}, {}, {}, {}
    for rival in rivals:
        found = (None if plan.tiny else gate.reason_against(checked, precision) for checked in _gate_names(rival))
        reason = next(filter(None, found), None) or (peft_reason(rival) if rival in PEFT else None)
        if reason:
            skipped[rival] = reason
            continue
        announce(_gate_names(rival)[-1], precision.name, model=name, batch=batch, mode=mode)
        try:
            model, groups = build_model(plan, rival, name, precision)
            trained[rival] = sum(p.numel() for group in groups for p in group["params"])
            step = training_step(plan, model, groups, batch, precision, mode == "compile")
            for _ in range(1 if plan.tiny else 3):
                step()
            peaks[rival] = peak_bytes(step, plan.device) if not plan.tiny else None
            steps[rival] = capture([step], pool).replay if mode == "graph" else step
        except Exception as error:
            skipped[rival] = explain(error, plan.device)
            steps.pop(rival, None)
    times = _interleaved(plan, steps)
    steps = model = groups = step = None
    release(plan.device)
    head = {"section": "steps", "model": name, "batch": batch, "precision": precision.name, "mode": mode}
    return [
        {**head, "rival": rival, "skipped": skipped[rival]}
        if rival in skipped
        else {
            **head, "rival": rival, "ms": times[rival], "images_per_s": 1e3 * batch / times[rival],
            "peak_bytes": peaks[rival], "trained": trained[rival],
        }
        for rival in rivals
    ]  # fmt: skip


def _interleaved(plan: Plan, steps: dict[str, Step]) -> dict[str, float]:
    """Median milliseconds of each step, to the end of its work on the device."""
    times: dict[str, list[float]] = {rival: [] for rival in steps}
    started, rounds = time.perf_counter(), 0
    least, seconds = (1, 0.0) if plan.tiny else (MIN_ROUNDS, 20 * plan.seconds)
    while steps and (rounds < least or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds)):
        rounds += 1
        for rival, step in steps.items():
            synchronize(plan.device)
            before = time.perf_counter()
            step()
            synchronize(plan.device)
            times[rival].append(time.perf_counter() - before)
    return {rival: 1e3 * median(values) for rival, values in times.items()}


def _estimated_seconds(name: str, batch: int, mode: str) -> float:
    """Of a unit on an H200: models are built, warmed up and timed; a compiler takes a minute for each of two rivals."""
    operations = {"base": 17.5, "large": 61.6, "huge": 167.0}  # G multiply-adds of a forward of one image
    step = 6e9 * batch * next((value for key, value in operations.items() if key in name), 0.0) / 2e14
    rivals = len({"compile": COMPILED, "estimate": ESTIMATED}.get(mode, RIVALS))
    return rivals * (2.0 + (60.0 if mode == "compile" else 0.0) + step * (4 + MIN_ROUNDS)) + 3.0


def step_units(plan: Plan) -> list[Unit]:
    """One unit for each model, batch, precision and mode."""
    return [
        Unit(
            tier, "steps", f"{name}, batch {batch}, {precision}, {mode}", _estimated_seconds(name, batch, mode),
            lambda bench, n=name, b=batch, p=PRECISIONS[precision], m=mode: step_rows(plan, bench.gate, n, b, p, m),
        )
        for tier, name, batch, precision, mode in plan.models
    ]  # fmt: skip
