"""The commands of ``rlrr`` that are about the paper: its data, its runs, its tables."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from rlrr_kernels.paper.ablate import AblateConfig
from rlrr_kernels.paper.reproduce import ReproduceConfig
from rlrr_kernels.train.config.options import ImageSize, Overwrite, Weights, split_names, takes_options_of
from rlrr_kernels.train.models.backbones import HUB
from rlrr_kernels.train.output.progress import command, console, say, track

data_app = typer.Typer(help="The paper's datasets: VTAB-1k and FGVC.", no_args_is_help=True)

_SHOWN = 10


Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Only these, with commas or repeated")]


@data_app.command()
def check(
    root: Annotated[Path, typer.Argument(help="Folder that holds one folder a dataset")],
    benchmark: Annotated[str | None, typer.Option(help="vtab or fgvc; default: those with a folder in ROOT")] = None,
    dataset: Datasets = None,
    images: Annotated[bool, typer.Option(help="Decode every image, a matter of minutes a dataset")] = True,
) -> None:
    """Check files, labels, split sizes and images of downloaded datasets; exit status 1 if something is wrong."""
    from rlrr_kernels.paper.check import check_dataset, datasets_to_check

    table = Table("dataset", "classes", "images by split", "verdict")
    names = list(split_names(dataset))
    broken = False
    details: list[str] = []
    for settings in datasets_to_check(root, benchmark, names):
        found = check_dataset(
            root,
            settings,
            decode=images,
            track=lambda items, total, name=settings.name: track(items, total, f"{name}: decoding images"),
        )
        if found.absent and not names:  # who named none may have fetched some
            table.add_row(settings.name, "-", "-", "absent")
            continue
        counts = ", ".join(f"{split} {count:,}" for split, count in found.counts.items())
        verdict = "[red]wrong[/red]" if found.problems else "[yellow]see below[/yellow]" if found.warnings else "good"
        table.add_row(settings.name, f"{found.classes} of {settings.classes}", counts or "-", verdict)
        broken |= bool(found.problems)
        for kind, messages in (("wrong", found.problems), ("note", found.warnings)):
            details += [f"{kind}: {message}" for message in messages[:_SHOWN]]
            if len(messages) > _SHOWN:
                details.append(f"{kind}: {settings.name}: and {len(messages) - _SHOWN} more")
    console.print(table)
    for line in details:
        say(line)
    if broken:
        raise typer.Exit(1)


@data_app.command()
def prepare(
    dataset: Annotated[list[str], typer.Argument(help="Names, as rlrr data list prints them")],
    root: Annotated[Path, typer.Option(help="Folder that gets one folder a dataset")],
    downloads: Annotated[
        Path | None, typer.Option(help="Where torchvision keeps its archives; default: ROOT/torchvision")
    ] = None,
    download: Annotated[bool, typer.Option(help="Whether torchvision may fetch them")] = True,
    seed: Annotated[int, typer.Option(help="Of the images drawn for training")] = 0,
) -> None:
    """Make datasets from torchvision's, in the same layout, where the published archives are not at hand."""
    from rlrr_kernels.paper.data import split_note
    from rlrr_kernels.paper.hyperparameters import dataset_settings
    from rlrr_kernels.paper.prepare import prepare_dataset

    for settings in [dataset_settings(name) for name in dataset]:
        folder = prepare_dataset(
            root,
            settings,
            downloads=downloads,
            download=download,
            seed=seed,
            track=lambda items, total, name=settings.name: track(items, total, f"{name}: writing images"),
        )
        note = split_note(root, settings) or "the published split"
        say(f"{folder}: {note}")


@data_app.command("list")
def list_datasets() -> None:
    """Print the paper's datasets, their settings, and which of them rlrr data prepare can make."""
    from rlrr_kernels.paper.data import augmentation
    from rlrr_kernels.paper.hyperparameters import DATASETS
    from rlrr_kernels.paper.prepare import TORCHVISION

    columns = ("dataset", "group", "classes", "lr", "wd", "drop", "augment", "prepare")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None, pad_edge=False)
    for name, settings in DATASETS.items():
        table.add_row(
            name,
            settings.group,
            str(settings.classes),
            f"{settings.lr:g}",
            f"{settings.weight_decay:g}",
            f"{settings.drop:g}",
            augmentation(settings),
            "yes" if name in TORCHVISION else "no",
        )
    console.print(table)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of rlrr reproduce, or of its results files")],
    compare: Annotated[
        str | None, typer.Option(help="Row of the paper to compare with; default: that of the same backbone")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the files go; default: FOLDER")] = None,
) -> None:
    """Make the paper's table: ours, the reported number, the difference, as Markdown, CSV and PNG."""
    from rlrr_kernels.paper.report import accuracy_text, build_report, headline, number, signed, write_report
    from rlrr_kernels.paper.results import read_results

    made = build_report(read_results(folder), compare)
    columns = ("dataset", "ours", "seeds", "reported", "difference", "note")
    table = Table(*(Column(name, no_wrap=name != "note") for name in columns), box=None, pad_edge=False)
    for row in made.rows:
        table.add_row(
            row.title,
            accuracy_text(row),
            str(row.seeds),
            number(row.reported),
            signed(row.difference),
            escape(row.note),
            style="bold" if row.is_mean else None,
        )
    for line in headline(made):
        say(line)
    console.print(table)
    for file in write_report(made, out or folder):
        say(str(file))


