"""Load on ``rlrr serve`` over loopback: a hundred adapters in mixed traffic beside one merged model served alike.

    python -m benchmarks.serving            # throughput and latency of a ViT-S, in turn with the merged model
    python -m benchmarks.serving --count    # 10,000 requests to a small model whose adapters are swapped meanwhile
    python -m benchmarks.serving --picture  # draws what the first wrote

Each adapter marks its answers: its classes bear its name and version, and its head makes one of them the most probable,
another for every adapter and version. An answer is crossed where names, version and most probable class do not belong
together. Servers are processes of their own; clients are threads of this one, each with one connection and one request
at a time. ``--out`` is a folder for ``serving_cpu.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.support.common import environment, markdown_table
from rlrr_kernels import AdapterBank, RLRRConfig, load_adapter, merge_adapter, save_adapter
from rlrr_kernels.train.models.backbones import NO_WEIGHTS, create_model
from rlrr_kernels.train.task import Task

ADAPTERS = 100
CLIENTS = (1, 4, 16)
RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("many adapters", "one merged model")


def name_of(adapter: int) -> str:
    return f"task {adapter:03}"


def classes_of(adapter: int, version: int) -> tuple[str, ...]:
    """2 to 11 classes, so that heads differ."""
    return tuple(f"{name_of(adapter)} version {version} class {i}" for i in range(2 + adapter % 10))


def mark_of(adapter: int, version: int) -> str:
    """The most probable class of every image."""
    classes = classes_of(adapter, version)
    return classes[(adapter // 10 + version) % len(classes)]


def write_adapters(root: Path, model: str, pixels: int, adapters: range, version: int) -> None:
    """Adapters with the paper's recipe, as far from the backbone as a short training, with marked heads."""
    backbone, preprocessing = create_model(model, 1, image_size=pixels, weights=NO_WEIGHTS)
    bank = AdapterBank(backbone)
    for adapter in adapters:
        classes = classes_of(adapter, version)
        made = bank.trainable(name_of(adapter), RLRRConfig(recipe="paper"), classes=len(classes))
        generator = torch.Generator().manual_seed(1000 * version + adapter)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
            head: Any = made.get_submodule("head")
            head.weight.mul_(0.1)
            head.bias.zero_()
            head.bias[classes.index(mark_of(adapter, version))] = 5.0
        metadata = {"task": Task(model, NO_WEIGHTS, classes, preprocessing).to_dict()}
        save_adapter(made, root / name_of(adapter), metadata=metadata)
        bank.remove(name_of(adapter))


# ---------------------------------------------------------------- servers


