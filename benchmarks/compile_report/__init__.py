"""What the compiler makes of every kernel and shipped configuration; needs no GPU.

    python -m benchmarks.compile_report [--json FILE] [--arch sm_90 ...] [--accept]

Each row: registers a thread, spilled bytes a thread and whether a loop has any of them, shared memory a block, whether
the kernel has a matrix product, which matrix instruction its code uses, and whether a kernel that is given descriptors
loads by TMA. Launches are built by the launchers themselves from meta tensors, so the report compiles what a GPU would
run. What is made of the rows is in ``verdict.py``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels import devices
from rlrr_kernels.ops.activation import triton_backward as activation_triton
from rlrr_kernels.ops.activation.functions import ACTIVATIONS
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.dtypes import matmul_precision
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.host.launch import OPTIONS, Launch
from rlrr_kernels.ops.linear.triton import launches as linear_launches
from rlrr_kernels.ops.linear.triton import sampled as linear_rows_triton
from rlrr_kernels.ops.multi.task_index import TaskIndex
from rlrr_kernels.ops.multi.triton import launches as multi_launches
from rlrr_kernels.ops.multi.triton import path as multi_path
from rlrr_kernels.ops.norm_rescale import triton_backend as norm_rescale_triton
from rlrr_kernels.ops.sampling import triton_draw as row_sample_triton
from rlrr_kernels.ops.sampling.row_sample import MOST_KEYS, RowSample

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 89, 90, 100, 103, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942", "gfx950")},
    **{name: GPUTarget("hip", name, 32) for name in ("gfx1100", "gfx1201")},
}

MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma", "v_wmma")
"""Of PTX and of AMD's assembly. A kernel has one at most, but for products that a wider one has no shape for."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
DTYPES = ("bf16", "fp16", "bf16/fp32", "fp32", "tf32", "fp64")
"""Of a :class:`Case`."""

BETWEEN = ("rank 8", "rank 17")
"""Ends of a configuration's name: these ranks take the path of rank 32 or 64."""

_NAMES = {value: key for key, value in _TYPES.items()} | {"tf32": torch.float32}


