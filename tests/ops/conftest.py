"""What tests of the C++ operators share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlrr_kernels.backends import cpu_level


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Has the operators use one of ``tests.support.levels.LEVELS``."""
    from rlrr_kernels.ops.linear.cpp_backend import set_cpu_level

    before = cpu_level()
    set_cpu_level(request.param)
    yield request.param
    set_cpu_level(before)
