"""What the estimate of the scale gradients costs in accuracy and saves in time and memory, on a real fine-tuning.

    python -m benchmarks.scale_grad_rows --cache .cache --out runs/scale_grad_rows --seeds 1 2 3

DINOv2 ViT-S/14 is fine-tuned on photographs of solar cells with ``scale_grad_rows`` = 1 (exact), 1/2, 1/4 and 1/8.
Then, at the adapter of the first exact run: what a step keeps for its backward, and the noise of the gradient of all
s_r and s_c, beside that of the same rows without the images' means and of uniformly drawn rows: how much variance a
draw adds to that of the minibatch gradient, and the cosine to the exact gradient. The command goes on where it was
stopped; it writes ``scale_grad_rows.md`` and ``.json`` after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.report import SCORES
from benchmarks.evidence.runs import limited_run, result_row
from benchmarks.support.common import kept_bytes, markdown_table
from rlrr_kernels import RLRRLinear, RowSample
from rlrr_kernels.demo.backbone import TIMM_NAME
from rlrr_kernels.demo.inputs import backbone_file, elpv_folder
from rlrr_kernels.ops.sampling.row_sample import sample_rows
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, find_splits, make_loader
from rlrr_kernels.train.grid.runs import GridRun, Spread, run_grid
from rlrr_kernels.train.output.folder import ADAPTER
from rlrr_kernels.train.output.progress import console
from rlrr_kernels.train.run.config import FinetuneConfig
from rlrr_kernels.train.task import load_task
from rlrr_kernels.writing import write_together

NAME = "scale_grad_rows"

SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs and the budget of each; ``limit``: about so many images a split, a trial whose scores mean nothing."""

    cache: Path
    out: Path
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int = 5
    lr: float = 3e-3
    image_size: int = 112
    batches: int = 8
    limit: int | None = None

    def run(self, share: float, seed: int) -> GridRun:
        """The fine-tuning run of one share and seed."""
        config = FinetuneConfig(
            model=TIMM_NAME,
            weights=backbone_file(self.cache),
            data=elpv_folder(self.cache),
            out=self.out,
            image_size=self.image_size,
            lr=self.lr,
            scale_grad_rows=share,
            check=False,
            train=TrainConfig(epochs=self.epochs, warmup_epochs=min(0.5, self.epochs / 2), seed=seed),
        )
        name = f"rows-{share:g}/seed-{seed}"
        return limited_run(name, config, self.limit)

    def rows(self) -> list[dict[str, Any]]:
        """One row a finished run."""
        runs = [(share, self.run(share, seed)) for share in SHARES for seed in self.seeds]
        rows = ((share, result_row(run, self.out)) for share, run in runs)
        return [{"scale_grad_rows": share, "lr": self.lr, **row} for share, row in rows if row is not None]


# ---------------------------------------------------------------- the noise of the gradient


def scale_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradients of all s_r and s_c in one vector, in float64."""
    layers = [module for module in model.modules() if isinstance(module, RLRRLinear)]
    scales = [scale for layer in layers for scale in (layer.scale_row, layer.scale_col)]
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), scales)
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def uniform_rows(share: float, x: Tensor) -> RowSample:
    """A share of all rows of x [..., K], whatever their image and place in it."""
    rows = x.numel() // x.shape[-1]
    size = max(1, round(share * rows))
    return RowSample(torch.randperm(rows, device=x.device)[:size], 0, rows / size)


def plain_rows(share: float, prefix: int, x: Tensor) -> RowSample | None:
    """The layer's own draw, each of its rows with the same weight and nothing else."""
    sample = sample_rows(x.shape, share, prefix, x.device)
    if sample is None or not sample.images:
        return sample
    rows = math.prod(x.shape[:-1])
    return sample._replace(weight=(rows - sample.kept) / (len(sample.index) - sample.kept), images=0)


SCHEMES = {"images' means": "", "without means": "without means: ", "uniform": "of uniform rows: "}
"""How rows are drawn and used, the layer's own way first; what the report's columns call it."""


def gradient_noise(study: Study) -> list[dict[str, Any]]:
    """By share and scheme: bytes kept, variance added to the minibatch gradient's own relative to it, mean cosine."""
    run = study.run(1.0, study.seeds[0])
    model, task = load_task(study.out / run.name / ADAPTER, backbone_file(study.cache))
    layers = [module for module in model.modules() if isinstance(module, RLRRLinear)]
    splits = run.splits() if run.splits else find_splits(run.config.data)
    torch.manual_seed(0)
    shuffled = splits["train"].subset(torch.randperm(len(splits["train"])).tolist())
    loader = make_loader(ImageDataset(shuffled, task.preprocessing.transform()), run.config.train.batch_size)
    batches = [batch for batch, _ in zip(loader, range(study.batches), strict=False)]
    if len(batches) < 2:
        raise ValueError(f"the noise of a minibatch needs two of them; {len(shuffled)} training images make one")
    model.train()
    exact = [scale_gradient(model, *batch) for batch in batches]
    exact_bytes = kept_bytes(lambda: model(batches[0][0]), list(model.parameters()))
    mean = torch.stack(exact).mean(0)
    variance = sum((gradient - mean).square().sum().item() for gradient in exact) / (len(exact) - 1)
    rows = []
    for scheme in SCHEMES:
        for share in SHARES[1:]:
            for layer in layers:
                layer.scale_grad_rows = share
                if scheme == "uniform":
                    layer._draw_rows = partial(uniform_rows, share)
                elif scheme == "without means":
                    layer._draw_rows = partial(plain_rows, share, layer.prefix_tokens)
            estimates = [scale_gradient(model, *batch) for batch in batches]
            pairs = list(zip(estimates, exact, strict=True))
            added = sum((ours - theirs).square().sum().item() for ours, theirs in pairs) / len(pairs)
            cosine = sum(F.cosine_similarity(ours, theirs, dim=0).item() for ours, theirs in pairs) / len(pairs)
            rows.append(
                {
                    "scheme": scheme, "scale_grad_rows": share, "added_variance": added / variance, "cosine": cosine,
                    "kept_bytes": kept_bytes(lambda: model(batches[0][0]), list(model.parameters())),
                    "kept_bytes_exact": exact_bytes, "batches": len(batches),
                    "batch_size": run.config.train.batch_size,
                }
            )  # fmt: skip
    return rows


