"""What is known of GPUs: names, families, sizes and rates; no GPU is needed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlrr_kernels import backends, devices
from rlrr_kernels.devices import Peaks


@pytest.mark.parametrize(
    ("capability", "gcn", "name", "family"),
    [
        ((9, 0), None, "sm_90", "sm_90"),
        ((8, 0), None, "sm_80", "sm_80"),
        ((8, 6), None, "sm_86", "sm_80"),
        ((8, 9), None, "sm_89", "sm_80"),
        ((7, 5), None, "sm_75", "sm_80"),
        ((10, 0), None, "sm_100", "sm_100"),
        ((10, 3), None, "sm_103", "sm_100"),
        ((12, 0), None, "sm_120", "sm_80"),
        ((13, 0), None, "sm_130", "sm_80"),
        (None, "gfx942:sramecc+:xnack-", "gfx942", "gfx942"),
        (None, "gfx90a:sramecc+:xnack-", "gfx90a", "gfx942"),
        (None, "gfx950", "gfx950", "gfx950"),
        (None, "gfx1100", "gfx1100", "sm_80"),
        (None, None, "interpreter", "interpreter"),
    ],
)
def test_names_and_families(capability, gcn, name: str, family: str):
    assert devices.device_name(capability, gcn) == name
    assert devices.family_of(name) == family
    assert devices.typical(name).family == family


def properties(**fields: float) -> SimpleNamespace:
    return SimpleNamespace(multi_processor_count=132, **fields)


def test_a_gpu_is_as_large_and_fast_as_its_driver_says():
    h200 = devices.from_properties("sm_90", properties(clock_rate=1_980_000))
    assert h200 == devices.typical("sm_90"), "what the driver does not tell is the datasheet's"
    fields = {"multi_processor_count": 114, "clock_rate": 1_755_000, "memory_clock_rate": 1_593_000}
    pcie = devices.from_properties("sm_90", SimpleNamespace(**fields, memory_bus_width=5120))
    assert pcie.multiprocessors == 114
    assert math.isclose(pcie.peaks.half, 756e12, rel_tol=0.01), "an H100 PCIe's datasheet"
    assert math.isclose(pcie.peaks.bandwidth, 2.04e12, rel_tol=0.01)
    l4 = {"multi_processor_count": 58, "clock_rate": 2_040_000, "memory_clock_rate": 6_251_000, "memory_bus_width": 192}
    assert math.isclose(devices.from_properties("sm_89", SimpleNamespace(**l4)).peaks.half, 121e12, rel_tol=0.03)
    assert math.isclose(devices.from_properties("sm_89", SimpleNamespace(**l4)).peaks.bandwidth, 300e9, rel_tol=0.01)


def test_a_property_that_is_missing_or_zero_is_the_datasheets():
    for given in (SimpleNamespace(), properties(clock_rate=0, memory_clock_rate=0, memory_bus_width=5120)):
        assert devices.from_properties("sm_90", given) == devices.typical("sm_90")
    mi300 = properties(memory_clock_rate=1_300_000, memory_bus_width=8192)
    assert devices.from_properties("gfx942", mi300).peaks.bandwidth == 5.3e12, "AMD counts clocks otherwise"


def test_a_gpu_without_a_datasheet_is_its_familys():
    assert devices.typical("sm_101")[2:] == devices.typical("sm_100")[2:]
    assert devices.typical("gfx1100")[2:] == devices.typical("sm_80")[2:]
    assert isinstance(devices.typical("sm_86").peaks, Peaks)


NVIDIA = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"]


@pytest.mark.parametrize("name", [*NVIDIA, "gfx90a", "gfx942", "gfx950"])
def test_auto_takes_triton_where_it_has_matrix_instructions_and_was_compiled(name: str):
    assert devices.distrust_of_triton(name) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sm_70", "compute capability 7.0"), ("sm_75", "compute capability 7.5"), ("sm_61", "compute capability 6.1"),
        ("gfx908", "this is gfx908"), ("gfx1100", "this is gfx1100"), ("gfx1201", "this is gfx1201"),
    ],
)  # fmt: skip
def test_auto_leaves_other_gpus_to_the_library(name: str, reason: str):
    assert reason in devices.distrust_of_triton(name)


def test_every_family_ships_tiles_and_every_trusted_amd_gpu_is_compiled_for():
    tiles = pytest.importorskip("rlrr_kernels.ops.choice.tiles")
    assert {devices.family_of(name) for name in devices.SHARED_BYTES} == set(tiles.TABLE)
    report = pytest.importorskip("benchmarks.compile_report")
    assert set(devices.COMPILED_AMD) <= set(report.TARGETS)


# ---------------------------------------------------------------- what ``auto`` takes


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 and an H200, the T4 the current one."""
    found = [devices.typical("sm_75"), devices.typical("sm_90")]
    monkeypatch.setattr(devices, "gpu_of", lambda device: found[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(backends, "_default", "auto")


@pytest.mark.usefixtures("gpus")
def test_auto_chooses_for_the_device_of_x():
    t4, h200 = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [backends.resolve("auto", device, torch.float16) for device in (t4, h200, "cuda")] == [
        "torch", "triton", "torch",
    ]  # fmt: skip
    assert backends.resolve("auto", h200, torch.float64) == "torch"
    assert backends.resolve("triton", t4, torch.float16) == "triton", "who asks for it by name gets it"


@pytest.mark.usefixtures("gpus")
def test_a_compiler_sees_the_choice_as_a_constant():
    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x: torch.Tensor) -> torch.Tensor:
        names = [backends.resolve("auto", torch.device("cuda", index), x.dtype) for index in (0, 1)]
        return x + (1 if names == ["torch", "triton"] else 100)

    assert chosen(torch.zeros(2)).tolist() == [1, 1]
