"""``import rlrr_kernels`` needs torch alone, touches no GPU and is quick."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from rlrr_kernels import backends

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import rlrr_kernels
end = time.perf_counter()
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"torch": middle - start, "ours": end - middle, "new": new, "cuda": torch.cuda.is_initialized()}))
"""


EXTRAS = {
    "timm", "triton", "numpy", "safetensors", "accelerate", "typer", "rich", "matplotlib", "peft", "transformers",
}  # fmt: skip


def test_import_takes_torch_alone_and_no_gpu_and_adds_at_most_a_tenth_to_import_torch():
    command = [sys.executable, "-c", SCRIPT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    found = [json.loads(done.stdout) for done in runs]
    assert not any(run["cuda"] for run in found)
    assert not EXTRAS & set(found[0]["new"]), found[0]["new"]
    best = min(found, key=lambda run: run["ours"])
    assert best["ours"] <= 0.10 * best["torch"], best


def test_an_extension_that_was_built_is_used():
    """Its own tests are skipped without it: one that does not load must not pass for one that nobody built."""
    if importlib.util.find_spec("rlrr_kernels._cpp") is None:
        pytest.skip("the C++ extension is not built")
    assert backends.CPP_FAILURE is None