class Case(NamedTuple):
    """One kernel in one configuration; ``dtype`` is that of x, with that of W behind a slash where it differs.

    "fp32" and "tf32" both have float32 tensors: ``torch.get_float32_matmul_precision`` is "highest" or "high".
    """

    kernel: str
    dtype: str
    config: str
    launch: Launch
    shared_bound: int | None = None  # what configs.shared_bytes says it needs at most


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and divisibility of a launch, as Triton's own launcher would specialise them."""
    signature, constants, attributes = {}, {}, {}
    parameters = launch.plan.kernel.params
    for index, (parameter, value) in enumerate(zip(parameters, launch.args, strict=False)):
        name, fixed, divisible = parameter.name, not parameter.do_not_specialize, False
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and fixed:
            signature[name], constants[name] = "constexpr", 1  # as Triton's launcher does for strides
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and fixed:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for parameter in parameters[len(launch.args) :]:
        signature[parameter.name], constants[parameter.name] = "constexpr", launch.plan.meta[parameter.name]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: str) -> triton.compiler.CompiledKernel:
    """Compiles a launch for an architecture of :data:`TARGETS`."""
    options = {key: launch.plan.meta[key] for key in OPTIONS if key in launch.plan.meta}
    return triton.compile(ASTSource(launch.plan.kernel, *specialised(launch)), target=TARGETS[arch], options=options)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear_cases(arch: str) -> Iterator[Case]:
    """Every configuration shipped for ``arch``: ViT shapes at rank 1 and 4, ragged shapes, ranks from 8 to 64."""
    for dtype in DTYPES:
        x_dtype, w_dtype = (_NAMES[name] for name in (dtype.split("/") * 2)[:2])
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        dtypes = x_dtype, w_dtype
        for kernel in configs.KERNELS:
            for limit, tiles in configs.TABLE[devices.family_of(arch)][kernel, x_dtype.itemsize]:
                rows = limit or 4096
                # Of ViT-B's layers, the one whose product few rows split, where there is any.
                sizes = (768, 3072) if kernel == "forward" and limit else (3072, 768)
                yield (case := _case(kernel, arch, dtype, tiles, dtypes, rows, *sizes))
                if case.launch.plan.meta.get("SPLIT"):
                    yield _case(kernel, arch, dtype, tiles._replace(max_splits=1), dtypes, rows, *sizes)
                yield _case(kernel, arch, dtype, tiles, dtypes, rows, *sizes, rank=4, groups=3)
                # Ranks of HiRA, where the table serves them.
                for rank in (8, 32):
                    if configs.multiplied_in_pipeline(rank, x_dtype, w_dtype.itemsize, devices.typical(arch)):
                        yield _case(kernel, arch, dtype, tiles, dtypes, rows, *sizes, rank=rank)
            if persistent := configs.PERSISTENT.get(devices.family_of(arch), {}).get((kernel, x_dtype.itemsize)):
                yield _case(kernel, arch, dtype, persistent, dtypes, 4096)
                yield _case(kernel, arch, dtype, persistent, dtypes, 4096, rank=4, groups=3)
            tiles = configs.IRREGULAR[kernel, x_dtype.itemsize]
            yield _case(kernel, arch, dtype, tiles, dtypes, 197, 771, 773, rank=4, groups=3)
            for rank in (8, 17, 32, 64) if dtype in ("bf16", "fp32") else (17,):
                yield _case(kernel, arch, dtype, tiles, dtypes, 4096, rank=rank)
        shipped = configs.TABLE[devices.family_of(arch)]["grad_scales", x_dtype.itemsize][-1][1]
        yield from _sampled_cases(arch, dtype, shipped, dtypes, 4096, images=64)
        if dtype in ("bf16", "fp32"):
            yield from _sampled_cases(arch, dtype, shipped, dtypes, 4096)
            yield from _sampled_cases(arch, dtype, shipped, dtypes, 4096, rank=32)
            yield from _sampled_cases(arch, dtype, tiles, dtypes, 1001, 771, 773, rank=4, groups=3, images=7)
        if dtype == "tf32":
            continue  # no product in the merge
        weight, merged = _meta(2304, 768, dtype=w_dtype), _meta(2304, 768, dtype=x_dtype)
        merge = linear_launches.merge_launch(weight, _meta(2304, 1), _meta(3, 1, 768), True, merged)
        yield Case("merge", dtype, "2304 x 768, rank 1", merge)
    gpu = devices.typical(arch)
    x, y, weight = _meta(4096, 768), _meta(4096, 3072), _meta(3072, 768)
    tiles = configs.tiles_for("grad_scales", gpu, torch.float32, 4096)
    _, reduction = _scale_launches(x, y, weight, _meta(3072, 1), _meta(1, 1, 768), gpu, tiles)
    yield Case("reduce", "fp32", "4096 x 3072 x 768, rank 1", reduction)
    yield _sum_of_parts(arch)


def _sum_of_parts(arch: str) -> Case:
    x, y, weight = (_meta(*shape, dtype=torch.bfloat16) for shape in ((16, 3072), (16, 768), (768, 3072)))
    gpu = devices.typical(arch)
    tiles = configs.tiles_for("forward", gpu, torch.bfloat16, 16)
    scales = _meta(768, 1), _meta(1, 1, 3072)
    _, launch = linear_launches.forward_launches(
        x, weight, *scales, _meta(768), True, y, gpu, matmul_precision(), tiles
    )
    return Case("sum of parts", "bf16", f"16 x 768 x 3072, {launch.plan.meta['SPLITS']} parts", launch)


def multi_cases(arch: str) -> Iterator[Case]:
    """``rlrr_linear_multi`` of 64 images for 64 tasks: every kind of tile, rows of all tasks in a tile, ragged shapes.

    In dtypes other than bf16 the widest tile alone at rank 1.
    """
    for dtype in DTYPES:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        yield from _multi_cases(arch, dtype, 3072, 768, 1, 1)
        yield from _multi_cases(arch, dtype, 771, 773, 4, 3)
        if dtype == "bf16":
            yield from _multi_cases(arch, dtype, 3072, 768, 4, 3)


