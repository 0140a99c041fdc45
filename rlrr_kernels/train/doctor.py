"""What ``rlrr doctor`` prints: versions, devices, backends."""

from __future__ import annotations

import os
import platform
import shutil

import torch
from rich.table import Table

from rlrr_kernels import backends, devices
from rlrr_kernels.train.output.environment import versions


def report() -> list[Table]:
    """The tables, in the order they are printed."""
    return [_versions(), _devices(), _backends(), *([_kernels()] if backends.HAS_TRITON else [])]


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
        why_not = entry["unavailable"] | entry["distrusted"]
        reasons = [f"not {name}: {reason}" for name, reason in why_not.items()]
        if default != "auto":
            reasons.insert(0, f"chosen by {backends.ENVIRONMENT_VARIABLE}")
        table.add_row("rlrr_linear", device, entry["auto"], "; ".join(reasons) or "the fastest that runs here")
        on_triton = entry["auto"].startswith("triton")
        table.add_row(
            "norm_rescale", device, "triton" if on_triton else "torch", "triton beside a triton rlrr_linear, else torch"
        )
    return table


def _kernels() -> Table:
    """What decides whether and how Triton's kernels serve: GPUs, the C compiler, switches, verdicts, tuned tiles."""
    from rlrr_kernels.ops.choice import store
    from rlrr_kernels.ops.host import guard, launch

    table = Table("what", "state", title="Triton kernels")
    gpus = [devices.gpu_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        state = devices.distrust_of_triton(gpu.name) or "auto takes them"
        size = f"{gpu.name} with {gpu.multiprocessors} multiprocessors, tiles of {gpu.family}"
        table.add_row(f"cuda:{index}", f"{size}: {state}")
    table.add_row("C compiler", c_compiler() or "none: Triton builds its launcher at first use; install gcc, or set CC")
    for name, state in (
        (f"launches ({launch.LAUNCH_VARIABLE})", _launches),
        (f"check at first use ({guard.VARIABLE})", _checks),
        (f"tuned tiles ({store.SWITCH_VARIABLE})", lambda: _tuned(gpus)),
    ):
        try:
            table.add_row(name, state())
        except (ValueError, OSError) as error:  # a switch that is neither on nor off, a file that cannot be read
            table.add_row(name, str(error))
    return table


def c_compiler() -> str | None:
    """The compiler that Triton would call: ``CC``, else gcc or clang where one is on the path."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)


def _launches() -> str:
    from rlrr_kernels.ops.host import launch

    if launch.direct_allowed():
        return "past Triton's launcher where that is known to do, and replayed"
    return "by Triton's launcher, never replayed"


def _checks() -> str:
    from rlrr_kernels.ops.host import guard

    state = "on" if guard.enabled(torch.device("cuda")) else "off"
    found = guard.verdicts()
    wrong = [f"{name}: {verdict}" for name, verdict in found.items() if verdict != guard.RIGHT]
    counts = f"{len(found) - len(wrong)} kernels right, {len(wrong)} left to the library"
    lines = [f"{state}; {guard.checks_file()}: {counts}"]
    return "\n".join(lines + wrong)


def _tuned(gpus: list[devices.Gpu]) -> str:
    from rlrr_kernels.ops.choice import store

    path = store.cache_file()
    entries = store.read(path)
    lines = [f"{'on' if store.enabled() else 'off'}; {path}: {len(entries)} entries"]
    unproven = dict.fromkeys(name for gpu in gpus for name in store.unproven(entries, gpu))
    if unproven:
        used = (
            "used, though" if store.experimental_allowed() else f"used under {store.EXPERIMENTAL_VARIABLE}=on alone, as"
        )
        lines.append(f"{used} no GPU has proven their schedule: {'; '.join(unproven)}")
    return "\n".join(lines)
