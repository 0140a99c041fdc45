"""PEFT's HiRA beside the same layers by our operator, on one thread of a CPU: layers, a step of ViT-B, a picture.

    python -m benchmarks.hira              # a layer's forward and backward: rows, ranks, dtypes, worst of four shapes
    python -m benchmarks.hira --step       # a step of ViT-B on two images, and what it keeps, beside LoRA
    python -m benchmarks.hira --picture    # time and memory of methods on a ViT-S and a BERT-sized model, drawn

Whatever is compared runs in turn in one process, and a number is the median of its runs: seconds of the processor, not
of the clock, so that other programs take part only through caches and clock rates. ``--out`` is a folder for the tables
and rows, ``hira_cpu*.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.baselines import PEFT_TARGETS, peft_module, peft_reason
from benchmarks.support.common import LAYER_SHAPES, environment, kept_bytes, markdown_table, peak_bytes
from benchmarks.support.plain_hira import HiraFunction
from rlrr_kernels import RLRRConfig, adapt_model

ROWS, RANKS, DTYPES = (16, 197, 1576), (1, 8, 32), ("float32", "bfloat16")
SECONDS = 2.0
"""Of the slowest variant, for each comparison."""

LAYER_VARIANTS = ("peft", "ours", "plain torch", "lora, r = 8")
STEP_VARIANTS = ("lora", "hira", "hira, ours")
PICTURE_VARIANTS = ("LoRA", "DoRA", "IA³", "HiRA", "HiRA, accelerated", "RLRR")
BERT_TARGETS = r".*\.(query|key|value|dense)"


def medians(
    steps: dict[str, Callable[[], object]], clear: Callable[[], object], seconds: float = SECONDS, least: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each step; they run in turn, ``least`` times or until the slowest has used ``seconds``.

    ``clear`` runs before each, untimed; Python's garbage collector waits. Seconds are the processor's unless ``clock``
    is another one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    gc.disable()
    try:
        while len(next(iter(times.values()))) < least or max(map(sum, times.values())) < seconds:
            for name, step in steps.items():
                clear()
                start = clock()
                step()
                times[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def _random_start(model: nn.Module) -> nn.Module:
    """The adapters away from zero: products with zeros can run faster than real ones."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("hira_" in name or "lora_" in name):
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def _accelerated(model: nn.Module) -> nn.Module:
    from rlrr_kernels.peft import accelerate_hira

    report = accelerate_hira(model)
    if report.kept:
        raise RuntimeError(str(report))
    return model