def _multi_cases(arch: str, dtype: str, n: int, k: int, rank: int, groups: int) -> Iterator[Case]:
    gpu, images, head = devices.typical(arch), TaskIndex(range(64)).rows(197), f"{n} x {k}, rank {rank}"
    x_dtype, w_dtype = (_NAMES[name] for name in (dtype.split("/") * 2)[:2])
    x, grad_y = _meta(images.count, k, dtype=x_dtype), _meta(images.count, n, dtype=x_dtype)
    weight, stacks = _meta(n, k, dtype=w_dtype), (_meta(64, n, rank), _meta(64, groups, rank, k))

    def product(kernel: str, first: torch.Tensor, second: torch.Tensor) -> configs.Product:
        return configs.Product.of(kernel, gpu, first, second, w_dtype, rank, sampled=True)

    for kernel, a, out, added in (
        ("forward", x, grad_y, (_meta(n), _meta(64, n))),
        ("grad_x", grad_y, x, (None, None)),
    ):
        given, of = (kernel, a, weight, *stacks, *added, True, images), product(kernel, a, weight)
        kinds, mixed_tiles = multi_path.candidate_tiles(of), multi_path.mixed_tiles(of)
        for tiles in kinds if rank == 1 and dtype == "bf16" else kinds[-1:]:
            cut = multi_path.Cut((), images.segments, (), tiles, mixed_tiles)
            (launch,) = multi_launches.product_launches(*given, cut, out, gpu)
            blocks = f"MxNxK {tiles.block_m}x{tiles.block_n}x{tiles.block_k}, {tiles.warps} warps"
            yield Case(f"multi_{kernel}", dtype, f"{blocks}; {head}", launch)
        if multi_path.may_mix(of.rank, of.dtype, of.weight_dtype):
            cut = multi_path.Cut((), (), TaskIndex(range(64)).rows(1).segments, kinds[0], mixed_tiles)
            mixed, *total = multi_launches.product_launches(*given, cut, out, gpu)
            yield Case(f"multi_mixed_{kernel}", dtype, head, mixed)
            for launch in total[:1]:
                yield Case(f"multi_mixed_sum_{kernel}", dtype, head, launch)
    grads = *map(torch.empty_like, stacks), _meta(n), _meta(64, n)
    tiles = configs.tiles_of(product("grad_scales", x, grad_y))
    partial, total = multi_launches.grad_scales_launches(grad_y, x, weight, *stacks, grads, images, gpu, tiles)
    yield Case("multi_grad_scales", dtype, head, partial)
    if rank == 1:
        yield Case("multi_reduce", dtype, head, total)


def norm_cases() -> Iterator[Case]:
    """The kernels of ``norm_rescale`` at the widths of ViT-S to ViT-H, with a 16-bit and an fp32 x."""
    for dtype in ("bf16", "fp16", "fp32"):
        for size in (384, 768, 1280):
            x, y = _meta(4096, size, dtype=_NAMES[dtype]), _meta(4096, size, dtype=_NAMES[dtype])
            parameters, statistics = [_meta(size) for _ in range(4)], [_meta(4096) for _ in range(2)]
            config = f"4096 x {size}"
            forward = norm_rescale_triton.forward_launch(x, *parameters, 1e-6, y, *statistics)
            yield Case("norm_rescale", dtype, config, forward)
            grads = torch.empty_like(x), _meta(size), _meta(size)
            kept = parameters[:3] + statistics
            for name, launch in zip(
                ("norm_rescale_grad", "norm_rescale_reduce"),
                norm_rescale_triton.backward_launches(y, x, *kept, grads),
                strict=True,
            ):
                yield Case(name, dtype, config, launch)


