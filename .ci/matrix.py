"""The test suite with every supported pair of torch and Triton, an environment each: ``make matrix``.

    python .ci/matrix.py [ROW ...] [--slow] [--again | --earlier] [--drop] [--envs FOLDER] [--constraint FILE] [--write]

A row is chosen by its torch, "2.9" say; without any, all run, one after another. An environment that was built for the
requirements it would be built for now is used again, and a result that is there for the same files is not repeated, so
a run that was stopped goes on where it was. Each row tests a copy of the checkout, with the C++ extension built there.
Needs Python alone, a new environment about 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "versions.md"


class Row(NamedTuple):
    """One environment: the newest of everything but torch, or the oldest that pyproject.toml admits."""

    torch: str
    python: str
    oldest: bool = False
    cpp: bool = True  # whether the C++ extension has to build

    @property
    def name(self) -> str:
        """By which a row is chosen: major and minor version of torch."""
        return self.torch.rpartition(".")[0]


ROWS = (
    Row("2.9.1", "3.10", oldest=True, cpp=False),
    Row("2.10.0", "3.11"),
    Row("2.11.0", "3.12"),
    Row("2.12.1", "3.12"),
    Row("2.13.0", "3.13"),
    Row("2.14.1", "3.11"),
    Row("2.15.0", "3.13"),
)
"""Every minor version of torch from the one that pyproject.toml asks for to the newest; each brings its Triton."""

SOURCE_TOOLS = ("import-linter", "mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "mypy", "ruff")
"""Left out: what they say of the sources is the same with every torch, and they bind the versions of other packages."""

PROCESSES = {"suite": {}, "interpreted": {"TRITON_INTERPRET": "1"}}
"""What runs in each environment, by the variables it is started with; the Makefile says why there are two."""

FACTS = """
import json, platform, torch, torchvision, triton
from rlrr_kernels import backends
versions = {module.__name__: module.__version__.split("+")[0] for module in (torch, triton, torchvision)}
print(json.dumps({"python": platform.python_version(), **versions, "cpp": backends.CPP_FAILURE}))
"""


class Failure(Exception):
    """Why a row has no result; its text is shown in the table."""


# ---------------------------------------------------------------- what is installed


def requirements(project: dict[str, Any], extra: str, oldest: bool = False) -> list[str]:
    """What ``project[extra]`` needs beside torch and :data:`SOURCE_TOOLS`, references to its own extras resolved.

    Args:
        project: the table ``project`` of pyproject.toml.
        extra: name of an optional dependency.
        oldest: pin each package to the lower bound that it has.
    """
    found: dict[str, None] = {}
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(re.escape(project["name"]) + r"\[(.+)\]", requirement)
        parts = own[1].split(",") if own else []
        found |= dict.fromkeys(line for part in parts for line in requirements(project, part.strip(), oldest))
        if not own and re.match(r"[\w.-]+", requirement)[0] not in SOURCE_TOOLS:
            found[requirement.replace(">=", "==") if oldest else requirement] = None
    return list(found)


def wanted(row: Row) -> str:
    """The requirements file of a row's environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return "\n".join([f"torch=={row.torch}", *requirements(project, "all", row.oldest)]) + "\n"


def find_python(version: str) -> str:
    """An interpreter of that minor version: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [sys.executable, f"python{version}", *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python3")))]
    for name in names:
        command = [name, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            if subprocess.run(command, capture_output=True, text=True).stdout.strip() == version:
                return name
        except OSError:
            continue
    raise Failure(f"no Python {version} on this machine")


def environment(row: Row, folder: Path, constraint: str) -> Path:
    """The interpreter of the row's environment, which is built where there is none for these requirements."""
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted(row):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    base = find_python(row.python)
    say(row, "builds its environment")
    run([base, "-m", "venv", str(folder)], "could not make an environment")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    variables = os.environ | {"PIP_CONSTRAINT": constraint}
    run([*pip, "--upgrade", "pip", "setuptools>=77", "wheel"], "could not install pip", env=variables)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(wanted(row))
        file.flush()
        run([*pip, "--requirement", file.name], "could not be installed", env=variables)
    stamp.write_text(wanted(row))
    return python


