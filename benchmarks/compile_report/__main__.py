"""The command ``python -m benchmarks.compile_report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton

from benchmarks import compile_report
from benchmarks.compile_report import verdict

HEAD = (
    "arch", "kernel", "dtype", "registers", "spills", "spills_in_loops", "shared_bytes", "matrix_instruction", "config",
)  # fmt: skip


def main() -> None:
    """Prints the report row by row, then what is wrong with it."""
    parser = argparse.ArgumentParser(description=compile_report.__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--arch", nargs="+", choices=list(compile_report.TARGETS), help="only these architectures")
    parser.add_argument("--accept", action="store_true", help="record the spills as accepted with this Triton")
    arguments = parser.parse_args()
    rows, figures = [], verdict.accepted()
    print("  ".join(HEAD))
    for row in compile_report.rows(arguments.arch):
        rows.append(row)
        print("  ".join(str(row[name]) for name in HEAD), *verdict.problems(row, figures), sep="  ", flush=True)
    if arguments.accept:
        verdict.accept(rows)
    wrong, remarks = verdict.judge(rows)
    print(
        f"{len(rows)} kernels compiled with Triton {triton.__version__}; {len(wrong)} problems",
        *wrong,
        *remarks,
        sep="\n",
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
