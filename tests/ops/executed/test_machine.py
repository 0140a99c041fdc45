"""The machine that executes PTX, on programs of a few lines."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ptx import Deadlock, Fault, UnknownInstructionError
from tests.support.ptx.instructions.tensor_copies import TensorMap
from tests.support.ptx.machine import Machine
from tests.support.ptx.memory import GlobalMemory
from tests.support.ptx.parser import parse

HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [kernel_param_0];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd1, %rd0, %rd1;
"""


def run(text: str, data: np.ndarray | None = None, threads: int = 32, shared: int = 1024, seed=None, **options):
    """The memory at the first parameter after a body; ``%rd1`` is where a thread's own 4 bytes of it are."""
    program = parse(HEAD.format(threads=threads) + text + "\n ret;\n}", "kernel")
    data = np.zeros(threads, np.uint32) if data is None else data.copy()
    memory = GlobalMemory([(0x1000, data.view(np.uint8))])
    maps = options.pop("maps", lambda address: {})(memory.address(0x1000))
    Machine(program, [memory.address(0x1000), 77], memory, shared, (1,), [0], maps, seed, **options).run()
    memory.write_back()
    return data


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# ---------------------------------------------------------------- what it does not know


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frob.b32 %r1, %r0;", "unknown opcode 'frob' of 'frob.b32'"),
        ("add.sat.s32 %r1, %r0, %r0;", "unknown modifier 'sat' of 'add.sat.s32'"),
        ("add.rz.f32 %r1, %r0, %r0;", "unknown modifier 'rz' of 'add.rz.f32'"),
        ("add.s32.ftz %r1, %r0, %r0;", "unknown modifier 'ftz' of 'add.s32.ftz'"),
        ("setp.lt.e4m3 %p1, %rs1, %rs2;", "unknown modifier 'e4m3'"),
        ("setp.lt.and.s32 %p1, %r1, %r2, %p2;", "unknown modifier 'and'"),
        ("cvt.rz.bf16.f32 %rs1, %r2;", "unknown modifier"),
        ("ld.global.v3.b32 {%r1, %r2, %r3}, [%rd1];", "unknown modifier 'v3'"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "unknown modifier 'row'"),
        ("cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1], [%r1];", "'3d'"),
        ("add %r1, %r0, %r0;", "missing modifier of 'add'"),
    ],
)
def test_unknown_instructions_are_refused_by_name_even_if_never_executed(instruction: str, message: str):
    with pytest.raises(UnknownInstructionError, match=message):
        run(f"bra $end; {instruction} $end:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mov.b32 %r1, %clock;", "unknown operand"),
        ("mov.b32 %r1, %x1;", "unknown operand"),
        ("bra $nowhere;", "no label"),
        (".local .b8 x[4];", "unknown directive"),
        ("mov.b64 %rd2, %r1;", "64 bits are read of a register of 32"),
        ("mov.b64 %r1, %rd1;", "written to a register of 32"),
        ("mov.b64 %rd2, 0f3F800000;", "a number of 32 bits"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str):
    with pytest.raises(Fault, match=message):
        run(text)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("instruction", "given", "expected"),
    [
        ("div.s32 %r2, %r1, 4;", -7, -1),
        ("rem.s32 %r2, %r1, 4;", -7, -3),
        ("shr.s32 %r2, %r1, 40;", -7, -1),
        ("shr.u32 %r2, %r1, 40;", -7, 0),
        ("shl.b32 %r2, %r1, 32;", 7, 0),
        ("bfe.s32 %r2, %r1, 4, 4;", 0x8F, -8),
        ("bfe.u32 %r2, %r1, 4, 4;", 0x8F, 8),
        ("mul.hi.s32 %r2, %r1, 0x40000000;", -8, -2),
        ("prmt.b32 %r2, %r1, 0, 0x7710;", 0x1234, 0x1234),
        ("prmt.b32 %r2, %r1, 0, 0x8888;", 0x80, -1),
        ("lop3.b32 %r2, %r1, 12, 10, 0x96;", 9, 9 ^ 12 ^ 10),
        ("shf.l.wrap.b32 %r2, %r1, 1, 4;", -1, 0x1F),
        ("bfi.b32 %r2, %r1, 0xFF, 4, 8;", 0, 0xF),
        ("min.s32 %r2, %r1, 3;", -7, -7),
        ("min.u32 %r2, %r1, 3;", -7, 3),
        ("mad.lo.s32 %r2, %r1, %r1, 1;", -7, 50),
    ],
)
def test_integers(instruction: str, given: int, expected: int):
    found = run(f"mov.b32 %r1, {given}; {instruction} st.global.b32 [%rd1], %r2;")
    assert found.view(np.int32)[0] == expected


