"""Makes a kernel give way to the library's products where it does not compile, is compiled badly, or is wrong.

What was released was run by no GPU of most kinds. So the first launches of a kernel on a device are looked at: an error
of the compiler, many spilled registers or a 16-bit product without matrix instructions, and then its first results,
held against the formula (:mod:`rlrr_kernels.ops.host.formula`); where that overflows, as in a gradient scaler's first
steps, those of a later launch. A kernel is one of its constants, dtypes and tiles. Once its verdict is in, a launch
costs one look-up more, and a replayed call nothing: a replay is made of kernels that passed. Verdicts on results are
kept in ``checks.json`` beside the tuner's tiles.

``RLRR_CHECK=off`` turns all of it off. Under Triton's interpreter it is off unless ``RLRR_CHECK=on``, and for a path
that a caller forces it is off: errors are then raised.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from rlrr_kernels.ops.host import launch as launching
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.cache import cache_folder, gpu_name, switched_on, write_json
from rlrr_kernels.ops.host.formula import NotFinite
from rlrr_kernels.ops.host.launch import Launch

VARIABLE = "RLRR_CHECK"
FORMAT = 1
RIGHT = "right"
"""The verdict of a kernel whose results were within the bound."""

SPILLED_REGISTERS = 16
"""A kernel that keeps more of a thread's registers in memory gives way. By what was compiled for GPUs that it was not
tuned on: where the tiles suit, 2 at most are spilled; where they do not, 46 to 1,475, and at 16, 64 bytes a thread, a
warp's loads and stores of them in a step are as many bytes as a tile of a 16-bit operand."""

SPILLED_ONCE = 128
"""The same where no loop has them: at eight warps 256 KiB a program, an eighth of what it reads of 4,096 rows."""

_HALF_PRODUCT = re.compile(r"tt\.dot .*: tensor<[\dx]*(bf16|f16)>")
_MATRIX_INSTRUCTION = {
    "ptx": re.compile(r"\b(mma|wgmma|tcgen05)\."),
    "amdgcn": re.compile(r"\bv_(mfma|smfmac|wmma|swmmac)_"),
}


@functools.cache
def enabled(device: torch.device) -> bool:
    """Whether kernels on a device are looked at; the environment is asked once, and again after :func:`forget`.

    Raises:
        ValueError: ``RLRR_CHECK`` is neither "on" nor "off".
    """
    return switched_on(VARIABLE, "off" if device.type == "cpu" else "on")


def capturing() -> bool:
    """Whether a CUDA graph records what is launched, so that nobody can look at results."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def will_look(launches: Sequence[Launch]) -> bool:
    """Whether :func:`ran` is going to look at them, so that inputs which they write over have to be kept."""
    return None in _known(launches)


def ran(launches: Sequence[Launch], forced: bool, find_error: Callable[[], str | None] | None = None) -> bool:
    """Runs launches, and whether their results may be used: if not, the library has to compute them.

    Args:
        launches: of one computation, in their order.
        forced: whether the caller asked for these kernels by name: then they are run, whatever is known of them.
        find_error: what is wrong with the results, None for nothing; called once for each kernel, device and version.
    """
    known = [True] if forced else _known(launches)
    if False in known:
        return False
    if None not in known:
        for launch in launches:
            launch.run()
        return True
    names = [_name(launch, launch.tensors[0].device) for launch in launches]
    if any(name in _given_up for name in names):
        return _settle(launches, False)
    try:
        for launch in launches:
            launch.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        _give_up(names, in_a_line(error))
        return _settle(launches, False)
    for launch, name in zip(launches, names, strict=True):
        if fault := compiler_fault(launch.plan.compiled):
            _give_up([name], fault)  # its results are right, if slow
    if any(name in _given_up for name in names):
        _settle(launches, False)
        return True
    if capturing():
        return _unsettled(launches)
    kept = _kept()
    if find_error is not None and not all(kept.get(name) == RIGHT for name in names):
        wrong = next((kept[name] for name in names if kept.get(name, RIGHT) != RIGHT), None)
        try:
            error = f"{wrong}, when it was first used here" if wrong else _first_error(find_error)
        except NotFinite:
            return _unsettled(launches)
        if wrong is None:
            _keep(dict.fromkeys(names, error or RIGHT))
        if error is not None:
            _give_up(names, error)
            return _settle(launches, False)
    return _settle(launches, True)


def same_bits(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether a replay's first results are those of the call that it repeats; if not, replays end with one warning."""
    if all(
        a is b if a is None or b is None else torch.equal(_bits(a), _bits(b))
        for a, b in zip(actual, expected, strict=True)
    ):
        return True
    launching.give_up_direct("a replayed call gave other bits than the call that it repeats")
    return False


