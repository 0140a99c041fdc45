"""Names that PyTorch and Triton do not promise to keep: what each is for, and what happens without it.

The other files of the package take them from here. Importing this imports no Triton.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from rlrr_kernels import backends

StartKernel = Callable[[int, Sequence[int]], None]
"""Starts one compiled kernel on a stream, given the addresses of its tensors."""

# ---------------------------------------------------------------- PyTorch


def _public_fp32_precision(backend: str, op: str) -> str:
    return getattr(getattr(torch.backends, backend), op).fp32_precision


fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", _public_fp32_precision)
"""What products of float32 may be rounded to, asked at every launch. Without it: the public attribute, five times as
slow."""

current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The current CUDA device, asked at every launch. Without it: the public function, which first looks whether CUDA is
initialised."""


def _needed(owner: Any, name: str, purpose: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise ImportError(f"torch {torch.__version__} has no {name}, by which rlrr_kernels {purpose}")
    return found


transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether a transform of ``torch.func`` is at work, for which a call takes another way. Without it: never, and such
transforms end in PyTorch's own errors."""

is_transformed = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
"""Whether a transform has wrapped a tensor, which may outlive it. Without it: never; only such leftovers notice."""

is_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
"""Whether a tensor is a batch of ``autograd.grad(is_grads_batched=True)``, which kernels cannot read. Without it:
never, and such calls fail."""

dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
"""How many modes watch operators; calls go past the operator and are replayed where none does. Without it: one always,
and every call goes through the operator."""

active_modes = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", list)
"""These modes. Without it: none, and a FLOP counter that was made before the first call does not count it."""


Watching = _needed(torch.utils._python_dispatch, "TorchDispatchMode", "sees what a call leaves to PyTorch")
"""The class of such modes."""

unwatched = getattr(torch.utils._python_dispatch, "_disable_current_modes", nullcontext)
"""A block in which none of them does. Without it: one in which they do, and calls are replayed later or not at all."""


def tree_map(function: Callable[[Any], Any], values: Any) -> Any:
    """``values`` with ``function`` of each leaf, through tuples, lists, dictionaries and what torch's and other
    packages' classes of outputs register. Without PyTorch's own: tuples, lists and dictionaries alone."""
    pytree = getattr(torch.utils, "_pytree", None)
    if pytree is not None:
        return pytree.tree_map(function, values)
    if isinstance(values, dict):
        return {key: tree_map(function, value) for key, value in values.items()}
    return type(values)(tree_map(function, v) for v in values) if type(values) in (tuple, list) else function(values)


backward_number = getattr(torch._C, "_current_graph_task_id", lambda: -1)
"""Of the backward that is at work, -1 where none is. Without it: none ever, and what a checkpointed model computes
again for its backward is taken for a forward of its own."""


def set_for_backward(key: str, value: Any) -> None:
    """Makes ``value`` what :func:`seen_by_backward` gives in this thread, and in those that autograd runs its backward
    in, one for each GPU. Without it: nothing is seen there."""
    if (stash := getattr(torch._C, "_stash_obj_in_tls", None)) is not None:
        if _steals_references():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
        stash(key, value)


@functools.cache
def _steals_references() -> bool:
    """Whether what :func:`set_for_backward` calls takes over a reference that it was not given, as before torch 2.12:
    the object would be freed while others use it."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("rlrr_kernels.probe", probe)
    steals = sys.getrefcount(probe) == before
    if steals:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return steals


def seen_by_backward(key: str) -> Any:
    """What :func:`set_for_backward` was given in the thread that started this backward; None for nothing."""
    known = getattr(torch._C, "_is_key_in_tls", lambda key: False)
    return torch._C._get_obj_in_tls(key) if known(key) else None


any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether autocast is on for any kind of device, a cheap first question. Without it: the second is always asked."""

tracing_state = getattr(torch._C, "_get_tracing_state", lambda: None)
"""What ``torch.jit.trace`` knows; None where it is not at work. Without it: None."""


def autograd_is_asked_for() -> bool:
    """Whether autograd has to know of calls that record no gradients: forward mode or a trace is at work. Without the
    level of forward mode: always, and calls that could spare autograd do not."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0 or tracing_state() is not None


NoAutocast = _needed(torch._C, "_DisableAutocast", "keeps the dtypes of its products under autocast")
"""A block without autocast on any kind of device; the public one is for one kind."""

BelowAutograd = _needed(torch._C, "_AutoDispatchBelowAutograd", "calls an operator's kernel from its autograd")
"""A block in which operators go past autograd, to their kernels."""

view_of_new = torch.ops.aten._unsafe_view.default
"""A view of a tensor that nobody else has, which may be modified in place as no other view of a function's result may.
It is an operator of ATen, which compiled graphs are full of."""

any_global_hook = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)
"""Whether hooks watch all modules, which a fused call of several would not run. Without it: always, and nothing is
fused."""

foreach_copy = getattr(torch, "_foreach_copy_", lambda to, given: [a.copy_(b) for a, b in zip(to, given, strict=True)])
"""Copies of many tensors in one launch. Without it: one by one."""


def exporting() -> bool:
    """Whether ``torch.export`` is at work; ``is_exporting()`` is always true to torch 2.11's compiler. Without the
    flag: never, and the exported graph keeps what it would compute again."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 in hardware. Without the questions: no, and training is in float32."""
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


backends.distrust_of_triton._dynamo_marked_constant = True
"""Has ``torch.compile`` call the function while it traces, and take what it returns as a constant. So does
``torch.compiler.assume_constant_result``, but that imports the compiler, which takes a second of every start. Without
the name: the compiler traces into the function, and may break the graph there."""

# ---------------------------------------------------------------- Triton


def mend_interpreter() -> None:
    """Changes two functions of Triton's interpreter, each left alone where it is missing.

    That of Triton 3.5 and 3.6 counts loops by ``int`` of an array of one element, which NumPy 2.5 refuses: without the
    change, kernels with such loops fail under ``TRITON_INTERPRET=1`` there. Every call of a device function replaces
    the language's functions anew, which the launch around it has done: a third of the time of small kernels.
    """
    from triton.runtime import interpreter

    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is not None:

        def patch_and_mend(tensor: Any, *scope: Any) -> None:
            patch_tensor(tensor, *scope)
            tensor.__index__ = lambda self: self.handle.data.item()

        interpreter._patch_lang_tensor = patch_and_mend
    executor, patch = getattr(interpreter, "GridExecutor", None), getattr(interpreter, "_patch_lang", None)
    if executor is None or patch is None:
        return
    execute = executor.__call__
    replaced: set[int] | None = None  # modules of the kernel at work and its device functions; None outside a launch

    def execute_once_replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal replaced
        before, replaced = replaced, set()
        try:
            with unwatched():  # it computes with PyTorch, which is the kernel's work
                return execute(self, *args, **kwargs)
        finally:
            replaced = before

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if replaced is not None and module in replaced:
            return None  # a device function, whose call takes no notice of it
        if replaced is not None:
            replaced.add(module)
        return patch(function)

    executor.__call__, interpreter._patch_lang = execute_once_replaced, patch_once


def watcher() -> Callable[..., bool]:
    """The function that tells whether anything watches or alters launches of kernels, so that Triton has to do them.

    It reads Triton's knobs: hooks around launches, debugging, the inspection of stages (which Triton 3.5 has not) and
    what was set for the compiler; and a kernel's own hooks. A knob that is missing is taken for unset.
    """
    from triton import knobs

    runtime, compilation = knobs.runtime, knobs.compilation.__dict__

    def watched(*kernels: Any) -> bool:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or compilation
            or any([kernel.pre_run_hooks for kernel in kernels])  # noqa: C419 (a generator costs twice as much)
        )

    return watched