@pytest.mark.parametrize(
    ("instruction", "given", "expected"),
    [
        ("add.f32 %r2, %r1, 0f3F800000;", 2.0, 3.0),
        ("mul.ftz.f32 %r2, %r1, 0f3F800000;", 1e-40, 0.0),
        ("mul.f32 %r2, %r1, 0f3F800000;", 1e-40, 1e-40),
        ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", 1 + 2**-12, 2**-11 + 2**-24),  # rounded once
        ("cvt.rni.f32.f32 %r2, %r1;", 2.5, 2.0),
        ("cvt.rna.tf32.f32 %r2, %r1;", 1 + 2**-11, 1 + 2**-10),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r2, %rs1;", 1 + 2**-8, 1.0),  # a tie
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r2, %rs1;", 1 + 2**-8 + 2**-20, 1 + 2**-7),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r2, %rs1;", 70000.0, np.inf),
        ("cvt.rn.bf16x2.f32 %r3, %r1, 0f00000000; shr.u32 %r2, %r3, 16; shl.b32 %r2, %r2, 16;", 3.0, 3.0),
        ("min.f32 %r2, %r1, 0f3F800000;", np.nan, 1.0),
        ("min.NaN.f32 %r2, %r1, 0f3F800000;", np.nan, np.nan),
    ],
)
def test_floats(instruction: str, given: float, expected: float):
    found = run(f"ld.global.b32 %r1, [%rd1]; {instruction} st.global.b32 [%rd1], %r2;", np.full(32, given, np.float32))
    np.testing.assert_array_equal(found, np.full(32, expected, np.float32))


@pytest.mark.parametrize(
    ("comparison", "kind", "expected"),
    [
        # 0x3C00 is 1 in fp16 and 2⁻⁷ in bf16, 0x3F80 is 1.875 and 1, 0xC000 is -2, 0x7E00 is NaN and 2¹²⁵.
        ("lt", "f16", [0, 1, 0, 0]),
        ("lt", "bf16", [0, 0, 0, 1]),
        ("ltu", "f16", [0, 1, 0, 1]),
        ("lt", "s16", [0, 0, 0, 1]),
        ("lt", "u16", [0, 0, 0, 1]),
    ],
)
def test_comparisons_read_the_type_that_is_named(comparison: str, kind: str, expected: list[int]):
    """The pairs are compared as numbers of each type: only the bits are the same."""
    pairs = [(0x3F80, 0x3C00), (0x3C00, 0x3F80), (0x3C00, 0xC000), (0x3F80, 0x7E00)]
    data = np.zeros(32, np.uint32)
    data[: len(pairs)] = [first | second << 16 for first, second in pairs]
    found = run(
        f"ld.global.v2.b16 {{%rs1, %rs2}}, [%rd1]; setp.{comparison}.{kind} %p1, %rs1, %rs2; "
        "selp.b32 %r1, 1, 0, %p1; st.global.b32 [%rd1], %r1;",
        data,
    )
    as_number = {"f16": np.float16, "s16": np.int16, "u16": np.uint16}.get(kind)
    if as_number is None:
        numbers = [tuple((np.uint32(bits) << np.uint32(16)).view(np.float32) for bits in pair) for pair in pairs]
    else:
        numbers = [tuple(np.uint16(bits).view(as_number) for bits in pair) for pair in pairs]
    nan = [bool(np.isnan(a) or np.isnan(b)) and comparison == "ltu" for a, b in numbers]
    assert found[: len(pairs)].tolist() == [int(a < b or n) for (a, b), n in zip(numbers, nan, strict=True)]
    assert found[: len(pairs)].tolist() != [0] * len(pairs)


def test_registers_that_were_never_written_are_not_a_number():
    assert np.isnan(run("st.global.b32 [%rd1], %r5;").view(np.float32)).all()


def test_parameters_are_read_at_addresses_that_threads_choose():
    found = run("""
    mov.b32 %r1, kernel_param_0; mov.b32 %r2, kernel_param_1; setp.lt.u32 %p1, %r0, 5; selp.b32 %r3, %r2, %r1, %p1;
    ld.param.b32 %r4, [%r3]; st.global.b32 [%rd1], %r4;
    """)
    assert found[:5].tolist() == [77] * 5
    assert 77 not in found[5:]
    with pytest.raises(Fault, match="no parameter"):
        run("mov.b32 %r1, kernel_param_0; ld.param.b32 %r4, [%r1 + 4];")


def test_a_warp_reduces():
    found = run("redux.sync.add.s32 %r1, %r0, -1; st.global.b32 [%rd1], %r1;", threads=64, data=np.zeros(64, np.uint32))
    assert found.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    found = run("sub.s32 %r1, 3, %r0; redux.sync.max.u32 %r1, %r1, -1; st.global.b32 [%rd1], %r1;")
    assert found[0] == 2**32 - 1


