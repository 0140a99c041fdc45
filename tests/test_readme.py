"""The code of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    if "timm" in code:
        pytest.importorskip("timm", reason="needs timm and safetensors, of the extra [models]")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