def _arguments_after_tensors(plan: Any) -> tuple:
    """Numbers, then constants in the order of the kernel's parameters: the launcher skips the latter."""
    names = plan.kernel.arg_names[-sum(name in plan.meta for name in plan.kernel.arg_names) :]
    return (*plan.numbers, *(plan.meta[name] for name in names))


def _start_3_5(plan: Any, compiled: Any) -> StartKernel | None:
    """For Triton 3.5 and 3.6, where every signature has a C function of its own."""
    launcher, launch = compiled.run, compiled.run.launch
    x, y, z = (*plan.grid, 1, 1)[:3]
    function, metadata, rest = compiled.function, compiled.packed_metadata, _arguments_after_tensors(plan)
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None

    def start(stream: int, pointers: Sequence[int]) -> None:
        launch(
            x, y, z, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *pointers, *rest
        )

    return start


def _start_3_7(plan: Any, compiled: Any) -> StartKernel | None:
    """For Triton 3.7 to 3.9, where one C function reads a description of the signature."""
    launcher, launch = compiled.run, compiled.run.launch
    x, y, z = (*plan.grid, 1, 1)[:3]
    function, metadata, rest = compiled.function, compiled.packed_metadata, _arguments_after_tensors(plan)
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    kinds, signature = launcher.arg_annotations, launcher.kernel_signature
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None

    def start(stream: int, pointers: Sequence[int]) -> None:
        launch(
            x, y, z, stream, function, cooperative, dependent, metadata, None, None, None, None, None,
            kinds, signature, (*pointers, *rest),
        )  # fmt: skip

    return start


_STARTS = {"3.5": _start_3_5, "3.6": _start_3_5, "3.7": _start_3_7, "3.8": _start_3_7, "3.9": _start_3_7}


def start_maker(version: str) -> Callable[[Any, Any], StartKernel | None] | None:
    """What makes, of a plan and its compiled kernel, the way past Triton's launcher: its C function and its arguments.

    None for a version that is not known here. A nightly or a local build passes for its release: where it has another
    launcher, the first start fails before anything runs, and Triton's own launcher is used from then on.
    """
    return _STARTS.get(".".join(version.split(".")[:2]))


def spilled_registers(compiled: Any) -> int:
    """Registers a thread that a launched kernel keeps in memory. Without the attribute: 0, none is noticed."""
    return getattr(compiled, "n_spills", None) or 0


def spills_in_loops(compiled: Any) -> bool:
    """Whether a loop of a kernel stores registers to local memory, or loads them from it.

    A loop is what lies between a label and a branch back to it. NVIDIA's machine code alone is read: without it, True.
    """
    labels: dict[str, int] = {}
    last_access, sass = -1, code(compiled, "sass")
    for number, line in enumerate(sass.splitlines()):
        if label := re.match(r"(\w+):$", line.strip()):
            labels[label[1]] = number
        elif re.search(r"\b(STL|LDL)\b", line):
            last_access = number
        elif (branch := re.search(r"\bBRA (\w+)", line)) and last_access > labels.get(branch[1], number):
            return True
    return last_access < 0


def code(compiled: Any, kind: str) -> str:
    """A compiled kernel's text: "ttir", "ptx", "sass" or "amdgcn". Without it: "", and nothing is noticed."""
    try:
        text = compiled.asm[kind]
    except Exception:  # another backend's kernel; or sass, made when it is asked for by tools that may be missing
        return ""
    return text if isinstance(text, str) else ""


def source_hash(kernel: Any) -> str:
    """The hash of a kernel's source and of all that it calls. Without it: "unknown", which is never kept."""
    return str(getattr(kernel, "cache_key", "unknown"))[:16]
