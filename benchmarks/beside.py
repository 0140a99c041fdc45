"""The operator of this checkout beside that of another, of an earlier commit say, on the CPU.

    python -m benchmarks.beside ../earlier [--threads 2] [--json FILE]

The other checkout's C++ extension has to be built there. A process each, of the same interpreter, holds the same
problems in memory; they take turns, call by call, so that both see the same machine. Printed are the times of the C++
operator of both and this checkout's over the other's, then what a call costs the host (``benchmarks.host_overhead``),
run in both in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.support.common import LAYER_SHAPES

HERE = Path(__file__).resolve().parents[1]
M = (1, 16, 197, 1576)
DTYPES = ("float32", "bfloat16")
SECONDS = 0.6
"""About how long the turns of a problem take in each process."""
HOST_TURNS = 5

WORKER = """
import json, sys, time
import torch
from rlrr_kernels import RLRRLinear

calls = []
for m, n, k, dtype, backward in json.loads(sys.stdin.readline()):
    torch.manual_seed(0)
    layer = RLRRLinear(k, n).to(getattr(torch, dtype))
    x = torch.randn(m, k, dtype=layer.weight.dtype, requires_grad=backward)
    grad_y = torch.randn(m, n, dtype=x.dtype)

    def call(layer=layer, x=x, grad_y=grad_y, backward=backward):
        with torch.set_grad_enabled(backward):
            y = layer(x)
            if backward:
                y.backward(grad_y)

    call()
    calls.append(call)
print(json.dumps(sys.modules["rlrr_kernels"].__file__), flush=True)
for line in sys.stdin:
    call = calls[int(line)]
    start = time.perf_counter()
    call()
    print(time.perf_counter() - start, flush=True)
"""


class Worker:
    """A process that times calls of one checkout."""

    def __init__(self, checkout: Path, threads: int, problems: list[tuple]):
        variables = os.environ | {"PYTHONPATH": str(checkout), "RLRR_BACKEND": "cpp"}
        # PASSIVE: the one whose turn it is not waits, its threads do not spin.
        variables |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-c", WORKER]
        self.process = subprocess.Popen(
            command, cwd=checkout, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        imported = Path(json.loads(self._ask(json.dumps(problems)))).resolve()
        if not imported.is_relative_to(checkout):
            raise SystemExit(f"{checkout} has no package rlrr_kernels: {imported} was imported")

    def _ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a process of the benchmark ended, for the reason above")
        return answer

    def seconds(self, problem: int) -> float:
        """How long one call takes."""
        return float(self._ask(str(problem)))


def operator(checkouts: list[Path], threads: int) -> list[dict]:
    """A row a problem: the median times of both, in microseconds."""
    problems = [
        (m, *shape, dtype, step) for dtype, step, m, shape in itertools.product(DTYPES, (False, True), M, LAYER_SHAPES)
    ]
    workers = [Worker(checkout, threads, problems) for checkout in checkouts]
    rows = []
    for index, problem in enumerate(problems):
        seconds = [worker.seconds(index) for worker in workers]
        turns = max(5, min(400, int(SECONDS / max(seconds))))
        times: tuple[list[float], list[float]] = [], []
        for turn in range(turns):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(workers[which].seconds(index))
        here, other = (1e6 * statistics.median(values) for values in times)
        row = dict(zip(("M", "N", "K", "dtype", "backward"), problem, strict=True))
        rows.append(row | {"threads": threads, "here": round(here, 1), "other": round(other, 1)})
        print(*rows[-1].values(), f"{here / other:.3f}", sep="  ", flush=True)
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()
    return rows


def host(checkouts: list[Path]) -> list[dict]:
    """A row a call: the median over the turns of both checkouts' medians, in microseconds."""
    found: list[dict[str, list[float]]] = [{}, {}]
    for turn, (which, checkout) in itertools.product(range(HOST_TURNS), enumerate(checkouts)):
        print(f"host, turn {turn + 1} of {HOST_TURNS}: {checkout}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.host_overhead"]
        variables = os.environ | {"PYTHONPATH": str(checkout)}
        text = subprocess.run(command, cwd=checkout, env=variables, text=True, capture_output=True, check=True).stdout
        for name, median in re.findall(r"^(\S.*?: forward[a-z_ +]*?)\s+([\d.]+) \(", text, re.MULTILINE):
            found[which].setdefault(name, []).append(float(median))
    names = [name for name in found[0] if name in found[1]]
    rows = [
        {"call": name, "here": statistics.median(found[0][name]), "other": statistics.median(found[1][name])}
        for name in names
    ]
    for row in rows:
        print(f"{row['call']:60s} {row['here']:8.1f} {row['other']:8.1f} {row['here'] / row['other']:.3f}", flush=True)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkout", type=Path, help="the other checkout")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    checkouts = [HERE, arguments.checkout.resolve()]
    rows = operator(checkouts, arguments.threads)
    for dtype, backward in itertools.product(DTYPES, (False, True)):
        ratios = [row["here"] / row["other"] for row in rows if (row["dtype"], row["backward"]) == (dtype, backward)]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        what = "forward + backward" if backward else "forward"
        print(f"{dtype}, {what}: {mean:.3f} of the other's time ({min(ratios):.3f} to {max(ratios):.3f})")
    calls = host(checkouts)
    if arguments.json:
        arguments.json.write_text(json.dumps({"operator": rows, "host": calls}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
