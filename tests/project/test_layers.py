"""What import-linter cannot see: imports by name that go up, circles in folders that know each other, full folders."""

from __future__ import annotations

import ast
import re
from collections import Counter

import networkx  # which torch brings
import pytest

from tests.support.paths import ROOT

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS = [re.findall(r"[\w.]+", layer) for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]


def height(module: str) -> int:
    """Of the layer that holds ``module``: 0 is the lowest."""
    (found,) = [
        index
        for index, layer in enumerate(reversed(LAYERS))
        if any(module == name or module.startswith(f"{name}.") for name in layer)
    ]
    return found


def imported_by_name(source: str) -> list[str]:
    """What ``importlib.import_module`` is given in ``source``; of an f-string the part before its first value."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    names = [call.args[0] for call in calls if ast.unparse(call.func).endswith("import_module")]
    parts = [name.values[0] if isinstance(name, ast.JoinedStr) else name for name in names]
    return [part.value for part in parts if isinstance(part, ast.Constant) and part.value.startswith("rlrr_kernels.")]


@pytest.mark.parametrize("package", ["rlrr_kernels", "benchmarks"])
def test_no_circle_of_modules(package):
    grimp = pytest.importorskip("grimp", reason="needs import-linter, of the extra [test]")
    graph = grimp.build_graph(package, cache_dir=None)
    imports = networkx.DiGraph(
        (name, found) for name in graph.modules for found in graph.find_modules_directly_imported_by(name)
    )
    assert len(imports) > 20
    assert not [sorted(circle) for circle in networkx.strongly_connected_components(imports) if len(circle) > 1]


def test_imports_by_name_go_down():
    found = [
        (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), name)
        for path in sorted((ROOT / "rlrr_kernels").rglob("*.py"))
        for name in imported_by_name(path.read_text(encoding="utf-8"))
        if name != "rlrr_kernels._cpp"  # the extension: no module of a layer
    ]
    assert len(found) >= 4, found
    assert not [(module, name) for module, name in found if height(name) > height(module)]


def test_an_import_that_goes_up_is_found():
    assert imported_by_name('importlib.import_module(f"rlrr_kernels.train.{x}")') == ["rlrr_kernels.train."]
    assert height("rlrr_kernels.train.") > height("rlrr_kernels.ops.mlp") > height("rlrr_kernels.backends")


def test_no_folder_has_more_files_than_a_newcomer_reads_in_one_look():
    kinds = "*.py", "*.cpp", "*.h", "*.inl"
    folders = [ROOT / name for name in ("rlrr_kernels", "benchmarks", "tests", "csrc")]
    files = {file for folder in folders for kind in kinds for file in folder.rglob(kind) if file.stem != "__init__"}
    count = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert len(files) > 300
    assert not {folder: number for folder, number in count.items() if number > 14}
