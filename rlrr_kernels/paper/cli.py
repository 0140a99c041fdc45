"""The commands of ``rlrr`` that are about the paper: its data, its runs, its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from rlrr_kernels.train.progress import console, track

data_app = typer.Typer(help="The paper's datasets: VTAB-1k and FGVC.", no_args_is_help=True)

_SHOWN = 10

Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Only this one; may be repeated")]


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
    broken = False
    details: list[str] = []
    for settings in datasets_to_check(root, benchmark, dataset):
        found = check_dataset(
            root,
            settings,
            decode=images,
            track=lambda items, total, name=settings.name: track(items, total, f"{name}: decoding images"),
        )
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
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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
    from rlrr_kernels.paper.prepare import prepare_dataset
    from rlrr_kernels.paper.settings import dataset_settings

    for settings in [dataset_settings(name) for name in dataset]:
        folder = prepare_dataset(
            root,
            settings,
            downloads=downloads,
            download=download,
            seed=seed,
            track=lambda items, total, name=settings.name: track(items, total, f"{name}: writing images"),
        )
        console.print(f"{folder}: {split_note(root, settings) or 'the published split'}", highlight=False)


@data_app.command("list")
def list_datasets() -> None:
    """Print the paper's datasets, their settings, and which of them torchvision has."""
    from rlrr_kernels.paper.data import augmentation
    from rlrr_kernels.paper.prepare import TORCHVISION
    from rlrr_kernels.paper.settings import DATASETS

    table = Table(Column("dataset", no_wrap=True), "group", "classes", "lr", "wd", "drop", "augment", "torchvision")
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
    table = Table("group", "dataset", "ours", "seeds", "reported", "difference", "note")
    for row in made.rows:
        table.add_row(
            row.group,
            row.title,
            accuracy_text(row),
            str(row.seeds),
            number(row.reported),
            signed(row.difference),
            row.note,
            style="bold" if row.is_mean else None,
        )
    for line in headline(made):
        console.print(line, markup=False, highlight=False)
    console.print(table)
    for file in write_report(made, out or folder):
        console.print(str(file), highlight=False)