# ---------------------------------------------------------------- memory and order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ld.global.b32 %r1, [%rd1 + 4];", "out of bounds: load of 4 bytes"),
        ("ld.global.b32 %r1, [%rd1 + -4];", "out of bounds: load"),
        ("st.global.b32 [%rd1 + 4096], %r0;", "out of bounds: store"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd1];", "misaligned load of 8 bytes"),
        ("ld.global.v2.b32 {%r1}, [%rd0];", "another number of registers"),
        ("st.shared.b32 [%r0], %r0;", "misaligned access of 4 bytes of shared memory"),
        ("mov.b32 %r1, 1024; st.shared.b32 [%r1], %r0;", "out of bounds: access of 4 bytes of shared memory"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "only some of 32 threads"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 255;", "for some threads"),
        ("$loop: bra $loop;", "too many instructions"),
        ("mov.b32 %r1, 8; mbarrier.arrive.shared::cta.b64 _, [%r1];", "not initialised"),
    ],
)
def test_what_a_gpu_lets_pass_is_a_fault(text: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.support.ptx.machine._LIMIT", 1000)
    with pytest.raises(Fault, match=message):
        run(text)


def test_shared_memory_is_not_a_number_at_first():
    assert np.isnan(run("ld.shared.b32 %r1, [global_smem]; st.global.b32 [%rd1], %r1;").view(np.float32)).all()


COPY = "shl.b32 %r1, %r0, 2; cp.async.ca.shared.global [%r1 + 0], [%rd1 + 0], 0x4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("waits", "comes"), [("", False), ("cp.async.wait_group 1;", False), ("cp.async.wait_group 0;", True)]
)
def test_copies_land_when_they_are_waited_for(waits: str, comes: bool):
    data = np.arange(32, dtype=np.uint32)
    found = run(f"{COPY} {waits} ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd1], %r2;", data)
    assert (found == (data if comes else 0xFFFFFFFF)).all()


def test_a_copy_of_no_bytes_writes_zeros():
    text = COPY.replace("0x4;", "0x4, 0;").replace("[%rd1 + 0]", "[%rd1 + 8192]")
    assert not run(f"{text} cp.async.wait_group 0; ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd1], %r2;").any()


@pytest.mark.parametrize("meets", [True, False])
def test_warps_that_do_not_meet_are_in_any_order(meets: bool):
    """Every thread reads what one of the other warp wrote."""
    text = f"""
    shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; {"bar.sync 0;" if meets else ""}
    xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd1], %r3;
    """
    expected = np.arange(64) ^ 32
    found = [run(text, threads=64, seed=seed) for seed in (None, *range(8))]
    right = [bool((data == expected).all()) for data in found]
    assert right[0]
    assert all(right) == meets


@pytest.mark.parametrize("text", ["@%p1 bar.sync 0, 64;", "@%p1 bar.sync 1, 96; @%p1 ret; bar.sync 1, 96;"])
def test_barriers_that_never_open(text: str):
    with pytest.raises(Deadlock, match=r"threads at barrier"):
        run(f"setp.lt.u32 %p1, %r0, 32; {text}", threads=64)


WAIT = (
    "{ .reg .pred complete; wait: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], 0; @!complete bra wait; }"
)
BARRIER = "mov.b32 %r1, 512; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;"


def test_an_mbarrier_opens_when_all_have_arrived():
    run(f"{BARRIER} @%p1 mbarrier.arrive.shared::cta.b64 _, [%r1]; {WAIT}")
    with pytest.raises(Deadlock, match="32 threads for the mbarrier at 512 of block 0"):
        run(f"{BARRIER} {WAIT}")
    with pytest.raises(Fault, match="more arrivals"):
        run(f"{BARRIER} mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64; {WAIT}")


LOAD = """
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;
    mov.b32 %r2, 0; mov.b32 %r3, -4; mov.b64 %rd2, kernel_param_1;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd2, {%r3, %r2}], [%r1];
"""
OUT = "shl.b32 %r4, %r0, 2; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd1], %r5;"


def matrix(address: int) -> dict[int, TensorMap]:
    """2 rows of 16 numbers, copied in one block, without swizzling."""
    return {77: TensorMap(address, (2, 16), (16, 1), 4, (2, 16))}


def test_a_block_arrives_with_zeros_outside_of_the_matrix():
    data = np.arange(32, dtype=np.uint32)
    found = run(f"{BARRIER} {LOAD} {WAIT} {OUT}", data, maps=matrix)
    expected = np.pad(data.reshape(2, 16), ((0, 0), (4, 0)))[:, :16]
    np.testing.assert_array_equal(found.reshape(2, 16), expected)


def test_a_block_that_is_not_waited_for_has_not_arrived():
    with pytest.raises(Fault, match="ends before 1 loads"):
        run(f"{BARRIER} {LOAD} {OUT}", maps=matrix)
    with pytest.raises(Fault, match=r"not ordered after a store .* by fence.proxy.async"):
        run(f"{BARRIER} shl.b32 %r4, %r0, 2; st.shared.b32 [%r4], %r0; bar.sync 0; {LOAD} {WAIT}", maps=matrix)
