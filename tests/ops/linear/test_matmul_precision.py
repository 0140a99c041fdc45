"""TF32 and its like: what products of float32 may be rounded to, under PyTorch's old switch and its new ones."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels import backends, devices, rlrr_linear
from rlrr_kernels.numerics import Case, check_bound
from rlrr_kernels.ops.dtypes import matmul_precision
from tests.support.matmul_precision import CUBLAS, ONEDNN, TF32_SWITCHES, switched

SETTINGS = [  # what is set in turn, then what products of a GPU and of a CPU may be rounded to
    ((), "ieee", "ieee"),
    (("highest",), "ieee", "ieee"),
    (("high",), "tf32", "tf32"),
    (("medium",), "tf32", "bf16"),
    (((*CUBLAS, "tf32"),), "tf32", "ieee"),
    (((*CUBLAS, "ieee"),), "ieee", "ieee"),
    (((*ONEDNN, "bf16"),), "ieee", "bf16"),
    (((*ONEDNN, "tf32"),), "ieee", "tf32"),
    ((("generic", "all", "tf32"),), "tf32", "tf32"),
    ((("cuda", "all", "tf32"),), "tf32", "ieee"),
    ((("generic", "all", "tf32"), (*CUBLAS, "ieee")), "ieee", "tf32"),
    (("high", (*CUBLAS, "ieee")), "ieee", "tf32"),
    (((*CUBLAS, "tf32"), "highest"), "ieee", "ieee"),
]


@pytest.mark.parametrize(("settings", "gpu", "cpu"), SETTINGS, ids=str)
def test_the_precision_is_that_of_the_librarys_products(settings: tuple, gpu: str, cpu: str):
    with switched(*settings):
        assert (matmul_precision(), matmul_precision("cuda"), matmul_precision("cpu")) == (gpu, gpu, cpu)
    assert (matmul_precision(), matmul_precision("cpu")) == ("ieee", "ieee")


@pytest.mark.parametrize("switch", TF32_SWITCHES)
@pytest.mark.parametrize(
    "backend", [name for name in ("torch", "cpp", "triton.fused") if not backends.unavailable(name, "cpu")]
)
def test_calls_work_under_every_switch(switch: str, backend: str):
    """PyTorch itself refuses to tell the old switch's value once a new one was touched."""
    tensors = Case(9, 33, 40, dtype=torch.float16).draw(0)
    with TF32_SWITCHES[switch]():
        check_bound(lambda *args, **options: rlrr_linear(*args, backend=backend, **options), tensors)
        single = {name: tensor.float() for name, tensor in tensors.items() if name != "grad_y"}
        y = rlrr_linear(*single.values(), backend=backend)
    # Of TF32's and bfloat16's digits, which oneDNN may take on a processor that has them.
    torch.testing.assert_close(y, rlrr_linear(*single.values(), backend="torch"), rtol=0.05, atol=0.5)


@pytest.mark.skipif(backends.unavailable("cpp", "cpu") is not None, reason="needs the C++ operator")
def test_the_cpu_leaves_products_that_may_be_rounded_to_the_library():
    from rlrr_kernels.ops.linear import cpp_backend

    ways = {settings: None for settings, _, _ in SETTINGS}
    for settings in ways:
        with switched(*settings):
            ways[settings] = cpp_backend._way("auto", torch.float32) == cpp_backend.PATHS["library"]
            assert cpp_backend._way("auto", torch.bfloat16) == cpp_backend.PATHS["auto"]
    assert ways == {settings: cpu != "ieee" for settings, _, cpu in SETTINGS}


def test_kernels_multiply_in_tf32_where_it_was_asked_for_and_triton_has_it():
    pytest.importorskip("triton", reason="needs Triton")
    from rlrr_kernels.ops.linear.triton.launches import precision_of

    able = (*map(devices.typical, ("sm_90", "sm_80", "sm_86", "sm_100", "sm_120", "gfx942", "interpreter")),)
    amd = (*map(devices.typical, ("gfx90a", "gfx950", "gfx1100", "gfx1201")),)
    for switch in TF32_SWITCHES.values():
        with switch():
            assert {precision_of(torch.float32, gpu, matmul_precision()) for gpu in able} == {"tf32"}
            assert {precision_of(torch.float32, gpu, matmul_precision()) for gpu in amd} == {"ieee"}, (
                "tl.dot does not compile there"
            )
            assert precision_of(torch.float16, able[0], matmul_precision()) == "ieee"
    assert precision_of(torch.float32, able[0], matmul_precision()) == "ieee"