# ---------------------------------------------------------------- the report


def markdown(study: Study, rows: list[dict[str, Any]], noise: list[dict[str, Any]]) -> str:
    """The tables."""
    lines, table = [], []
    for share in SHARES:
        here = [row for row in rows if row["scale_grad_rows"] == share]
        if here:
            scores = [str(Spread.of(row[key] for row in here)) for key in SCORES]
            seconds = Spread.of(row["seconds"] for row in here).mean
            table.append(["1 (exact)" if share == 1 else f"{share:g}", len(here), *scores, f"{seconds:.0f} s"])
    if rows:
        first = rows[0]
        count, accuracy = first["test_images"], first["test_accuracy"]
        lines += [
            f"DINOv2 ViT-S/14 on solar cells, {study.image_size} px, {first['epochs']} epochs, learning rate "
            f"{study.lr:g}, precision {first['precision']}, {first['cpu']}. Mean and standard deviation over seeds; "
            f"the standard error of one accuracy from its {count} test images alone is "
            f"{math.sqrt(accuracy * (1 - accuracy) / count):.3f}. The epoch is chosen on validation images. "
            "The time is of one run, on a machine that had other work too.",
            "",
            *(["**A trial on few images: its scores mean nothing.**", ""] if first["trial"] else []),
        ]
        heads = ["scale_grad_rows", "seeds", "val. accuracy", "test accuracy", "test macro-F1", "time"]
        lines += markdown_table(heads, table)
    if noise:
        lines += [
            f"Noise of the gradient of all s_r and s_c, {noise[0]['batches']} minibatches of {noise[0]['batch_size']}: "
            "variance that the draw adds, over the minibatch gradient's own, and cosine to the exact gradient. A step "
            f"in float32 keeps {noise[0]['kept_bytes_exact'] / 2**20:.0f} MiB for its backward with exact gradients.",
            "",
        ]
        table = []
        for share in SHARES[1:]:
            here = {row["scheme"]: row for row in noise if row["scale_grad_rows"] == share}
            kept = f"{next(iter(here.values()))['kept_bytes'] / 2**20:.0f} MiB"
            pairs = ((f"{here[name]['added_variance']:.2f}", f"{here[name]['cosine']:.3f}") for name in SCHEMES)
            table.append([f"{share:g}", kept, *(cell for pair in pairs for cell in pair)])
        heads = [head for name in SCHEMES.values() for head in (f"{name}added variance", "cosine")]
        lines += markdown_table(["scale_grad_rows", "kept", *heads], table)
    return "\n".join(lines)


def write_report(study: Study, folder: Path, noise: list[dict[str, Any]]) -> str:
    """Writes the tables and all rows to ``folder``; returns the tables."""
    rows = study.rows()
    text = markdown(study, rows, noise)
    document = json.dumps({"runs": rows, "noise": noise}, indent=1)
    write_together(folder, {f"{NAME}.md": text.encode(), f"{NAME}.json": document.encode()})
    return text


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where backbone and images are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/scale_grad_rows"), help="where the runs are kept")
    parser.add_argument("--report", type=Path, help="where the report goes (default: OUT)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--image-size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--batches", type=int, default=8, help="minibatches for the noise, at least 2")
    parser.add_argument("--limit", type=int, help="about so many images a split: a trial, its scores mean nothing")
    parser.add_argument("--noise-only", action="store_true", help="no more training than the noise needs")
    arguments = vars(parser.parse_args())
    report, noise_only = arguments.pop("report"), arguments.pop("noise_only")
    if arguments["batches"] < 2:
        parser.error(f"--batches must be at least 2; got {arguments['batches']}")
    arguments["seeds"] = tuple(dict.fromkeys(arguments["seeds"]))
    study = Study(**arguments)
    report = report or study.out
    report.mkdir(parents=True, exist_ok=True)
    runs = [study.run(share, seed) for seed in study.seeds for share in SHARES]  # every share once, then again
    noise: list[dict[str, Any]] = []
    try:
        for run in runs[:1] if noise_only else runs:
            run_grid([run], study.out, keep_checkpoints=False)
            noise = noise or gradient_noise(study)
            write_report(study, report, noise)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
    console.print(write_report(study, report, noise), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
