"""Finds linear layers whose parent reads their weight instead of calling them: a layer put there trains nothing.

No forward is run, so this also works on the meta device: the source of every ancestor's ``forward``, and of the methods
and properties it uses, is searched for ``self.<path to the layer>.weight``. What such a search cannot see (a weight
fetched through a local variable or ``getattr``) is left to :func:`rlrr_kernels.adapt.check_gradients`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from torch import nn

from rlrr_kernels.adapt.modules import named_modules

_METADATA = {"device", "dtype", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_meta"}
"""What may be asked of a weight without computing with it."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_bypassed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Maps the name of each bypassed layer among ``names`` to a sentence that says who bypasses it."""
    modules = dict(named_modules(model))
    found = {}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            ancestor, path = modules[".".join(parts[:depth])], parts[depth:]
            kind: Any = type(ancestor)
            # Also where its source is not at hand: the one bypass every torch user meets.
            if isinstance(ancestor, nn.MultiheadAttention):
                found[name] = "nn.MultiheadAttention takes its weight as an argument and never calls it"
            elif kind not in _CONTAINERS and any(_reads(path, read) for read in _weight_reads(kind)):
                found[name] = f"{kind.__name__}.forward reads self.{'.'.join(path)}.weight, past the layer"
    return found


def qkv_bias_switches(model: nn.Module, names: Iterable[str]) -> dict[str, bool]:
    """The fused qkv layers among ``names`` that are called once their parent's ``qkv_bias_separate`` is True.

    timm's BEiT, EVA and SwinV2 attention keep q and v biases beside a ``qkv`` without bias, and compute
    ``F.linear(x, self.qkv.weight, bias)`` unless that switch tells them to call the layer and add the bias.

    Returns:
        Name → whether the switch has to be turned on for it; not so without these biases, or where it is on.
    """
    modules = dict(named_modules(model))
    found = {}
    for name in names:
        owner, _, child = name.rpartition(".")
        parent = modules[owner]
        if child == "qkv" and hasattr(parent, "qkv_bias_separate") and hasattr(parent, "q_bias"):
            found[name] = parent.q_bias is not None and not parent.qkv_bias_separate
    return found


def _reads(path: list[str], read: tuple[str, ...]) -> bool:
    """Whether ``read``, a chain such as ("layers", "*", "weight"), takes the weight of the layer at ``path``."""
    size = len(path)
    return (
        len(read) > size
        and read[size] == "weight"
        and all(theirs in ("*", ours) for ours, theirs in zip(path, read, strict=False))
        and not (len(read) > size + 1 and read[size + 1] in _METADATA)
    )


@functools.cache
def _weight_reads(module_type: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Attribute chains on ``self`` that end in or go through a weight, in all that ``forward`` reaches."""
    reads, seen, pending = set(), set(), ["forward"]
    while pending:
        method = pending.pop()
        if method in seen:
            continue
        seen.add(method)
        for owner in module_type.__mro__:
            if owner is nn.Module or owner is object or method not in vars(owner):
                continue
            for chain in _self_chains(vars(owner)[method]):
                pending.append(chain[0])
                if "weight" in chain[1:]:
                    reads.add(chain)
    return frozenset(reads)


def _self_chains(member: Any) -> set[tuple[str, ...]]:
    """All maximal ``self.a.b[0].c`` of a function or property as ("a", "b", "0", "c"); a computed index is "*"."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return set()  # no source: a C function, or code typed into a prompt
    chains: set[tuple[str, ...]] = set()
    inner: set[int] = set()
    for node in ast.walk(tree):  # outer nodes come first
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            inner.update(map(id, ast.walk(node)))
        if id(node) in inner or not isinstance(node, ast.Attribute | ast.Subscript):
            continue
        chain: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute | ast.Subscript):
            inner.add(id(base))
            if isinstance(base, ast.Attribute):
                chain.append(base.attr)
            else:
                chain.append(str(base.slice.value) if isinstance(base.slice, ast.Constant) else "*")
            base = base.value
        if isinstance(base, ast.Name) and base.id == "self":
            chains.add(tuple(reversed(chain)))
    return chains