def layer_times(
    rows: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    """CPU seconds of forward and backward of a layer with W [N, K], for each of :data:`LAYER_VARIANTS`."""
    peft = peft_module()
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features).to(dtype)

    def adapted(config: Any) -> nn.Module:
        return _random_start(peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)).base_model.model[0]

    hira = adapted(peft.HiraConfig(r=rank, target_modules=["0"]))
    lora = adapted(peft.LoraConfig(r=8, target_modules=["0"]))
    ours = _accelerated(copy.deepcopy(hira))
    base, (B, A) = linear.requires_grad_(False), (copy.deepcopy(t["default"]) for t in (hira.hira_B, hira.hira_A))
    x = torch.randn(rows, in_features, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(rows, out_features, dtype=dtype)
    functions = {
        "peft": hira, "ours": ours, "lora, r = 8": lora,
        "plain torch": lambda x: HiraFunction.apply(x, base.weight, B, A, base.bias),
    }  # fmt: skip
    trained = [x, B, A, *hira.parameters(), *ours.parameters(), *lora.parameters()]

    def clear() -> None:
        for tensor in trained:
            tensor.grad = None

    steps = {name: lambda f=functions[name]: f(x).backward(grad_y) for name in LAYER_VARIANTS}
    return medians(steps, clear, seconds)


def layer_rows(
    rows: Iterable[int], ranks: Iterable[int], dtypes: Iterable[str], seconds: float
) -> list[dict[str, Any]]:
    """CPU seconds of every variant, for each number of rows, rank, dtype and layer shape of ViT-B."""
    ranks, found = tuple(ranks), []
    for dtype in dtypes:
        for m in rows:
            for rank in ranks:
                for n, k in LAYER_SHAPES:
                    times = layer_times(m, n, k, rank, getattr(torch, dtype), seconds)
                    found.append({"dtype": dtype, "rows": m, "rank": rank, "shape": [n, k], "seconds": times})
    return found


def layer_table(found: list[dict[str, Any]]) -> str:
    """PEFT's time over ours, in the worst shape: what it is, and that of the plain torch function."""
    lines = []
    for dtype, m, rank in dict.fromkeys((row["dtype"], row["rows"], row["rank"]) for row in found):
        times = [r["seconds"] for r in found if (r["dtype"], r["rows"], r["rank"]) == (dtype, m, rank)]
        ratio = {name: min(t["peft"] / t[name] for t in times) for name in ("ours", "plain torch")}
        total = {name: 1e3 * sum(t[name] for t in times) for name in LAYER_VARIANTS}
        operations = (10 * m + 6 * rank) / (6 * m + 8 * rank)
        cells = [f"{ratio['ours']:.2f}", f"{operations:.2f}", f"{ratio['plain torch']:.2f}"]
        lines.append([dtype, m, rank, *cells, *(f"{total[name]:.1f}" for name in LAYER_VARIANTS)])
    heads = ["dtype", "rows", "r", "PEFT over ours", "by operations", "PEFT over plain torch"]
    return "\n".join(markdown_table([*heads, *(f"{name}, ms" for name in LAYER_VARIANTS)], lines))


# ---------------------------------------------------------------- whole models


def build(name: str) -> nn.Module:
    """A model without pretrained weights: one of timm's, or ``bert``, the shape of BERT base with 6 layers."""
    torch.manual_seed(0)
    if name != "bert":
        import timm

        return timm.create_model(name, num_classes=10)
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=6, attn_implementation="sdpa"), add_pooling_layer=False)


def adapt(model: nn.Module, method: str, targets: str, rank: int) -> nn.Module:
    """``model`` under a method of :data:`STEP_VARIANTS` or :data:`PICTURE_VARIANTS`."""
    peft = peft_module()
    method = method.lower().replace("accelerated", "ours")
    if method == "rlrr":
        adapt_model(model, RLRRConfig(heads=(), exclude=("head",)))
        return model.train()
    if method == "ia³":
        fc2 = r".*(mlp\.fc2|output\.dense)"
        config = peft.IA3Config(target_modules=targets, feedforward_modules=fc2)
    elif method.startswith("hira"):
        config = peft.HiraConfig(r=rank, target_modules=targets)
    else:
        config = peft.LoraConfig(r=rank, target_modules=targets, use_dora=method == "dora")
    model = _random_start(peft.get_peft_model(model, config))
    return _accelerated(model) if method.endswith("ours") else model


def model_rows(
    name: str, methods: Iterable[str], batch: int, rank: int, dtype: torch.dtype, seconds: float
) -> list[dict]:
    """A step's CPU seconds (forward and backward), the bytes it keeps and its peak, for each method."""
    targets = BERT_TARGETS if name == "bert" else PEFT_TARGETS
    models = {method: adapt(build(name), method, targets, rank).to(dtype) for method in methods}
    if name == "bert":
        x = torch.randint(30522, (batch, 128))
    else:
        x = torch.randn(batch, *build(name).default_cfg["input_size"], dtype=dtype)

    def forward(model: nn.Module) -> Tensor:
        y = model(x)
        return (y if isinstance(y, Tensor) else y.last_hidden_state).float().square().mean()

    def clear() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    steps = {method: lambda m=model: forward(m).backward() for method, model in models.items()}
    times = medians(steps, clear, seconds)
    rows = []
    for method, model in models.items():
        given = [x, *model.parameters(), *model.buffers()]
        kept = kept_bytes(lambda model=model: forward(model), given)
        row = {"model": name, "batch": batch, "rank": rank, "method": method, "seconds": times[method]}
        rows.append(row | {"kept": kept, "peak": peak_bytes(steps[method])})
    return rows


