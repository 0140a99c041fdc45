"""RLRR beside what it is compared with, on two real datasets that come with installable packages.

    python -m benchmarks.evidence --cache .cache --out runs/evidence

DINOv2 ViT-S/14 is fine-tuned by every method under the same command and budget. Each method's learning rate is chosen
on validation images of the first seed, among the rates of its grid and, where the best lies at an end, beyond it; then
it is kept for the other seeds. Ablations of RLRR keep the rate of RLRR. The epoch is chosen on validation images, test
images are scored once a run. The command goes on where it was stopped and rewrites its report (``evidence.md``,
``.json``, ``.png``) after every run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.evidence.report import write_report
from benchmarks.evidence.runs import ARMS, DATASETS, Evidence, run_evidence
from rlrr_kernels.train.output.progress import console


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where backbone and images are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="where the runs are kept")
    parser.add_argument("--report", type=Path, help="where the report goes (default: OUT)")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--limit", type=int, help="about so many images a split: a trial, its scores mean nothing")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is finished")
    arguments = vars(parser.parse_args())
    report, report_only = arguments.pop("report"), arguments.pop("report_only")
    for name in ("datasets", "methods", "seeds"):
        arguments[name] = tuple(dict.fromkeys(arguments[name]))
    evidence = Evidence(**arguments)
    report = report or evidence.out
    try:
        if not report_only:
            run_evidence(evidence, lambda: write_report(evidence, report))
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
    console.print(write_report(evidence, report), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
