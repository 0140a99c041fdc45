"""What ``mkdocs.yml`` needs beside MkDocs: the pages of the site, and docstrings' references as links.

The site mirrors the repository (README.md is its front page, this folder is docs/), so that a link leads to the same
place on both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    *("*.md", "CITATION.cff", "LICENSE", "benchmarks/results/*.*"),
    *("docs/**/*.md", "docs/*.css", "docs/pictures/*.png", "docs/pictures/*.svg"),
)
"""Files of the repository that the site has, under the same paths."""

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_TAG = re.compile(r"(`+)[^`]+\1|<(?=\w)")  # code, or what would be read as HTML


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replaces what MkDocs found in docs/ by :data:`SHOWN`; the theme's files stay."""
    paths = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern)})
    shown = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files([*shown, *(file for file in files if not (file.abs_src_path or "").startswith(str(ROOT / "docs")))])


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings: Sphinx's roles become links, and ``FOLDER/<class>`` stays what it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object it has read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(docstring: str, owner: griffe.Object) -> str:
    """The docstring of ``owner`` in Markdown; a reference to what the site does not document stays code."""
    text = _TAG.sub(lambda found: "&lt;" if found[0] == "<" else found[0], docstring)
    return _ROLE.sub(lambda found: _link(owner, found[2], short=bool(found[1])), text)


def _link(owner: griffe.Object, name: str, *, short: bool) -> str:
    target = name
    if not name.startswith("rlrr_kernels."):
        try:
            target = owner.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
