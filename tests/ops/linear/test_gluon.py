"""The kernel scheduled by hand for Hopper: how it is launched, and when it is chosen."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.versions import version_of

triton = pytest.importorskip("triton", reason="needs Triton")

from rlrr_kernels import backends, devices
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels.ops.linear.tiles import Tiles
from rlrr_kernels.ops.tuning import store as tuned_tiles
from rlrr_kernels.ops.tuning import tiles as tuning

KERNELS = ("forward", "grad_x")

needs_compiler = pytest.mark.skipif(backends.INTERPRETING, reason="with Triton's interpreter on, nothing compiles")
needs_gluon = pytest.mark.skipif(
    version_of("triton") < (3, 6),
    reason=f"Triton {triton.__version__} lacks what the kernel uses of Gluon",
)


# ---------------------------------------------------------------- how it is launched


def drawn(*sizes: int, **options) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in Case(*sizes, dtype=torch.bfloat16, **options).draw(0).items()}


def launch_of(kernel: str, rows=300, n=2304, k=768, groups=3, tiles: Tiles | None = None):
    draw = drawn(rows, n, k, groups=groups)
    tiles = tiles or tuning.EXPERIMENTAL_CANDIDATES[kernel, 2][0]
    (launch,) = tuning.launches_of(kernel, draw, devices.typical("sm_90"), tiles)
    return launch, draw


@needs_compiler
@needs_gluon
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_driver_is_given_the_matrices_and_their_blocks(kernel: str):
    from benchmarks.support.fake_cuda import fake_cuda

    launch, draw = launch_of(kernel)
    with fake_cuda() as cuda:
        for _ in range(2):
            cuda.record(["tensordesc", "i32", "i32", "i64", "i64"] * 4)  # Triton adds sizes and strides
            launch.run()
            sent = cuda.last()
    assert sent["block"] == 384, "two groups of warps that multiply, one that copies"
    rows, contracted = (2304, 768) if kernel == "forward" else (768, 2304)
    assert sent["grid"] == [rows // 128 * 2, 1, 1]
    # Address, columns and rows, bytes from one row to the next, columns and rows of a block, type, swizzle.
    x, weight, col, y = (sent["parameters"][first : first + 8] for first in range(0, 80, 20))
    swizzled, plain, bf16, fp32 = 3, 0, 9, 7  # as the driver numbers them
    assert x[1:] == [contracted, 300, 2 * contracted, 64, 256, bf16, swizzled]
    assert weight == [draw["weight"].data_ptr(), 768, 2304, 2 * 768, 64, 64, bf16, swizzled]
    assert col[1:] == [contracted, 3 if kernel == "forward" else 1, 4 * contracted, 64, 1, fp32, plain]
    assert y[1:] == [rows, 300, 2 * rows, 64, 256, bf16, swizzled]


@needs_gluon
def test_tiles_that_the_kernel_does_not_have_are_refused():
    for tiles in (Tiles(256, 64, 64, 4, 3), Tiles(256, 128, 64, 8, 3), Tiles(256, 128, 64, 4, 1)):
        with pytest.raises(ValueError, match="schedule gluon"):
            launch_of("forward", tiles=tiles._replace(schedule="gluon"))
    with pytest.raises(ValueError, match="schedule of grad_scales"):
        launch_of("grad_scales", tiles=Tiles(64, 128, 128, 8, 4, schedule="gluon"))


# ---------------------------------------------------------------- when it is chosen


@pytest.fixture
def checked_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were one of the versions for which the tuner tries the kernel."""
    monkeypatch.setattr(tuning.triton, "__version__", f"{tuning.GLUON_TRITONS[0]}0")


def tried(kernel="forward", arch="sm_90", dtype=torch.bfloat16, rows=4096, experimental=True) -> list[Tiles]:
    found = tuning.candidates(kernel, devices.typical(arch), dtype, rows, experimental)
    return [tiles for tiles in found if tiles.schedule in linear_configs.MAY_HANG]


@pytest.mark.usefixtures("checked_compiler")
def test_it_is_tried_only_when_asked_for():
    for kernel in linear_configs.KERNELS:
        for rows in (8, 64, 4096):
            assert bool(tried(kernel, rows=rows)) == (kernel in KERNELS and rows == 4096)
            assert not tried(kernel, rows=rows, experimental=False)
    assert not tried(arch="sm_100")
    assert not tried(arch="interpreter")
    assert not tried(dtype=torch.float32)


@pytest.mark.usefixtures("checked_compiler")
def test_it_is_not_tried_with_a_compiler_that_was_never_checked(monkeypatch: pytest.MonkeyPatch):
    assert tried()
    monkeypatch.setattr(tuning.triton, "__version__", "3.60.0")
    assert not tried()


@pytest.mark.parametrize("kernel", KERNELS)
def test_tuned_tiles_serve_only_what_it_can(kernel: str):
    gluon = tuning.EXPERIMENTAL_CANDIDATES[kernel, 2][0]

    def chosen(rows=1576, shape=(768, 768), dtype=torch.bfloat16, groups=1, rank=1, arch="sm_90") -> str:
        x, weight = torch.empty(rows, shape[1], dtype=dtype), torch.empty(shape, dtype=torch.bfloat16)
        with tuned_tiles.only_tiles(kernel, gluon):
            return tuned_tiles.choose_tiles(
                kernel, devices.typical(arch), "ieee", x, weight, weight, rank, groups
            ).schedule

    assert chosen() == chosen(groups=3) == "gluon"
    others = {"shape": (772, 768)}, {"shape": (768, 772)}, {"groups": 4}, {"rank": 2}, {"arch": "sm_80"}
    for changes in (*others, {"dtype": torch.float32}):
        assert chosen(**changes) == "tiled", changes


def test_the_tuner_says_what_it_does_not_serve():
    draw = drawn(300, 768, 768, rank=2)
    reason = tuning.rejection(
        "forward", draw, devices.typical("sm_90"), tuning.EXPERIMENTAL_CANDIDATES["forward", 2][0]
    )
    assert reason == "the schedule gluon does not serve this problem"


# ---------------------------------------------------------------- on a GPU

ON_A_GPU = """
import sys, torch
from rlrr_kernels.numerics import Case
from rlrr_kernels.ops.linear import tiles as linear_configs
from rlrr_kernels import devices
from rlrr_kernels.ops.tuning import tiles as tuning

kernel, dtype, device = sys.argv[1], getattr(torch, sys.argv[2]), torch.device("cuda", 0)
arch = devices.gpu_of(device)
for groups, sizes in (3, (4096, 2304, 768)), (1, (12608, 768, 3072)), (1, (300, 1000, 776)):
    drawn = Case(*sizes, groups=groups, dtype=dtype, device=str(device)).draw(0)
    drawn = {name: tensor.detach() for name, tensor in drawn.items()}
    for tiles in tuning.candidates(kernel, arch, dtype, 4096, experimental=True):
        if tiles.schedule in linear_configs.MAY_HANG:
            reason = tuning.rejection(kernel, drawn, arch, tiles)
            assert reason is None, (sizes, tiles, reason)
"""


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_ends_and_is_exact(kernel: str, dtype: str):
    """In a process of its own: one whose kernel hangs can only be killed."""
    command = [sys.executable, "-c", ON_A_GPU, kernel, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
