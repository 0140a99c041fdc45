"""A test that leaves a setting of the process changed fails itself: that the fixture sees it."""

from __future__ import annotations

import os

import pytest
import torch

from tests import conftest

pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends
from rlrr_kernels.ops.host import launch


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("launches given up", lambda patch: patch.setattr(launch, "direct", False)),
        ("backend", lambda patch: patch.setattr(backends, "_default", "torch")),
        ("environment", lambda patch: patch.setenv("RLRR_CHECK", "perhaps")),
        ("working directory", lambda patch: patch.chdir(os.sep)),
        ("Triton's driver", lambda patch: patch.setattr(launch.triton.runtime.driver, "_active", object())),
        ("autograd", lambda patch: patch.setattr(torch, "is_grad_enabled", lambda: False)),
    ],
)
def test_what_a_test_leaves_changed_is_found(name: str, change, monkeypatch: pytest.MonkeyPatch):
    before = conftest.settings_of_the_process()
    assert not conftest.changes(before, conftest.settings_of_the_process())
    change(monkeypatch)
    after = conftest.settings_of_the_process()
    assert list(conftest.changes(before, after)) == [name]
    if name in conftest.AT_IMPORT:  # the module was imported by the test
        del before[name]
        assert list(conftest.changes(before, after)) == [name]
