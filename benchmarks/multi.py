"""Layers of ViT-B under many adapters in one batch, beside one merged layer and beside PEFT, on a CPU.

    python -m benchmarks.multi             # forward: 64 samples over 64 and over 4 adapters, and one row a sample
    python -m benchmarks.multi --step      # forward and backward of 16 adapters at once, and of one on the same rows

``merged`` is ``F.linear`` with one adapter's W' on the same samples. PEFT's rivals are LoRA of rank 8 on the layer
alone, without the other layers that ``set_adapter`` goes through in a model: one sample after the other, each after
``set_adapter``, and its mixed batch, ``adapter_names``. Samples come in a random order. Whatever is compared runs in
turn in one process; a number is the median of its runs, by the clock, or with ``--cpu`` seconds of the processor (of
all threads together), in which other programs take part only through caches and clock rates. ``--out`` is a folder for
the tables and rows, ``multi_cpu*.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.hira import SECONDS, medians, write
from benchmarks.support.baselines import peft_module, peft_reason
from benchmarks.support.common import LAYER_SHAPES, markdown_table
from rlrr_kernels import TaskIndex, rlrr_linear, rlrr_linear_multi
from rlrr_kernels.reference import rescaled_weight_reference

SAMPLES = 64
BATCHES = ((197, 64), (197, 4), (1, 64))
"""Rows a sample and adapters."""

TRAINED, ROWS = 16, 197
"""Adapters and samples of a step, and rows a sample."""

FORWARD_VARIANTS = ("merged", "ours", "set_adapter", "adapter_names")
STEP_VARIANTS = ("one adapter", "16 adapters")
DTYPES = ("float32", "bfloat16")

Steps = dict[str, Callable[[], object]]


def arguments(n: int, k: int, tasks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's weight [N, K] and bias with stacks of adapters; qkv has three groups, as its adapters do."""
    torch.manual_seed(0)
    groups = 3 if n == 3 * k else 1
    return {
        "weight": (torch.randn(n, k) * k**-0.5).to(dtype),
        "scale_row": 0.1 * torch.randn(tasks, n),
        "scale_col": 0.1 * torch.randn(tasks, groups, k),
        "bias": torch.randn(n),
        "shift": torch.randn(tasks, n),
    }


def lora(layer: dict[str, Tensor], tasks: int) -> nn.Module:
    """PEFT's LoRA of rank 8 on a layer, with adapters "0", "1", …, ready to run."""
    peft = peft_module()
    n, k = layer["weight"].shape
    linear = nn.Linear(k, n).to(layer["weight"].dtype)
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(linear), config, adapter_name="0")
    for task in range(1, tasks):
        model.add_adapter(str(task), config)
    return model.to(linear.weight.dtype).eval()


def forward_steps(per_sample: int, tasks: int, n: int, k: int, dtype: torch.dtype) -> Steps:
    """Each of :data:`FORWARD_VARIANTS` on 64 samples."""
    layer = arguments(n, k, tasks, dtype)
    order = torch.randperm(SAMPLES)
    index = TaskIndex((torch.arange(SAMPLES) % tasks)[order])
    x = torch.randn(SAMPLES, per_sample, k).to(dtype)
    row, col = layer["scale_row"][0, :, None], layer["scale_col"][0, :, None]
    merged = rescaled_weight_reference(layer["weight"].float(), row, col).to(dtype)
    bias = layer["bias"].to(dtype)
    model, names = lora(layer, tasks), [str(task) for task in index.index.tolist()]

    def switching() -> None:
        for sample, name in zip(x.split(1), names, strict=True):
            model.set_adapter(name)
            model(sample)

    return {
        "merged": lambda: F.linear(x, merged, bias),
        "ours": lambda: rlrr_linear_multi(x, **layer, index=index),
        "set_adapter": switching,
        "adapter_names": lambda: model(x, adapter_names=names),
    }


def training_steps(n: int, k: int, dtype: torch.dtype) -> Steps:
    """Forward and backward of 16 samples: under one adapter, and each under its own."""
    layer = arguments(n, k, TRAINED, dtype)
    x = torch.randn(TRAINED, ROWS, k).to(dtype).requires_grad_()
    grad_y = torch.randn(TRAINED, ROWS, n).to(dtype)
    index = TaskIndex(torch.randperm(TRAINED))
    stacks = [layer[name].requires_grad_() for name in ("scale_row", "scale_col", "shift")]
    alone = [stack[0].detach().requires_grad_() for stack in stacks]

    def one() -> None:
        y = rlrr_linear(x, layer["weight"], *alone[:2], alone[2])
        torch.autograd.grad(y, (x, *alone), grad_y)

    def all_at_once() -> None:
        torch.autograd.grad(rlrr_linear_multi(x, **layer, index=index), (x, *stacks), grad_y)

    return dict(zip(STEP_VARIANTS, (one, all_at_once), strict=True))


def rows(step: bool, dtypes: list[str], seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Seconds of every variant, for each batch, dtype and layer shape of ViT-B."""
    found = []
    for per_sample, tasks in [(ROWS, TRAINED)] if step else BATCHES:
        for dtype in dtypes:
            for n, k in LAYER_SHAPES:
                kind = getattr(torch, dtype)
                steps = training_steps(n, k, kind) if step else forward_steps(per_sample, tasks, n, k, kind)
                with torch.set_grad_enabled(step):
                    times = medians(steps, lambda: None, seconds, clock=clock)
                layer = {"rows a sample": per_sample, "adapters": tasks, "dtype": dtype, "shape": [n, k]}
                found.append(layer | {"seconds": times})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Milliseconds, ours over the first variant, and PEFT's over ours."""
    first, ours, *rivals = found[0]["seconds"]
    lines = []
    for row in found:
        times = row["seconds"]
        ratios = [times[ours] / times[first], *(times[rival] / times[ours] for rival in rivals)]
        cells = [row["rows a sample"], row["adapters"], row["dtype"], "{} x {}".format(*row["shape"])]
        lines.append(
            [*cells, *(f"{1e3 * value:.2f}" for value in times.values()), *(f"{ratio:.2f}" for ratio in ratios)]
        )
    heads = ["rows a sample", "adapters", "dtype", "N x K", *(f"{name}, ms" for name in found[0]["seconds"])]
    heads += [f"{ours} over {first}", *(f"{rival} over {ours}" for rival in rivals)]
    return "\n".join(markdown_table(heads, lines))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="forward and backward of 16 adapters instead of forwards")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor instead of the clock's")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the slowest variant, for each comparison")
    parser.add_argument("--out", type=Path, help="folder for tables and rows")
    given = parser.parse_args()
    if reason := peft_reason("lora"):
        parser.error(reason)
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu else time.perf_counter
    found = rows(given.step, given.dtypes, given.seconds, clock)
    write(given.out, "multi_cpu_step" if given.step else "multi_cpu", found, table(found))


if __name__ == "__main__":
    main()
