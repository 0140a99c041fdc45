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


def measure() -> dict:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_takes_torch_alone_and_no_gpu():
    found = measure()
    assert not found["cuda"]
    extras = {
        "timm",
        "triton",
        "numpy",
        "safetensors",
        "accelerate",
        "typer",
        "rich",
        "matplotlib",
        "peft",
        "transformers",
    }
    assert not extras & set(found["new"]), found["new"]


def test_import_adds_at_most_a_tenth_to_import_torch():
    best = min((measure() for _ in range(3)), key=lambda found: found["ours"])
    assert best["ours"] <= 0.10 * best["torch"], best


def test_an_extension_that_was_built_is_used():
    """Its own tests are skipped without it: one that does not load must not pass for one that nobody built."""
    if importlib.util.find_spec("rlrr_kernels._cpp") is None:
        pytest.skip("the C++ extension is not built")
    assert backends.CPP_FAILURE is None