def model_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of each method, and both over LoRA's."""
    first = {row["model"]: row for row in reversed(rows) if row["method"].lower() == "lora"}
    lines = []
    for row in rows:
        lora = first[row["model"]]
        cells = [f"{row['seconds'] * 1e3:.0f} ms", f"{row['seconds'] / lora['seconds']:.2f}"]
        cells += [f"{row[key] / 2**20:.0f} MiB" for key in ("kept", "peak")]
        lines.append([row["model"], row["batch"], row["method"], *cells])
    return "\n".join(markdown_table(["model", "batch", "method", "step", "of LoRA's", "kept", "peak"], lines))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time and kept memory, a row for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"vit_small_patch16_224": "ViT-S", "bert": "BERT base, 6 layers"}
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, all_axes = plt.subplots(len(names), 2, figsize=(9, 2.6 * len(names)), squeeze=False)
    for axes_of_model, name in zip(all_axes, names, strict=True):
        of_model = [row for row in rows if row["model"] == name]
        for axes, key, unit, scale in zip(
            axes_of_model, ("seconds", "kept"), ("ms", "MiB"), (1e3, 2**-20), strict=True
        ):
            values = [row[key] * scale for row in of_model]
            colours = [
                "#d9730d" if "accel" in row["method"] or row["method"] == "RLRR" else "#9aa5b1" for row in of_model
            ]
            bars = axes.barh([row["method"] for row in of_model], values, color=colours)
            axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=3, fontsize=8)
            what = "time of a step" if key == "seconds" else "kept for its backward"
            axes.set_title(f"{titles.get(name, name)}: {what}, {unit}", fontsize=9, loc="left")
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def versions() -> str:
    """Where the numbers come from, as a sentence."""
    found = environment()
    plural = "s" * (found["threads"] != 1)
    return (
        f"{found['cpu']}, {found['threads']} thread{plural}, torch {found['torch']}, PEFT {peft_module().__version__}, "
        f"commit {found['commit']}."
    )


def write(out: Path | None, name: str, rows: list[dict[str, Any]], table: str) -> None:
    """Prints the table; with a folder, leaves it and the rows there."""
    text = f"{versions()}\n\n{table}\n"
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        document = {"environment": environment() | {"peft": peft_module().__version__}, "rows": rows}
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="a whole step of ViT-B instead of layers")
    parser.add_argument("--picture", action="store_true", help="methods on two models, drawn, instead of layers")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of x, for layers")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="for layers")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="of layers")
    parser.add_argument(
        "--models", nargs="+", help="timm's names, or bert (default: ViT-B; for --picture ViT-S and bert)"
    )
    parser.add_argument("--batch", type=int, help="of whole models (default: 2; for --picture 4)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA, DoRA and HiRA in whole models")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the slowest variant, for each comparison")
    parser.add_argument("--out", type=Path, help="folder for tables and rows")
    arguments = parser.parse_args()
    reason = peft_reason("hira")
    if reason:
        parser.error(reason)
    torch.set_num_threads(1)
    if not (arguments.step or arguments.picture):
        found = layer_rows(arguments.rows, arguments.ranks, arguments.dtypes, arguments.seconds)
        return write(arguments.out, "hira_cpu", found, layer_table(found))
    methods = PICTURE_VARIANTS if arguments.picture else STEP_VARIANTS
    names = arguments.models or (["vit_small_patch16_224", "bert"] if arguments.picture else ["vit_base_patch16_224"])
    batch = arguments.batch or (4 if arguments.picture else 2)
    rows = [
        row
        for name in names
        for row in model_rows(name, methods, batch, arguments.rank, torch.float32, arguments.seconds)
    ]
    write(arguments.out, "hira_cpu_methods" if arguments.picture else "hira_cpu_step", rows, model_table(rows))
    if arguments.picture and arguments.out is not None:
        draw(rows, arguments.out / "hira_cpu_methods.png")


if __name__ == "__main__":
    main()
