"""The command-line program ``rlrr``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the program rlrr needs the package {error.name}; install it with rlrr-kernels[train]") from error

from rlrr_kernels.paper.cli import ablate, data_app, export_adapter, import_adapter, report, reproduce
from rlrr_kernels.serve.config import ServeConfig
from rlrr_kernels.train.config.options import Cpu, ImageSize, Overwrite, Weights, takes_options_of
from rlrr_kernels.train.models.backbones import HUB
from rlrr_kernels.train.output.progress import command, console, error_console, say
from rlrr_kernels.train.run.config import FinetuneConfig

app = typer.Typer(
    help="Fine-tune frozen networks by residual low-rank rescaling (RLRR).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AdapterWeights = Annotated[
    str | None, typer.Option(help="File with the backbone's weights, where the adapter was not trained on a hub's")
]
AdapterFolder = Annotated[Path, typer.Argument(help="Adapter folder, as rlrr finetune or save_adapter wrote it")]
BatchSize = Annotated[int, typer.Option(help="Images a step")]


def _print_version(asked: bool) -> None:
    if asked:
        from rlrr_kernels.version import __version__

        typer.echo(f"rlrr-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
@takes_options_of(FinetuneConfig, required=("data",), config_file=True)
def finetune(
    config: FinetuneConfig,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out was stopped, if it was")
    ] = False,
) -> None:
    """Fine-tune a timm model on a folder of images; keep the epoch that is best on the validation images.

    On several GPUs: accelerate launch -m rlrr_kernels.cli finetune ...
    """
    from rlrr_kernels.train.finetune import finetune as run
    from rlrr_kernels.train.output.folder import CURVE

    result = run(config, resume=resume)
    table = Table("images", "accuracy", "macro-F1", "loss")
    shown = {"validation": result.fit.best, "test": result.test}
    if config.epoch_chosen_on == "test":
        del shown["validation"]
    for name, scores in shown.items():
        if scores is not None:
            table.add_row(name, f"{scores.accuracy:.4f}", f"{scores.macro_f1:.4f}", f"{scores.loss:.4f}")
    console.print(table)
    say(
        f"epoch {result.fit.best_epoch} of {config.train.epochs}, chosen on the {config.epoch_chosen_on} images; "
        f"{result.fit.seconds:.0f} s, peak memory {result.fit.peak_memory / 2**30:.2f} GiB\n"
        f"learning curve: {config.out / CURVE}\nadapter: {result.adapter}"
    )
    if result.fit.exchanged is not None:
        say(
            f"exchanged a step: {result.fit.exchanged['gradients']:,} bytes of gradients, of {result.report.trained:,} "
            f"trained parameters; {result.fit.exchanged['weights']:,} bytes of weights"
        )
    hint = ("--weights", config.weights) if result.task.weights not in ("hub", "none") else ()
    say(f"next: {command('merge', result.adapter, *hint)}")


def _take_shared(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the settings that a file of tasks has for all of them the defaults of the options."""
    if file is not None:
        from rlrr_kernels.train.many.tasks import read_tasks

        context.default_map = read_tasks(file)[0]
    return file


@app.command()
@takes_options_of(FinetuneConfig, without=("data", "out"), plain=True)
def finetune_many(
    settings: dict[str, Any],
    task: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER, or NAME=FOLDER,lr=1e-3,epochs=50 for settings of its own; repeat for each"),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            callback=_take_shared,
            is_eager=True,
            help="TOML file: settings for all tasks, and a table tasks.NAME with data and own settings for each",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets the run folder of each task, OUT/NAME")] = Path(
        "runs/many"
    ),
    largest_batch: Annotated[
        int, typer.Option(help="Most images that a forward pass takes, of all tasks together; less takes less memory")
    ] = 128,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the tasks in --out were stopped, if they were")
    ] = False,
) -> None:
    """Fine-tune one adapter a dataset, side by side over one frozen backbone.

    The other options are those of rlrr finetune, for all tasks that do not set their own.
    """
    from rlrr_kernels.train.many.run import finetune_many as run
    from rlrr_kernels.train.many.tasks import configs_of, parse_task, read_tasks

    listed = [] if tasks is None else [*read_tasks(tasks)[1].items()]
    configs = configs_of(settings | {"out": out}, [*listed, *map(parse_task, task or ())])
    results = run(configs, largest_batch=largest_batch, resume=resume)
    _show_tasks(results)
    weights = settings["weights"]
    say(f"next: {command('serve', '--adapters', out, *(('--weights', weights) if Path(weights).is_file() else ()))}")