# ---------------------------------------------------------------- what is tested


def tree() -> str:
    """Name of the state of all files that git does not ignore, committed or not."""
    with tempfile.TemporaryDirectory() as folder:
        variables = os.environ | {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run(["git", "add", "--all"], "git does not know the checkout", cwd=ROOT, env=variables)
        return run(["git", "write-tree"], "git does not know the checkout", cwd=ROOT, env=variables).strip()


def export(name: str, folder: Path) -> None:
    """Writes the files of a :func:`tree` into ``folder``, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract"], input=archive, cwd=folder, check=True)


def counts(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit file, seconds, and the names of those that failed."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": []}
    for suite in ElementTree.parse(report).iter("testsuite"):
        found["seconds"] += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            found[kind] += 1
            if kind == "failed":
                found["failures"].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def known_result(row: Row, results: Path, earlier: bool) -> Path:
    """Where the row's result lies or will; with ``earlier`` the newest without failures, whatever the files were."""
    kept = results / f"{row.name}.json"
    if kept.exists() or not earlier:
        return kept
    slow = results.name.endswith("-slow")
    found = [path for path in results.parent.glob(f"*/{kept.name}") if path.parent.name.endswith("-slow") == slow]
    results_of = {path: json.loads(path.read_text()) for path in found}
    passed = [path for path, result in results_of.items() if "commit" in result and not failures(result)]
    return max(passed, key=os.path.getmtime, default=kept)


def failures(result: dict[str, Any]) -> list[str]:
    """The tests that failed."""
    return [name for process in PROCESSES for name in result.get(process, {}).get("failures", [])]


def test(row: Row, python: Path, source: Path, results: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the extension in ``source`` and runs the suite there, once for each of :data:`PROCESSES`."""
    variables = os.environ | {"PYTHONPATH": str(source), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONNOUSERSITE": "1"}
    if row.cpp:
        variables["RLRR_BUILD_CPP"] = "1"
    say(row, "builds the C++ extension")
    build = [str(python), "setup.py", "--quiet", "build_ext", "--inplace"]
    run(build, "the C++ extension does not build", cwd=source, env=variables)
    facts = json.loads(run([str(python), "-c", FACTS], "does not import", cwd=source, env=variables))
    commit = ["git", "describe", "--always", "--dirty"]
    facts["commit"] = run(commit, "git knows no commit", cwd=ROOT).strip()
    for process, extra in PROCESSES.items():
        say(row, f"runs its tests: {process}")
        report, marks = results / f"{row.name}-{process}.xml", ["not gpu"]
        marks += [] if arguments.slow else ["not slow"]
        marks += ["interpreted"] if process == "interpreted" else []
        command = [
            str(python),
            "-m",
            "pytest",
            *arguments.tests,
            "-q",
            "-n",
            arguments.workers,
            "--dist",
            "worksteal",
            "-p",
            "no:cacheprovider",
        ]
        # A folder of its own: pytest's usual one is emptied by the third run after, whoever starts it.
        command += ["-m", " and ".join(marks), f"--junitxml={report}", f"--basetemp={source}-tmp"]
        with report.with_suffix(".log").open("w") as log:
            subprocess.run(command, cwd=source, env=variables | extra, stdout=log, stderr=subprocess.STDOUT)
        if not report.exists():
            raise Failure(f"{process} ended without a report: {report.with_suffix('.log')}")
        facts[process] = counts(report)
    return facts


# ---------------------------------------------------------------- what is said


def table(found: Iterable[tuple[Row, dict[str, Any]]]) -> str:
    """The results in Markdown, padded so that they read well as they are."""
    heads = "torch", "Triton", "Python", "other packages", "C++ operator", "suite", "interpreted", "minutes", "commit"
    lines = [[*heads]]
    for row, result in found:
        other = "oldest" if row.oldest else "newest"
        if "error" in result:
            lines.append([row.torch, "", row.python, other, "", result["error"], "", "", ""])
            continue
        cells = [result["torch"], result["triton"], result["python"], other, "no" if result["cpp"] else "yes"]
        cells += [_sum(result[process]) for process in PROCESSES]
        lines.append([*cells, f"{sum(result[process]['seconds'] for process in PROCESSES) / 60:.0f}", result["commit"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _sum(count: dict[str, Any]) -> str:
    return ", ".join(
        f"{count[kind]} {kind}" for kind in ("passed", "failed", "skipped") if count[kind] or kind == "passed"
    )


def page(text: str) -> str:
    """docs/versions.md around a table."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = ", ".join(f"`{line}`" for line in requirements(project, "all", oldest=True) if "==" in line)
    return (
        "# Versions\n\n"
        "`make matrix` runs the test suite with every minor version of torch that is supported, each with the Triton\n"
        "that it brings, and wrote this table. Tests that need a GPU are not among them.\n\n"
        f"{text}\n"
        f"Run on {platform.system()}, {platform.machine()}. Skipped are tests of what an environment lacks. The row\n"
        f"with the oldest packages has the lower bounds of `pyproject.toml`: {oldest}.\n"
    )


def say(row: Row, text: str) -> None:
    """One line of progress."""
    print(f"torch {row.torch}, Python {row.python}: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str], complaint: str, **options: Any) -> str:
    """What a command prints.

    Raises:
        Failure: it failed; the text is ``complaint`` with its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise Failure(f"{complaint}: {(done.stderr.strip() or done.stdout.strip()).rpartition(chr(10))[2]}")
    return done.stdout


def main() -> int:
    """Runs the chosen rows; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {' '.join(row.name for row in ROWS)}; default: all")
    parser.add_argument("--slow", action="store_true", help="slow tests too")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--again", action="store_true", help="repeat results that are there")
    known.add_argument(
        "--earlier", action="store_true", help="nor repeat what passed with earlier files; the table names their commit"
    )
    parser.add_argument("--drop", action="store_true", help="remove an environment when its row is done: 6 GB each")
    parser.add_argument("--envs", type=Path, default=ROOT / ".matrix", help="where environments and results are kept")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="only these; their results are not kept")
    parser.add_argument("--workers", default="2", help="test processes at a time")
    parser.add_argument(
        "--constraint", default=os.devnull, help="pip's constraints; by default none, the machine's own set aside"
    )
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.relative_to(ROOT)}; wants all rows")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - {row.name for row in ROWS}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if arguments.write and (arguments.rows or arguments.tests != ["tests"]):
        parser.error("--write wants all rows and all tests")
    state = tree()
    results = arguments.envs.resolve() / "results" / f"{state[:12]}{'-slow' if arguments.slow else ''}"
    results.mkdir(parents=True, exist_ok=True)
    found = []
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        folder = arguments.envs.resolve() / f"torch{row.name}-py{row.python}"
        kept = known_result(row, results, arguments.earlier)
        if kept.exists() and not arguments.again:
            found.append((row, json.loads(kept.read_text())))
            continue
        source = arguments.envs.resolve() / "source" / row.name
        began = time.perf_counter()
        try:
            python = environment(row, folder, arguments.constraint)
            export(state, source)
            result = test(row, python, source, results, arguments)
            if arguments.tests == ["tests"]:
                kept.write_text(json.dumps(result, indent=1) + "\n")
        except Failure as error:
            result = {"error": str(error)}
        for used in (source, source.with_name(f"{source.name}-tmp")):
            shutil.rmtree(used, ignore_errors=True)
        if arguments.drop:
            shutil.rmtree(folder, ignore_errors=True)
        say(row, f"done in {(time.perf_counter() - began) / 60:.0f} minutes")
        found.append((row, result))
    text = table(found)
    print(text)
    bad = 0
    for row, result in found:
        names = failures(result)
        bad += bool(names or "error" in result)
        print(*(f"torch {row.torch}: {name} failed" for name in names), sep="\n", end="\n" if names else "")
    if arguments.write and not bad:
        TABLE.write_text(page(text), encoding="utf-8")
    return bad


if __name__ == "__main__":
    sys.exit(main())
