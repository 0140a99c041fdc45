"""The site of ``make docs``: its API pages name the public API, and docstrings come out as they are meant."""

from __future__ import annotations

import importlib.util
import pkgutil
import re

import pytest

import rlrr_kernels
from tests.support.paths import ROOT

griffe = pytest.importorskip("griffe", reason="needs mkdocstrings, of the extra [docs]")
pytest.importorskip("mkdocs", reason="needs mkdocs, of the extra [docs]")

DOCUMENTED = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def test_the_api_pages_name_all_that_the_package_exports():
    exported = {f"rlrr_kernels.{name}" for name in rlrr_kernels.__all__} - {"rlrr_kernels.__version__"}
    assert exported <= set(DOCUMENTED)
    assert len(DOCUMENTED) == len(set(DOCUMENTED))


def test_the_menu_has_every_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f"- {page}\n" not in menu]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_an_api_page_names_has_a_docstring(name):
    pytest.importorskip("accelerate", reason="the training library needs accelerate")
    assert pkgutil.resolve_name(name).__doc__


def test_docstrings_become_markdown():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    module = griffe.visit("m", filepath=ROOT / "m.py", code="class C:\n    def f(self): ...\n")
    docstring = "FOLDER/<class>, ``a<b>``; :meth:`f`, :func:`~rlrr_kernels.rlrr_linear`, :data:`NOWHERE`: x < 1"
    assert site.markdown(docstring, module["C"]) == (
        'FOLDER/&lt;class>, ``a<b>``; <autoref identifier="m.C.f" optional><code>f</code></autoref>, '
        '<autoref identifier="rlrr_kernels.rlrr_linear" optional><code>rlrr_linear</code></autoref>, `NOWHERE`: x < 1'
    )
