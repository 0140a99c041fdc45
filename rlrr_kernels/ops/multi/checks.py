"""What ``rlrr_linear_multi`` takes beside what ``rlrr_linear`` does: stacks of scales and an index."""

from __future__ import annotations

from torch import Tensor

from rlrr_kernels.ops.checks import check_input, check_parameters
from rlrr_kernels.ops.multi.task_index import TaskIndex, check_index


def check_samples(x: Tensor, weight: Tensor) -> None:
    """x [S, ..., K] fits weight [N, K]."""
    check_input(x, weight)
    if x.dim() < 2:
        raise ValueError(f"x must be [S, ..., K], S samples; got shape {tuple(x.shape)}")


def check_stacks(
    weight: Tensor, scale_row: Tensor | None, scale_col: Tensor | None, bias: Tensor | None, shift: Tensor | None
) -> int:
    """Stacks and bias fit weight [N, K] and each other; returns T."""
    check_parameters(weight, scale_row, scale_col, bias, stacked=True)
    rows = weight.shape[0]
    if shift is not None and (shift.dim() != 2 or shift.shape[1] != rows):
        raise ValueError(f"shift must be [T, N] with N = {rows}; got shape {tuple(shift.shape)}")
    stacks = {"scale_row": scale_row, "scale_col": scale_col, "shift": shift}
    found = {name: stack.shape[0] for name, stack in stacks.items() if stack is not None}
    if not found:
        raise ValueError("scale_row, scale_col and shift must not all be None: their first dimension is T")
    first = next(iter(found.values()))
    if any(tasks != first for tasks in found.values()):
        given = ", ".join(f"{name} has T = {tasks}" for name, tasks in found.items())
        raise ValueError(f"scale_row, scale_col and shift must stack as many adapters each; got {given}")
    return first


def check_index_of(index: Tensor | TaskIndex, x: Tensor) -> None:
    """``index`` has one number for each sample of x, and is where it can be read."""
    if not isinstance(index, TaskIndex):
        check_index(index)
        if index.device.type != "cpu" and index.device != x.device:
            raise ValueError(f"index must be on the CPU or on the device of x, {x.device}; got {index.device}")
    samples = len(index) if isinstance(index, TaskIndex) else index.shape[0]
    if samples != x.shape[0]:
        raise ValueError(f"index must be [S] with S = {x.shape[0]} as in x {list(x.shape)}; got S = {samples}")


def check_values(index: TaskIndex, tasks: int) -> None:
    """All numbers are adapters of a stack of ``tasks``, or -1."""
    if index.largest >= tasks:
        raise IndexError(
            f"index must hold values from -1 to T - 1 = {tasks - 1}; got {index.largest} "
            f"for sample {index.index.tolist().index(index.largest)}"
        )
