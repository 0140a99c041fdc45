"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

from rlrr_kernels import backends
from rlrr_kernels.ops.host import private

# Where a kernel is wrong or does not compile a test must fail, not take the library's products.
os.environ.setdefault("RLRR_CHECK", "off")

if backends.INTERPRETING:
    from tests.support import interpreter_bf16

    interpreter_bf16.install()

# A pool of compiling processes would import torch once more for each process of tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Tiny problems: on a busy machine a second thread waits for its core ten times longer than it computes.
torch.set_num_threads(1)

# Remembers torch.empty and its like at the first call: not while a test has replaced them.
_device_constructors()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The process with Triton's interpreter on imports only files with a test for it: the others take 10 seconds."""
    chosen = backends.INTERPRETING and config.option.markexpr.startswith("interpreted")
    if chosen and collection_path.match("test_*.py"):
        return "interpreted" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ``slow_interpreted`` is ``slow`` in the process with Triton's interpreter on."""
    if backends.INTERPRETING:
        for item in items:
            if item.get_closest_marker("slow_interpreted"):
                item.add_marker(pytest.mark.slow)


READ_AGAIN = ("RLRR_", "TRITON_", "CC", "CUDA_", "PATH", "TMPDIR", "HOME", "LC_", "COLUMNS")
"""Names and beginnings of variables that the package and its tools read while they run."""


def settings_of_the_process() -> dict[str, object]:
    """What a test may change and has to put back: else its neighbours depend on the order in which they run."""
    found = {
        "working directory": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(READ_AGAIN)},
        "backend": backends.default_backend(),
        "torch's defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "float32 products": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "interrupts": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }
    if launch := sys.modules.get("rlrr_kernels.ops.host.launch"):
        found["launches given up"] = launch.direct is False
        found["Triton's driver"] = launch.triton.runtime.driver._active
    if guard := sys.modules.get("rlrr_kernels.ops.host.guard"):
        found["kernels given up"] = guard.given_up()
    if store := sys.modules.get("rlrr_kernels.ops.choice.store"):
        found["forced tiles"] = dict(store._forced)
    return found


AT_IMPORT = {"launches given up": False, "kernels given up": {}, "forced tiles": {}}
"""What modules begin with that a test may be the first to import."""


def changes(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Setting → what it was and is."""
    before = AT_IMPORT | before
    return {name: (before[name], now) for name, now in after.items() if name in before and before[name] != now}


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """Fails the test that leaves a setting of the process changed, instead of the one that meets it.

    Random numbers are the same in whatever order tests run.
    """
    torch.manual_seed(0)
    before = settings_of_the_process()
    yield
    after = settings_of_the_process()
    changed = changes(before, after)
    assert not changed, f"left changed (before, after): {changed}"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``torch.empty`` and ``empty_like`` return with NaN, so that memory nobody wrote shows in results."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with private.unwatched():  # else a watched call would have computed something
                    tensor.detach().fill_(float("nan"))
            return tensor

        return allocate_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def rlrr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs ``rlrr ARGUMENTS``; returns the exit status and what was printed, on one line."""
    cli = pytest.importorskip("rlrr_kernels.cli", reason="the program needs typer and rich")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rlrr", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, " ".join("".join(capsys.readouterr()).split())

    return run