@dataclasses.dataclass
class Server:
    """A server's process, where it listens, and what it logs."""

    process: subprocess.Popen[str]
    port: int
    errors: list[str]

    def cpu_seconds(self) -> float:
        """Seconds of the processor so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def serving(kind: str, adapters: Path, *options: str) -> Iterator[Server]:
    """A server of ``kind``, one of :data:`KINDS`, of this machine's loopback."""
    command = [sys.executable, "-m", "benchmarks.serving", "--serve", kind, "--adapters", str(adapters), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        errors: list[str] = []
        assert process.stderr is not None
        port = None
        for line in process.stderr:
            event = json.loads(line)["event"] if line.startswith("{") else line
            if "running on" in event:
                port = int(event.partition("127.0.0.1:")[2].split()[0])
                break
            errors.append(line)
        if port is None:
            raise RuntimeError(f"the server did not start: {''.join(errors)}")
        errors.clear()
        reader = threading.Thread(target=_keep_errors, args=(process.stderr, errors))
        reader.start()
        try:
            yield Server(process, port, errors)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            reader.join()


def _keep_errors(stream: Any, errors: list[str]) -> None:
    for line in stream:
        if '"level": "info"' not in line:
            errors.append(line)


def serve(kind: str, adapters: Path, options: Sequence[str]) -> None:
    """What the process of :func:`serving` does."""
    from rlrr_kernels.serve.config import ServeConfig
    from rlrr_kernels.serve.run import serve as run
    from rlrr_kernels.serve.service import Answer, Service

    parsed = dict(option.split("=") for option in options)
    config = ServeConfig(adapters=adapters, port=free_port(), cpu=True, timeout=120.0, queue=1000,
                         **{name: float(value) for name, value in parsed.items()})  # fmt: skip
    if kind == KINDS[1]:
        task = Task.of_adapter(adapters / name_of(0))
        model = create_model(task.model, 1, image_size=task.preprocessing.image_size, weights=NO_WEIGHTS)[0].eval()
        reset: Any = model
        reset.reset_classifier(len(task.classes))
        load_adapter(model, adapters / name_of(0))
        merge_adapter(model)

        def compute(self: Service, batch: Sequence[Any]) -> list[Answer]:
            with torch.inference_mode():
                shares = model(torch.stack([image for _, image in batch])).softmax(1).tolist()
            return [Answer(task.classes, tuple(row)) for row in shares]

        Service._run = compute  # type: ignore[method-assign]
    run(config)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---------------------------------------------------------------- clients


def images(count: int, pixels: int) -> list[bytes]:
    """JPEG files of coloured noise, no two alike."""
    draw, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


@dataclasses.dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: latency of each answer. crossed: answers that belong to no version of what was asked for.
        lost: requests without an answer, or refused. elapsed: seconds of the clock.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    crossed: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    elapsed: float = 0.0

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.elapsed

    def percentile(self, share: float) -> float:
        """Seconds that ``share`` of the answers took at most."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def ask(
    port: int, clients: int, files: Sequence[bytes], adapters: Sequence[int], versions: Sequence[int],
    go_on: Callable[[int], bool],
) -> Load:  # fmt: skip
    """Asks a server by so many clients at once while ``go_on(requests so far)``."""
    load, lock, asked = Load(), threading.Lock(), [0]

    def client(seed: int) -> None:
        draw, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                if not go_on(asked[0]):
                    break
                asked[0] += 1
            adapter, begin = draw.choice(adapters), time.perf_counter()
            path = f"/v1/classify?adapter={urllib.parse.quote(name_of(adapter))}"
            try:
                connection.request("POST", path, draw.choice(files), {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                status, body = response.status, json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                status, body = 0, {"detail": repr(error)}
            seconds = time.perf_counter() - begin
            with lock:
                if status != 200:
                    load.lost.append(f"{name_of(adapter)}: {status} {body}")
                    continue
                load.seconds.append(seconds)
                names = [entry["name"] for entry in body["classes"]]
                if not any(
                    names[0] == mark_of(adapter, v) and set(names) == set(classes_of(adapter, v)) for v in versions
                ):
                    load.crossed.append(f"{name_of(adapter)}: {names}")
        connection.close()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.elapsed = time.perf_counter() - begin
    return load


# ---------------------------------------------------------------- measurements


def compare(model: str, pixels: int, seconds: float, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Both kinds of server under the same load, in turn; a row for each number of clients, medians of the rounds."""
    write_adapters(folder, model, pixels, range(ADAPTERS), 0)
    files, rows = images(32, pixels), []
    with serving(KINDS[0], folder) as many, serving(KINDS[1], folder) as merged:
        servers = {KINDS[0]: (many, range(ADAPTERS)), KINDS[1]: (merged, range(1))}
        for server, adapters in servers.values():
            ask(server.port, 4, files, adapters, [0], lambda count: count < 16)
        for clients in CLIENTS:
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for _ in range(rounds):
                for kind, (server, adapters) in servers.items():
                    before, end = server.cpu_seconds(), time.perf_counter() + seconds
                    load = ask(server.port, clients, files, adapters, [0], lambda _, end=end: time.perf_counter() < end)
                    if load.lost or load.crossed:
                        raise RuntimeError(f"{kind}: lost {load.lost[:3]}, crossed {load.crossed[:3]}")
                    found[kind].append({
                        "throughput": load.throughput,
                        "p50": load.percentile(0.5),
                        "p99": load.percentile(0.99),
                        "cpu": (server.cpu_seconds() - before) / len(load.seconds),
                        "answers": len(load.seconds),
                    })  # fmt: skip
            row: dict[str, Any] = {"clients": clients}
            for kind, runs in found.items():
                row[kind] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            pairs = list(zip(*found.values(), strict=True))
            row["share of throughput"] = statistics.median(a["throughput"] / b["throughput"] for a, b in pairs)
            row["share by seconds of the processor"] = statistics.median(b["cpu"] / a["cpu"] for a, b in pairs)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def count(model: str, pixels: int, requests: int, folder: Path) -> dict[str, Any]:
    """So many requests while adapters are swapped all the time and evicted for want of memory."""
    versions, root = [folder / "0", folder / "1"], folder / "served"
    for version, path in enumerate(versions):
        write_adapters(path, model, pixels, range(ADAPTERS), version)
    shutil.copytree(versions[0], root)
    size = (root / name_of(0) / "adapter.safetensors").stat().st_size
    files, stop, swaps, resident = images(32, pixels), threading.Event(), [0], []
    with serving(KINDS[0], root, f"memory_mb={60 * size / 1e6}") as server:

        def swap() -> None:
            draw = random.Random(0)
            while not stop.wait(1.0):
                for adapter in draw.sample(range(ADAPTERS), 3):
                    replace(versions[draw.randrange(2)] / name_of(adapter), root / name_of(adapter))
                    swaps[0] += 1
                server.process.send_signal(signal.SIGHUP)

        def go_on(asked: int) -> bool:
            if asked >= len(resident) * requests // 20:
                resident.append(server.resident())
            return asked < requests

        swapping = threading.Thread(target=swap)
        swapping.start()
        load = ask(server.port, 16, files, range(ADAPTERS), [0, 1], go_on)
        stop.set()
        swapping.join()
        errors = list(server.errors)
    settled = resident[len(resident) // 2 :]
    return {
        "requests": requests,
        "answers": len(load.seconds),
        "crossed": len(load.crossed),
        "lost": len(load.lost),
        "swaps": swaps[0],
        "throughput": load.throughput,
        "p50": load.percentile(0.5),
        "p99": load.percentile(0.99),
        "resident MB": [round(x / 1e6, 1) for x in resident],
        "growth in the second half": settled[-1] / settled[0] - 1,
        "examples": [*load.lost[:3], *load.crossed[:3], *errors[:3]],
    }


def replace(source: Path, target: Path) -> None:
    """Puts the adapter in ``source`` in the place of ``target``'s, as ``save_adapter`` does: tensors last, at once."""
    for name in ("config.json", "adapter.safetensors"):
        staged = target / f".{name}.new"
        shutil.copyfile(source / name, staged)
        os.replace(staged, target / name)


# ---------------------------------------------------------------- output


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["clients", "images a second, 100 adapters", "one merged model", "share", "share by CPU seconds",
             "p50, ms", "merged", "p99, ms", "merged"]  # fmt: skip
    lines = [
        [
            row["clients"],
            row[KINDS[0]]["throughput"],
            row[KINDS[1]]["throughput"],
            row["share of throughput"],
            row["share by seconds of the processor"],
            *(1e3 * row[kind][key] for key in ("p50", "p99") for kind in KINDS),
        ]
        for row in rows
    ]
    return markdown_table(heads, lines)


def draw(document: dict[str, Any], file: Path) -> None:
    """Throughput and latency over the number of clients."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = document["comparison"]
    at = np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {KINDS[0]: "#3f51b5", KINDS[1]: "#9e9e9e"}
    for place, kind in enumerate(KINDS):
        label = f"{ADAPTERS} adapters, mixed" if kind == KINDS[0] else kind
        offset = 0.38 * (place - 0.5)
        left.bar(at + offset, [row[kind]["throughput"] for row in rows], 0.36, color=colours[kind], label=label)
        right.bar(
            at + offset, [1e3 * row[kind]["p50"] for row in rows], 0.36, color=colours[kind], label=f"{label}: p50"
        )
        tops = [1e3 * row[kind]["p99"] for row in rows]
        dash = {"marker": "_", "s": 260, "color": "#222222", "zorder": 3}
        right.scatter(at + offset, tops, label=None if place else "p99", **dash)
    for place, row in enumerate(rows):
        top = max(row[kind]["throughput"] for kind in KINDS)
        share = f"{row['share of throughput']:.2f}"
        left.annotate(share, (place, top), (0, 3), textcoords="offset points", ha="center")
    left.set_ylabel("images a second")
    right.set_ylabel("latency, ms")
    left.margins(y=0.3)
    for axes in (left, right):
        axes.set_xticks(at, [str(row["clients"]) for row in rows])
        axes.set_xlabel("clients, one request each at a time")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=15, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, nargs="?", const=10_000, help="requests to a small model instead")
    parser.add_argument("--picture", action="store_true", help="draw what is in --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.serve:
        serve(arguments.serve, arguments.adapters, options)
        return
    if options:
        parser.error(f"unknown arguments: {' '.join(options)}")
    file = arguments.out / "serving_cpu.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    if not arguments.picture:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.count:
                document["count"] = count("vit_tiny_patch16_224", 32, arguments.count, Path(folder))
                print(json.dumps(document["count"], indent=2))
            else:
                document["comparison"] = compare(
                    arguments.model, arguments.pixels, arguments.seconds, arguments.rounds, Path(folder)
                )
                document["model"], document["environment"] = arguments.model, environment()
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")
    if "comparison" in document:
        lines = [
            f"{document['model']}; {', '.join(f'{k}: {v}' for k, v in document['environment'].items())}",
            "",
            *table(document["comparison"]),
        ]
        file.with_suffix(".md").write_text("\n".join(lines))
        draw(document, file.with_suffix(".png"))
    if document.get("count", {}).get("crossed") or document.get("count", {}).get("lost"):
        raise SystemExit("answers were crossed or lost")


if __name__ == "__main__":
    main()