@takes_options_of(ReproduceConfig, arguments=("benchmark",))
def reproduce(
    config: ReproduceConfig,
    cluster: Annotated[
        str | None, typer.Option(help="Each run as a job of its own: slurm, or local (all on this machine)")
    ] = None,
    at_once: Annotated[int | None, typer.Option(help="Jobs queued or running at a time; default: all")] = None,
    job: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of a job, as submitit calls it: slurm_partition=gpu, mem_gb=32")
    ] = None,
) -> None:
    """Train every task of a benchmark by the paper's settings; the same command goes on with a stopped one.

    On several GPUs: accelerate launch -m rlrr_kernels.cli reproduce ...
    """
    from rlrr_kernels.paper.reproduce import reproduce as run

    if cluster is None:
        if at_once is not None or job:
            raise ValueError("--at-once and --job are settings of jobs; give --cluster too")
        results = run(config)
    else:
        from rlrr_kernels.train.grid.cluster import check_cluster, job_parameters, submit_grid

        parameters = job_parameters(job or ())
        check_cluster(cluster, parameters)
        results = run(config, grid=functools.partial(submit_grid, cluster=cluster, at_once=at_once, **parameters))
    done = sum(len(task.runs) for task in results.values())
    say(f"{done} runs of {len(results)} tasks are done: {config.out}")
    say(f"next: {command('report', config.out)}")


@takes_options_of(AblateConfig)
def ablate(config: AblateConfig) -> None:
    """Train the paper's ablations of RLRR and print their tables beside the paper's; goes on where it was stopped.

    Sides (left, right or both scales, with and without the residual), the start, which layers, and ΔW without ⊙ W.
    """
    from rlrr_kernels.paper.ablate import NAME, STUDIES
    from rlrr_kernels.paper.ablate import ablate as run

    say(run(config.runs(), config.out, studies=config.study or tuple(STUDIES)))
    say(str(config.out / f"{NAME}.md"))


def import_adapter(
    file: Annotated[Path, typer.Argument(help="The authors' .pth with the trained tensors of a ViT or Swin")],
    model: Annotated[str, typer.Option(help="timm's name of the backbone it was trained on")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write")],
    weights: Weights = HUB,
    image_size: ImageSize = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of the paper's, for its transform; default: timm's for the weights")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Class names, a line each, by label (FGVC: ids as the authors sort them); default: 0, 1, ..."
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="JSON {name in FILE: name the authors' code has} where they differ; * stands for a number"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make an adapter folder of a file that the authors' code saved; every tensor is accounted for, or named."""
    from rlrr_kernels.paper import authors
    from rlrr_kernels.paper.hyperparameters import dataset_settings
    from rlrr_kernels.train.config.files import read_text
    from rlrr_kernels.train.output.folder import check_target

    check_target(out, overwrite, folder=True)
    mapping = None if names is None else authors.read_names(names)
    report = authors.import_adapter(
        file,
        out,
        model=model,
        weights=weights,
        image_size=image_size,
        dataset=dataset,
        classes=None if classes is None else read_text(classes, "--classes").splitlines(),
        names=mapping,
    )
    console.print(str(report), markup=False, highlight=False)
    if classes is None and dataset is not None and dataset_settings(dataset).benchmark == "fgvc":
        say('labels: the class ids of the JSON files, sorted; as strings ("10" before "2") where they are strings')
    say(f"{out}: adapter folder, for rlrr evaluate, merge and load_adapter")


def export_adapter(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder of a ViT or Swin under the paper's recipe")],
    file: Annotated[Path, typer.Argument(help="The .pth to write, as the authors' model loads it")],
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as the authors' code saves it; one that was imported comes back tensor by tensor."""
    from rlrr_kernels.paper import authors
    from rlrr_kernels.train.output.folder import check_target

    check_target(file, overwrite, folder=False)
    written = authors.export_adapter(adapter, file)
    say(f"{file}: {len(written)} tensors")
