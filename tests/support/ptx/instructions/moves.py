"""Moves between registers, conversions between types, and loads and stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptx import values
from tests.support.ptx.faults import Fault
from tests.support.ptx.forms import instruction
from tests.support.ptx.memory import gather, scatter
from tests.support.ptx.parser import Instruction, Operand, Several

if TYPE_CHECKING:
    from tests.support.ptx.machine import Lanes, Machine


@instruction("mov type=pred|BITS|f32|f64|INT")
def _move(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """Also takes a register apart into several of equal size, the low bits first, or puts one together."""
    target, source = current.operands
    size = values.width(current.type)
    if isinstance(target, Several):
        part = size // len(target.parts)
        bits = machine.bits(source, size, lanes)
        for index, register in enumerate(target.parts):
            machine.write(register, bits >> bits.dtype.type(part * index), f"b{part}", lanes)
    elif isinstance(source, Several):
        part, wide = size // len(source.parts), values.UNSIGNED[size]
        bits = [machine.bits(register, part, lanes).astype(wide) for register in source.parts]
        whole = np.bitwise_or.reduce([bit << wide(part * index) for index, bit in enumerate(bits)])
        machine.write(target, whole, f"b{size}", lanes)
    else:
        kind = "pred" if current.type == "pred" else f"b{size}"
        machine.write(target, machine.bits(source, size, lanes), kind, lanes)


@instruction("selp type=BITS|INT|f32|f64")
def _select(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    target, yes, no, condition = current.operands
    size = values.width(current.type)
    chosen = np.where(machine.bits(condition, 1, lanes), *(machine.bits(part, size, lanes) for part in (yes, no)))
    machine.write(target, chosen, f"b{size}", lanes)


@instruction("cvta ?to param|global|shared u64")
def _address(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """One address space is as good as the other."""
    machine.write(current.operands[0], machine.bits(current.operands[1], 64, lanes), "b64", lanes)


# ---------------------------------------------------------------- conversions


@instruction(
    "cvt to=INT|u8|s8 type=INT|u8|s8",
    "cvt rn to=FLOAT type=INT",
    "cvt to=f32|f64 type=f16|bf16|f32",
    "cvt rn ?ftz to=f16|bf16|f32 type=f32|f64",
    "cvt rna|rn to=tf32 type=f32",
)
def _convert(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    target, kind = current.operands[0], current.modifiers["to"]
    source = machine.read(current.operands[1], current.type, lanes)
    if kind == "tf32":  # to the nearest; a tie, one in 8,192, away from zero
        bits = source.view(np.uint32) + np.uint32(0x1000) & values.TF32_MASK
        machine.write(target, bits, "b32", lanes)
        return
    if kind in values.PACKED:
        raise Fault("a conversion of one value to two")
    if "ftz" in current.modifiers:
        source = values.flush(source)
    if kind in ("bf16", "f16") and current.type == "f64":
        raise Fault("a conversion that would be rounded twice")
    if not values.is_float(kind):
        source = source.astype(np.int64 if current.type[0] == "s" else np.uint64)
    elif kind != "f64" and not values.is_float(current.type):
        source = source.astype(np.float32)
    machine.write(target, source, kind, lanes)


@instruction("cvt rn ?relu to=bf16x2|f16x2 type=f32")
def _convert_two(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """The first source becomes the high half."""
    if "relu" in current.modifiers:
        raise Fault("a conversion with a maximum")
    high, low = (machine.read(operand, "f32", lanes) for operand in current.operands[1:])
    machine.write(current.operands[0], np.stack([low, high], -1), current.modifiers["to"], lanes)


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction(
    "cvt rounding=rni|rzi|rmi|rpi ?ftz to=INT type=f16|bf16|f32|f64",
    "cvt rounding=rni|rzi|rmi|rpi ?ftz to=f32 type=f32",
    "cvt rounding=rni|rzi|rmi|rpi to=f64 type=f64",
)
def _convert_to_whole(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    """What an integer cannot hold becomes the nearest that it can; NaN becomes zero."""
    kind = current.modifiers["to"]
    source = machine.read(current.operands[1], current.type, lanes)
    whole = _TO_WHOLE[current.modifiers["rounding"]](source)
    if not values.is_float(kind):
        integer = (values.SIGNED if kind[0] == "s" else values.UNSIGNED)[values.width(kind)]
        limits = np.iinfo(integer)
        inside = np.clip(np.nan_to_num(whole.astype(np.float64)), limits.min, limits.max)
        high = whole >= limits.max
        whole = np.where(high, limits.max, np.where(high, 0, inside).astype(integer)).astype(integer)
    machine.write(current.operands[0], whole, kind, lanes)


# ---------------------------------------------------------------- memory


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Several) else (operand,)


@instruction("ld space=global|shared|shared::cta ?vector=v2|v4|v8 type=BITS|INT|f32|f64")
def _load(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    targets, source = _parts(current.operands[0]), current.operands[1]
    _check_vector(current, targets)
    kind = current.type
    size = values.width(kind) // 8 * len(targets)
    if current.modifiers["space"] == "global":
        offsets = machine.memory.offsets(machine.address(source, lanes), size, "load")
        data = gather(machine.memory.bytes, offsets, size)
    else:
        data = gather(machine.shared.bytes, machine.shared_offsets(source, size, lanes), size)
    found = np.ascontiguousarray(data).view(values.bits_type(kind))
    for index, target in enumerate(targets):
        machine.write(target, values.decode(np.ascontiguousarray(found[:, index]), kind), kind, lanes)


@instruction("st space=global|shared|shared::cta ?vector=v2|v4|v8 type=BITS|INT|f32|f64")
def _store(machine: Machine, current: Instruction, lanes: Lanes) -> None:
    where, sources = current.operands[0], _parts(current.operands[1])
    _check_vector(current, sources)
    width = values.width(current.type)
    bits = np.stack([machine.bits(source, width, lanes) for source in sources], 1)
    data = np.ascontiguousarray(bits).view(np.uint8).reshape(len(bits), -1)
    if current.modifiers["space"] == "global":
        offsets = machine.memory.offsets(machine.address(where, lanes), data.shape[1], "store")
        scatter(machine.memory.bytes, offsets, data)
    else:
        offsets = machine.shared_offsets(where, data.shape[1], lanes)
        machine.shared.store(offsets, data, machine.threads_of(lanes))


def _check_vector(current: Instruction, parts: tuple[Operand, ...]) -> None:
    if int(current.modifiers.get("vector", "v1")[1:]) != len(parts):
        raise Fault("a vector with another number of registers")