def _show_tasks(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the scores in the result documents of several tasks."""
    table = Table("task", "epoch", "images", "accuracy", "macro-F1", "loss")
    for name, result in results.items():
        epoch = f"{result['epoch']} of {len(result['history'])}"
        for images in ("validation", "test"):
            scores = result[images]
            if scores is not None:
                cells = (f"{scores[key]:.4f}" for key in ("accuracy", "macro_f1", "loss"))
                table.add_row(escape(name), epoch, images, *cells)
    console.print(table)


@app.command()
def evaluate(
    adapter: AdapterFolder,
    data: Annotated[Path, typer.Option(help="FOLDER/<class>/<image> or FOLDER/test/<class>/<image>")],
    split: Annotated[str | None, typer.Option(help="Folder in DATA; default: test where there is one")] = None,
    weights: AdapterWeights = None,
    batch_size: BatchSize = 64,
    image_size: Annotated[int | None, typer.Option(help="Pixels; default: what the adapter was trained at")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file")] = None,
    cpu: Cpu = False,
) -> None:
    """Score an adapter on a folder of images."""
    from collections import Counter

    from rlrr_kernels.train.config.train_config import TrainConfig
    from rlrr_kernels.train.data.folders import ImageDataset, check_images, find_samples, make_loader, scored_folder
    from rlrr_kernels.train.evaluate import evaluate as score
    from rlrr_kernels.train.loop.distributed import make_accelerator
    from rlrr_kernels.train.models.attention import fastest_attention
    from rlrr_kernels.train.output.folder import check_target
    from rlrr_kernels.train.output.progress import track
    from rlrr_kernels.train.task import Task, load_task
    from rlrr_kernels.writing import write_together

    config = TrainConfig(batch_size=batch_size)
    if json_file is not None:
        check_target(json_file, True, folder=False)
    task = Task.of_adapter(adapter)
    folder = scored_folder(data, split)
    samples = find_samples(folder, task.classes)
    model, task = load_task(adapter, weights, image_size=image_size)
    check_images(samples.paths, lambda items, total: track(items, total, "checking images"))  # last: may take minutes
    accelerator = make_accelerator(config, cpu=cpu)
    with fastest_attention(model, accelerator, task.preprocessing.image_size):
        model, loader = accelerator.prepare(
            model, make_loader(ImageDataset(samples, task.preprocessing.transform()), batch_size)
        )
        scores = score(
            model, loader, len(task.classes), accelerator, lambda items: track(items, len(loader), "scoring")
        )
    table, counts = Table("class", "images", "recognised"), Counter(samples.labels)
    for label, name in enumerate(task.classes):
        recall = scores.recall[label]
        table.add_row(escape(name), str(counts[label]), "-" if recall is None else f"{recall:.4f}")
    console.print(table)
    say(
        f"{folder}: accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, loss {scores.loss:.4f}, "
        f"{scores.count} images"
    )
    if json_file is not None:
        text = json.dumps(dataclasses.asdict(scores), indent=2) + "\n"
        write_together(json_file.parent, {json_file.name: text.encode()})


@app.command()
@takes_options_of(ServeConfig, required=("adapters",))
def serve(config: ServeConfig) -> None:
    """Classify images over HTTP with many adapters of one backbone, which share its forward passes.

    POST /v1/classify?adapter=NAME with an image file as the body; / is a page to try it, /docs describes the rest.
    """
    _server()(config)


def _server() -> Callable[[ServeConfig], None]:
    """What serves; raises ``ImportError`` where a package is missing, and says which."""
    try:
        from rlrr_kernels.serve.run import serve as run
    except ImportError as error:
        raise ImportError(f"serving needs the package {error.name}; install it with rlrr-kernels[serve]") from error
    return run


@app.command()
def merge(
    adapter: AdapterFolder,
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: merged.safetensors beside ADAPTER")
    ] = None,
    weights: AdapterWeights = None,
    overwrite: Overwrite = False,
) -> None:
    """Fold an adapter into its backbone: a plain timm checkpoint, with nothing left to pay at inference."""
    from rlrr_kernels.train.export import merge_to_file
    from rlrr_kernels.train.output.folder import check_target

    output = output or adapter.parent / "merged.safetensors"
    check_target(output, overwrite, folder=False, sources=[weights] if weights else ())
    merged = merge_to_file(adapter, output, weights)
    say(str(merged.report))
    say(f"logits differ from the adapted model's by at most {merged.difference:.1e} (they reach {merged.largest:.2g})")
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    say(f"next: {merged.loading(output)}")


@app.command()
def combine(
    out: Annotated[Path, typer.Argument(help="Adapter folder to write")],
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one backbone, alike but for the rank")],
    weight: Annotated[
        list[float],
        typer.Option(help="For each adapter: 0.3 and 0.7 interpolate, 1 and 1 add, a single -1 negates"),
    ],
    head_of: Annotated[
        int | None, typer.Option(help="Take the head of this adapter, from 0; default: summed, for weights of sum 1")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the adapter whose change of the weights is the weighted sum of others' changes: exact, the ranks add up."""
    from rlrr_kernels.adapt import adapter_info, combine_adapters
    from rlrr_kernels.train.output.folder import check_target

    check_target(out, overwrite, folder=True, sources=adapters)
    info = adapter_info(combine_adapters(adapters, weight, out, head_of=head_of))
    say(f"{out}: {info.metadata['sum']}, rank {info.config.rank}")


@app.command()
def to_peft(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Argument(help="PEFT folder to write")],
    weights: AdapterWeights = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as Hugging Face PEFT loads it, after import rlrr_kernels.peft."""
    from rlrr_kernels.train.output.folder import check_target
    from rlrr_kernels.train.peft_folders import adapter_to_peft

    check_target(out, overwrite, folder=True, sources=[adapter])
    adapter_to_peft(adapter, out, weights)
    say(f"{out}: import rlrr_kernels.peft, then peft.PeftModel.from_pretrained(model, {str(out)!r})")


@app.command()
def from_peft(
    folder: Annotated[Path, typer.Argument(help="PEFT folder with an RLRR adapter and its head in modules_to_save")],
    model: Annotated[str, typer.Option(help="timm's name of the backbone it was trained on")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write")],
    weights: Weights = HUB,
    image_size: ImageSize = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, a line each, by label; default: 0, 1, ...")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="paper: the form that rlrr export-adapter takes; default: layers alone")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make an adapter folder of one that PEFT saved."""
    from rlrr_kernels.train.config.files import read_text
    from rlrr_kernels.train.output.folder import check_target
    from rlrr_kernels.train.peft_folders import peft_to_adapter

    check_target(out, overwrite, folder=True, sources=[folder])
    names = None if classes is None else read_text(classes, "--classes").splitlines()
    report = peft_to_adapter(
        folder, out, model=model, weights=weights, image_size=image_size, classes=names, recipe=recipe
    )
    console.print(str(report), markup=False, highlight=False)
    say(f"{out}: adapter folder, for rlrr evaluate, merge and load_adapter")


@app.command()
def doctor() -> None:
    """Print versions, devices, and which backend each operator would use and why."""
    from rlrr_kernels.train.doctor import report

    for table in report():
        console.print(table)


@app.command()
def tune(
    shape: Annotated[
        list[str] | None, typer.Option(help="NxK of a frozen weight, repeat for several; default: those of ViT-B")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Batch times tokens, repeat for several; default: 8, 64 and 1576")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    experimental: Annotated[
        bool, typer.Option("--experimental", help="Also try kernels that no GPU has run: kill it if one hangs")
    ] = False,
) -> None:
    """Measure tiles of the Triton kernels on this GPU and keep those that beat the shipped ones. Takes minutes."""
    import torch

    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.tuning.path import tune_path
    from rlrr_kernels.ops.tuning.tiles import Tuned
    from rlrr_kernels.ops.tuning.tiles import tune as run

    def show(found: Tuned) -> None:
        kept = f"{tuple(found.tiles)}, kept" if found.kept else "the shipped tiles stay"
        limit = f"M <= {found.limit}" if found.limit else "larger M"
        say(f"{found.kernel}, {limit}: {found.us:.1f} µs, shipped {found.shipped_us:.1f} µs: {kept}")

    options = {}
    if shape:
        try:
            options["shapes"] = [tuple(int(size) for size in given.lower().split("x")) for given in shape]
        except ValueError:
            raise ValueError(f"--shape must be NxK, such as 3072x768; got {', '.join(shape)}") from None
    if rows:
        options["rows"] = rows
    run(dtype=getattr(torch, dtype, dtype), experimental=experimental, report=show, **options)
    shapes = {name: value for name, value in options.items() if name == "shapes"}
    merges = tune_path(dtype=getattr(torch, dtype, dtype), **shapes)
    kept = (
        f"from {merges.least_gain:.2f} of the modelled gain, kept"
        if merges.kept
        else "where the model says, as shipped"
    )
    say(f"merges: {merges.us:.1f} µs, shipped {merges.shipped_us:.1f} µs: {kept}")
    say(f"{store.cache_file()} is used from now on; RLRR_TUNING=off ignores it")
    if experimental:
        say("tiles with a schedule that no GPU has proven are used under RLRR_EXPERIMENTAL=on alone")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder")] = Path("runs/demo"),
    cache: Annotated[Path, typer.Option(help="Where the backbone and the photographs are kept")] = Path(".cache"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images")] = 5,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Default: 3e-3; repeated, each is trained in full and validation images choose"),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Pixels, a multiple of 14")] = 112,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for mean and spread over several")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew where OUT holds a finished or stopped run")
    ] = False,
) -> None:
    """Fine-tune DINOv2 ViT-S/14 on photographs of solar cells: fetch, train, save, load, merge."""
    from rlrr_kernels.demo.run import DEFAULT_LRS, DEFAULT_SEED, DemoConfig, run_demo, run_seeds

    config = DemoConfig(out=out, cache=cache, epochs=epochs, lrs=tuple(lr or DEFAULT_LRS), image_size=image_size)
    seeds = seed or [DEFAULT_SEED]
    if len(seeds) == 1:
        run_demo(config, seeds[0], fresh=fresh)
    else:
        run_seeds(config, seeds, fresh=fresh)


