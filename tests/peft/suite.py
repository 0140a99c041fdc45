"""PEFT's own tests of a method, judging RLRR: ``make peft-suite``.

    python -m tests.peft.suite [--folder FOLDER] [--hub] [pytest's options]

The sdist of the installed PEFT release is fetched by pip, once, and unpacked. Its ``test_custom_models.py`` and
``test_config.py`` run as they are but for their lists of cases, which are replaced by the rows below. Of the first only
the tests of these rows run, of the second all but those that fetch a model from the hub, whatever the method.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

CASES = {
    "test_custom_models.py": ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES", "MIXED_ADAPTER_TEST_CASES"),
    "test_config.py": ("ALL_CONFIG_CLASSES",),
}
"""What is replaced in each file."""

NEED_HUB = ("from_pretrained[", "from_pretrained_cache_dir", "save_pretrained_with_runtime_config")
"""How the names of these tests begin, after ``TestPeftConfig::test_``."""

ROWS = """\
from rlrr_kernels.peft import RLRRPeftConfig

TEST_CASES = [
    ("RLRR regex", "MLP", RLRRPeftConfig, {"target_modules": "lin0"}),
    ("RLRR one layer", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"]}),
    ("RLRR two layers", "MLP", RLRRPeftConfig, {"target_modules": ["lin0", "lin1"], "r": 3}),
    ("RLRR saved module", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("RLRR groups", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"], "r": 2, "groups": 2}),
    ("RLRR no shift", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"], "shift": False}),
    ("RLRR left side", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"], "sides": "left"}),
    ("RLRR no residual", "MLP", RLRRPeftConfig, {"target_modules": ["lin0"], "residual": False}),
    ("RLRR pattern", "MLP", RLRRPeftConfig, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 4}}),
]

MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (
        "RLRR same",
        "rlrr",
        RLRRPeftConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False, "r": 2, "groups": 2},
    ),
    (
        "RLRR different",
        "rlrr",
        RLRRPeftConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]

MIXED_ADAPTER_TEST_CASES = [
    (
        "RLRR mixed adapter",
        RLRRPeftConfig(target_modules=["lin0"], init_weights=False),
        RLRRPeftConfig(target_modules=["lin0"], r=16, init_weights=False),
    ),
]

ALL_CONFIG_CLASSES = ((RLRRPeftConfig, {}),)
"""

CONFTEST = """\
import importlib.util
import sys
from unittest.mock import MagicMock

# Imported by PEFT's helpers for other tests than these.
for name in ("diffusers", "datasets"):
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = MagicMock()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/peft_suite"), help="where the sdist is unpacked")
    parser.add_argument("--hub", action="store_true", help="also run what fetches a model from the hub")
    options, others = parser.parse_known_args()
    tests = prepare(options.folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *others]
    of_config = ["tests/test_config.py"]
    if not options.hub:
        of_config += [f"--deselect=tests/test_config.py::TestPeftConfig::test_{name}" for name in NEED_HUB]
    status = [
        subprocess.run([*run, *selection], cwd=tests.parent, env=environment, check=False).returncode
        for selection in (("tests/test_custom_models.py", "-k", "RLRR"), of_config)
    ]
    return max(status)


def prepare(folder: Path) -> Path:
    """The folder of PEFT's tests under ``folder``, with the rows in place of its own."""
    version = importlib.metadata.version("peft")
    sdist, unpacked = folder / f"peft-{version}.tar.gz", folder / f"peft-{version}"
    if not sdist.exists():
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([sys.executable, "-m", "pip", *download, "-d", folder, f"peft=={version}"], check=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, [entry for entry in archive if "/tests/" in entry.name], filter="data")
    tests = unpacked / "tests"
    for name, cases in CASES.items():
        file = tests / name
        file.write_text(replace_cases(file.read_text(encoding="utf-8"), cases), encoding="utf-8")
    for name, text in {"__init__.py": "", "conftest.py": CONFTEST, "rlrr_rows.py": ROWS}.items():
        (tests / name).write_text(text, encoding="utf-8")
    return tests


def replace_cases(source: str, names: tuple[str, ...]) -> str:
    """``source`` with every module-level list called one of ``names`` taken from ``rlrr_rows``.

    Raises:
        ValueError: one of them is not there, so that this release's tests are others.
    """
    lines, found = source.splitlines(keepends=True), set()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            name = node.targets[0].id
            lines[node.lineno - 1 : node.end_lineno] = [f"from .rlrr_rows import {name}\n"]
            found.add(name)
    if found != set(names):
        raise ValueError(f"PEFT's tests have no lists called {', '.join(sorted(set(names) - found))}")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