def _bits(tensor: Tensor) -> Tensor:
    """What a result is made of, in which a NaN is equal to itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def given_up() -> dict[str, str]:
    """The kernels that gave way in this process, and why."""
    return dict(_given_up)


def verdicts() -> dict[str, str]:
    """What is kept of kernels' first results on any GPU of this user: :data:`RIGHT`, or what was wrong."""
    return dict(_kept())


def compiler_fault(compiled: object) -> str | None:
    """What is wrong with a compiled kernel; None for nothing, or if it was interpreted."""
    if compiled is None:
        return None
    spilled = private.spilled_registers(compiled)
    if spilled > SPILLED_ONCE or (spilled > SPILLED_REGISTERS and private.spills_in_loops(compiled)):
        return f"the compiler spills {spilled} registers"
    if _HALF_PRODUCT.search(private.code(compiled, "ttir")):
        texts = {kind: text for kind in _MATRIX_INSTRUCTION if (text := private.code(compiled, kind))}
        if texts and not any(_MATRIX_INSTRUCTION[kind].search(text) for kind, text in texts.items()):
            return "the compiler multiplies 16-bit tiles without matrix instructions"
    return None


def forget() -> None:
    """Looks at every kernel, and at the environment, again."""
    enabled.cache_clear()
    _given_up.clear()
    _kept.cache_clear()


_given_up: dict[str, str] = {}


def _known(launches: Sequence[Launch]) -> list[bool | None]:
    """The verdict of each launch's kernel; None where none is in."""
    if not enabled(launches[0].tensors[0].device):
        return [True]
    return [launch.plan.verdicts.get(launch.key) for launch in launches]


def _settle(launches: Sequence[Launch], verdict: bool) -> bool:
    """Notes the verdict where the next launch looks for it; a kernel that gave way is started by Triton, if at all."""
    for launch in launches:
        launch.plan.verdicts[launch.key] = verdict
        if not verdict:
            launch.plan.starts.clear()
    return verdict


def _unsettled(launches: Sequence[Launch]) -> bool:
    """Lets the results be used, and no launch be replayed: replays are made of kernels with a verdict."""
    for launch in launches:
        launch.plan.starts.clear()
    return True


def _name(launch: Launch, device: torch.device) -> str:
    """What a verdict holds for."""
    plan = launch.plan
    dtypes = ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in launch.tensors))
    constants = ", ".join(f"{name}={value}" for name, value in plan.meta.items())
    kernel = getattr(plan.kernel, "__name__", str(plan.kernel))
    source = private.source_hash(plan.kernel)
    return " | ".join([gpu_name(device), f"triton {triton.__version__}", kernel, source, dtypes, constants])


def _first_error(find_error: Callable[[], str | None]) -> str | None:
    try:
        with private.unwatched():  # to look is no part of a call
            return find_error()
    except torch.OutOfMemoryError:
        return None  # there is no room to look
    except NotFinite:
        raise
    except Exception as error:
        return in_a_line(error)


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _give_up(names: Sequence[str], reason: str) -> None:
    new = [name for name in names if name not in _given_up]
    _given_up.update(dict.fromkeys(new, reason))
    if new:
        warnings.warn(
            f"a Triton kernel gives way to the library's products: {reason}. Results stay right, if slower. Please "
            f"report it with the lines below. {VARIABLE}=off turns the check off; {checks_file()} keeps its verdicts:\n"
            + "\n".join(new),
            stacklevel=3,
        )


def checks_file() -> Path:
    """Where verdicts on kernels' first results are kept."""
    return cache_folder() / "checks.json"


@functools.cache
def _kept() -> dict[str, str]:
    """Read once; a file that cannot be read is as good as none."""
    try:
        content = json.loads(checks_file().read_text(encoding="utf-8"))
        found = content["verdicts"] if content["format"] == FORMAT else {}
        return {str(name): str(verdict) for name, verdict in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(verdicts: dict[str, str]) -> None:
    """Adds to what is kept. Of processes that write at once the last one wins: what is lost is looked at again."""
    if any(name.split(" | ")[0] == "interpreter" or " | unknown | " in name for name in verdicts):
        return _kept().update(verdicts)
    _kept.cache_clear()
    _kept().update(verdicts)
    with contextlib.suppress(OSError):  # in a folder that cannot be written: every process looks for itself
        write_json(checks_file(), {"format": FORMAT, "verdicts": dict(sorted(_kept().items()))})
    return None