@app.command()
def demo_serve(
    out: Annotated[Path, typer.Option(help="Folder of the run folders of both tasks")] = Path("runs/demo-serve"),
    cache: Annotated[Path, typer.Option(help="Where the backbone and the photographs are kept")] = Path(".cache"),
    epochs: Annotated[int, typer.Option(help="Of the task that tells defective cells")] = 5,
    kind_epochs: Annotated[int, typer.Option(help="Of the task that tells the kinds of cells")] = 1,
    image_size: Annotated[int, typer.Option(help="Pixels, a multiple of 14")] = 112,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1, to listen on")] = 8000,
    serving: Annotated[bool, typer.Option("--serve/--train-only", help="Serve them, or stop when trained")] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew where OUT holds a finished or stopped run")
    ] = False,
) -> None:
    """Train two tasks on photographs of solar cells side by side and serve both from one process, with a page to try.

    A run that was stopped is gone on with; one that has ended is served.
    """
    from rlrr_kernels.demo.many import ManyDemoConfig, train_tasks

    run_server = _server() if serving else None  # what it lacks is told before the training
    server = ServeConfig(adapters=out, port=port)
    config = ManyDemoConfig(out=out, cache=cache, epochs=epochs, kind_epochs=kind_epochs, image_size=image_size)
    trained = train_tasks(config, fresh=fresh)
    _show_tasks(trained.results)
    if run_server is None:
        say(f"next: {command('serve', '--adapters', out, '--weights', trained.weights)}")
        return
    say(f"serving: open http://127.0.0.1:{port}/ and drop a photograph of {trained.photographs} there; Ctrl-C ends it")
    run_server(dataclasses.replace(server, weights=trained.weights))


