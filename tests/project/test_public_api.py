"""The public API is what ``public_api.txt`` says."""

from __future__ import annotations

import difflib

import pytest

pytest.importorskip("typer", reason="the program needs the extra [train]")
pytest.importorskip("peft", reason="the method of PEFT needs the extra [peft]")

from tests.project.public_api import FILE, describe


def test_public_api_is_the_pinned_one():
    pinned, found = FILE.read_text(encoding="utf-8").splitlines(), describe().splitlines()
    difference = "\n".join(difflib.unified_diff(pinned, found, "pinned", "found", lineterm="", n=1))
    assert not difference, (
        f"the public API changed; where that is meant, run python -m tests.project.public_api and say so in "
        f"CHANGELOG.md\n{difference}"
    )
