"""Names that PyTorch and Triton do not promise stand in one file."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

PRIVATE = re.compile(
    r"(?<!\")\btorch(\.\w+)*\._[a-z]\w*|from torch[\w.]* import _|\bknobs\b|\.packed_metadata|\.launch_pdl"
)
ONE_FILE = "rlrr_kernels/ops/host/private.py"


def test_no_other_file_of_the_package_uses_one():
    found = {}
    for path in sorted((ROOT / "rlrr_kernels").rglob("*.py")):
        code = "\n".join(line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
        if names := sorted({match[0] for match in PRIVATE.finditer(code)}):
            found[str(path.relative_to(ROOT))] = names
    assert found.pop(ONE_FILE)
    assert not found, found