app.add_typer(data_app, name="data")
app.command()(reproduce)
app.command()(ablate)
app.command()(report)
app.command()(import_adapter)
app.command()(export_adapter)


def main() -> None:
    """Runs the program; an error that names its cause is printed without a traceback unless RLRR_TRACEBACK is set."""
    console.quiet = not _speaks()
    warnings.showwarning = _show_warning
    logging.getLogger("timm").setLevel(logging.ERROR)  # its notes on what this program asked it to do
    try:
        _check_given(sys.argv[1:])
        app()
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as raised:
        error = _explained(raised)
        if error is None or os.environ.get("RLRR_TRACEBACK"):
            raise
        if not _speaks():
            time.sleep(_PATIENCE)  # a launcher ends this process as soon as the one that speaks has failed, too
        _complain("[bold red]error:[/bold red]", error)
        _tell_launcher(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        error_console.print("stopped; go on with the same command and --resume")
        sys.exit(130)


def _check_given(arguments: Sequence[str]) -> None:
    """Raises ``ValueError`` for an empty argument, such as a shell's unset variable: a path would be this folder."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, value = argument.split("=", 1) if argument.startswith("--") and "=" in argument else (before, argument)
        if not value:
            raise ValueError(f"the argument{f' after {name}' if name else ''} is empty")


def _explained(error: Exception) -> Exception | None:
    """``error``, or what says its cause; None for a fault of the program."""
    if not isinstance(error, MemoryError | RuntimeError):
        return error
    # Only that of a GPU has a class of its own in PyTorch.
    told = re.search("out of memory|not enough memory|can.t allocate memory", str(error))
    if not told and not isinstance(error, MemoryError):
        return None
    return MemoryError(
        "out of memory; lower --batch-size or --image-size, or save some by --recompute or --activation-checkpointing"
    )


_PATIENCE = 30
"""Seconds; on a busy machine the launcher needs some to end the others."""


def _speaks() -> bool:
    """Of several processes one prints."""
    return os.environ.get("RANK", "0") == "0"


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    # Pillow does not say which image is large; the check of the images does.
    if _speaks() and category.__name__ != "DecompressionBombWarning":
        _complain("[yellow]warning:[/yellow]", message)


def _complain(kind: str, message: object) -> None:
    error_console.print(kind, end=" ")
    error_console.print(str(message), markup=False, highlight=False, soft_wrap=True)


def _tell_launcher(message: str) -> None:
    """Has torchrun's own report of the failure hold the message in place of advice on tracebacks."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        document = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(document))


if __name__ == "__main__":
    main()
