"""What ``rlrr doctor`` prints: versions, devices, backends."""

from __future__ import annotations

import os
import platform

import torch
from rich.table import Table

from rlrr_kernels import backends
from rlrr_kernels.train.output.environment import versions


def report() -> list[Table]:
    """The tables, in the order they are printed."""
    return [_versions(), _devices(), _backends()]


def _versions() -> Table:
    table = Table("package", "version", title="versions")
    for name, version in versions().items():
        table.add_row(name, version)
    return table


def _devices() -> Table:
    table = Table("device", "what", "memory", title="devices")
    memory = _system_memory()
    table.add_row("cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", memory)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        table.add_row(f"cuda:{index}", kind, f"{properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU, or no driver for it"
        table.add_row("cuda", f"not available: {reason}", "")
    return table


def _system_memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        return "unknown"


def _backends() -> Table:
    default = backends.default_backend()
    table = Table("operator", "device", "backend", "why", title=f"backends (default: {default})")
    try:
        found = backends.backend_report()
    except ValueError as error:  # the default was set to what cannot run on one of the devices
        table.add_row("all", "", "none", str(error))
        return table
    for device, entry in found["devices"].items():
        reasons = [f"not {name}: {reason}" for name, reason in entry["unavailable"].items()]
        if default != "auto":
            reasons.insert(0, f"chosen by {backends.ENVIRONMENT_VARIABLE}")
        table.add_row("rlrr_linear", device, entry["auto"], "; ".join(reasons) or "the fastest that runs here")
        on_triton = entry["auto"].startswith("triton")
        table.add_row(
            "norm_rescale", device, "triton" if on_triton else "torch", "triton beside a triton rlrr_linear, else torch"
        )
    return table