def draw_cases() -> Iterator[Case]:
    """The draw of a quarter of the patch tokens of 64 images: of ViT at 224 px, and of the most one program sorts."""
    for others in (196, MOST_KEYS):
        keys, index = _meta(64, others), _meta(64 * (1 + others // 4), dtype=torch.int64)
        launch = row_sample_triton.smallest_keys_launch(keys, others // 4, 1, index)
        yield Case("draw_rows", "fp32", f"{others // 4} of {others}, 64 images", launch)


def activation_cases() -> Iterator[Case]:
    """The backward of every activation for ViT-B's hidden layer."""
    for dtype, name in product(("bf16", "fp16", "fp32", "fp64"), ACTIVATIONS):
        grad_a, h, value = (_meta(4096, 3072, dtype=_NAMES[dtype]) for _ in range(3))
        launch = activation_triton.backward_launch(grad_a, h, name, value)
        yield Case("activation_grad", dtype, f"4096 x 3072, {name}", launch)


def _case(kernel, arch, dtype, tiles, dtypes, rows, n=3072, k=768, rank=1, groups=1) -> Case:
    gpu = devices.typical(arch)
    blocks = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    split = "" if tiles.max_splits > 1 else ", never split"
    config = f"{tiles.schedule}, MxNxK {blocks}, {tiles.warps} warps, {tiles.stages} stages{split}"
    config += f"; {rows} x {n} x {k}, rank {rank}"
    weight, scale_row, scale_col = _meta(n, k, dtype=dtypes[1]), _meta(n, rank), _meta(groups, rank, k)
    x, y = _meta(rows, k, dtype=dtypes[0]), _meta(rows, n, dtype=dtypes[0])
    if kernel == "forward":
        launch, *_ = linear_launches.forward_launches(
            x, weight, scale_row, scale_col, _meta(n), True, y, gpu, matmul_precision(), tiles
        )
    elif kernel == "grad_x":
        launch, *_ = linear_launches.grad_x_launches(
            y, weight, scale_row, scale_col, True, x, gpu, matmul_precision(), tiles
        )
    else:
        launch, _ = _scale_launches(x, y, weight, scale_row, scale_col, gpu, tiles)
    matrices = launch.plan.meta.get("DOT_RANK", 0)
    return Case(kernel, dtype, config, launch, configs.shared_bytes(kernel, tiles, *dtypes, gpu, matrices))


def _sampled_cases(
    arch, dtype, tiles, dtypes, rows, n=3072, k=768, rank=1, groups=1, images=0
) -> Iterator[Case]:  # fmt: skip
    """Scale gradients from about a quarter of the rows, of which the first one of each of ``images`` counts once."""
    size = rows // 4 // max(images, 1) * max(images, 1)
    config = (
        f"of {size} of {rows} x {n} x {k}, {images} images, rank {rank}; "
        f"MxNxK {tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    )
    weight, scale_row, scale_col = _meta(n, k, dtype=dtypes[1]), _meta(n, rank), _meta(groups, rank, k)
    x, y = _meta(size, k, dtype=dtypes[0]), _meta(rows, n, dtype=dtypes[0])
    sample = RowSample(_meta(size, dtype=torch.int64), images, 4.0, images)
    grads = torch.empty_like(scale_row), torch.empty_like(scale_col), _meta(n)
    *means, launch, _ = linear_rows_triton.grad_scales_launches(
        y, x, weight, scale_row, scale_col, grads, sample, devices.typical(arch), matmul_precision(), tiles
    )
    for mean in means:
        yield Case("image_means", dtype, config, mean)
    yield Case("sampled_grad_scales", dtype, config, launch)


def _scale_launches(x, y, weight, scale_row, scale_col, gpu, tiles) -> tuple[Launch, ...]:
    grads = torch.empty_like(scale_row), torch.empty_like(scale_col), _meta(weight.shape[0])
    return linear_launches.grad_scales_launches(
        y, x, weight, scale_row, scale_col, grads, gpu, matmul_precision(), tiles
    )


def report_row(case: Case, arch: str) -> dict[str, Any]:
    """Compiles ``case`` for ``arch`` and reads its resources and its matrix instruction off the binary."""
    compiled = compile_launch(case.launch, arch)
    if arch.startswith("sm_"):
        registers, spills = _nvidia_resources(compiled.asm["cubin"])
        code = compiled.asm["ptx"]  # names what the machine code has; disassembling takes as long as compiling
    else:
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]) * 4
    return {
        "kernel": case.kernel,
        "dtype": case.dtype,
        "arch": arch,
        "config": case.config,
        "registers": registers,
        "spills": spills,
        "spills_in_loops": bool(spills) and private.spills_in_loops(compiled),
        "shared_bytes": compiled.metadata.shared,
        "shared_bound": case.shared_bound,
        "uses_dot": "tt.dot" in compiled.asm.get("ttir", "") or "warp_group_dot" in compiled.asm["ttgir"],
        "matrix_instruction": next((name for name in MATRIX_INSTRUCTIONS if name in code), None),
        "tma": "cp.async.bulk.tensor" in code if case.launch.plan.blocks else None,
    }


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread; a Triton kernel has no arrays, so the latter are spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = max(int(value) for value in re.findall(r"REG:(\d+)", text))
    spills = max(int(value) for value in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    return registers, spills


def rows(
    archs: list[str] | None = None, dtypes: Collection[str] = DTYPES, whole: bool = True
) -> Iterator[dict[str, Any]]:
    """The report's rows, compiled one after another: of these architectures, by default all, and dtypes.

    ``whole``: with those of ``rlrr_linear_multi``, whose loops are ``rlrr_linear``'s, and with ranks between others.
    """
    before = torch.get_float32_matmul_precision()
    try:
        for arch in archs or TARGETS:
            cases = chain(
                linear_cases(arch), multi_cases(arch) if whole else (), draw_cases(), norm_cases(), activation_cases()
            )
            for case in cases:
                if case.dtype in dtypes and (whole or not case.config.endswith(BETWEEN)):
                    yield report_row(case, arch)
    finally:
        torch.set_float32_matmul_precision(before)
