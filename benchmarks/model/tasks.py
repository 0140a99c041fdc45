"""A batch of several tasks (``rlrr_linear_multi``) beside one merged model on the same rows, by the model of launches.

Needs neither GPU nor Triton. Tiles of rows are charged with what they are padded to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.gpu.launch_model import GPU, H200, Cost, grid, library_product, whole_waves
from benchmarks.gpu.plan import TOKENS, Shape, vit_layers
from rlrr_kernels.ops.choice import path as path_model
from rlrr_kernels.ops.choice import tiles as configs
from rlrr_kernels.ops.choice.tiles import Operand, Product
from rlrr_kernels.ops.multi.task_index import TaskIndex
from rlrr_kernels.ops.multi.triton import path
from rlrr_kernels.ops.multi.triton.path import Cut

DTYPE, SIZE = torch.bfloat16, 2
RATE = H200.rates["bf16"]


class Batch(NamedTuple):
    """``samples`` of ``rows`` each, dealt out to ``tasks``."""

    tasks: int
    samples: int
    rows: int


BATCHES = (Batch(64, 64, TOKENS), Batch(16, 64, TOKENS), Batch(4, 64, TOKENS), Batch(64, 64, 1), Batch(8, 8, TOKENS))


def cut_of(kernel: str, batch: Batch, shape: Shape) -> Cut:
    """Which way the rows of each task go on an H200."""
    width = shape.k if kernel == "forward" else shape.n
    operands = Operand((1, width), (width, 1), SIZE, True), Operand((shape.n, shape.k), (shape.k, 1), SIZE, True)
    product = Product(kernel, GPU, DTYPE, DTYPE, 1, *operands)

    def merges(first: int, end: int) -> bool:
        return path_model.merge_gain(end - first, shape.n, shape.k, 1, GPU, DTYPE, DTYPE) > 1

    index = TaskIndex(sorted(sample % batch.tasks for sample in range(batch.samples)))
    return path.cut_rows(index.rows(batch.rows).segments, product, merges)


def launches(kernel: str, batch: Batch, shape: Shape) -> list[Cost]:
    """Those of the forward or ∂x (kernel "grad_x")."""
    cut, (n, k) = cut_of(kernel, batch, shape), (shape.n, shape.k)
    columns, contracted = (n, k) if kernel == "forward" else (k, n)
    weight, found = SIZE * n * k, []
    if cut.tiled:
        tiles, rows = cut.tiles, sum(end - first for _, first, end in cut.tiled)
        whole = grid(kernel, tiles, len(cut.tiled) * tiles.block_m, n, k, DTYPE, DTYPE)
        steps, programs = whole.iterations * whole.splits, whole.programs // whole.splits
        waits = configs.ARRIVAL_US / 2 * max(0.0, steps / max(tiles.stages - 1, 1) - 1)
        operations = 2.0 * programs * steps * tiles.block_m * tiles.block_n * tiles.block_k
        moved = weight + SIZE * rows * (n + k)
        found.append(Cost(moved, operations, whole_waves(programs), programs * steps * whole.tile_bytes, waits))
    if cut.mixed:
        tiles, rows = cut.mixed_tiles, sum(end - first for _, first, end in cut.mixed)
        blocks = -(-contracted // tiles.block_k)
        programs = -(-columns // tiles.block_n) * -(-rows // (tiles.block_m // path.lines_a_row(1)))
        splits = configs.contraction_splits(blocks, programs, tiles, GPU)
        result, steps = SIZE * rows * columns, programs * blocks
        parts = 4 * splits * rows * columns if splits > 1 else 0
        operations = 2.0 * steps * tiles.block_m * tiles.block_n * tiles.block_k
        cache = steps * tiles.block_k * (tiles.block_m + tiles.block_n) * SIZE
        waits = configs.ARRIVAL_US * max(0.0, blocks / splits / max(tiles.stages - 1, 1) - 1)
        moved = weight + SIZE * rows * contracted + (parts or result)
        found.append(Cost(moved, operations, whole_waves(programs * splits), cache, waits))
        found += [Cost(parts + result)] if parts else []
    for _, first, end in cut.library:
        found += [Cost(2 * weight), *library_product(end - first, columns, contracted, SIZE, H200.bandwidth, RATE)]
    return found


def microseconds(kernel: str, batch: Batch, shape: Shape) -> tuple[float, float]:
    """Of the batch, and of one merged model on the same rows."""
    sizes = (shape.n, shape.k) if kernel == "forward" else (shape.k, shape.n)
    merged = library_product(batch.samples * batch.rows, *sizes, SIZE, H200.bandwidth, RATE)
    several = launches(kernel, batch, shape)
    return tuple(sum(launch.microseconds(H200.bandwidth, RATE) for launch in group) for group in (several, merged))


HEADS = ["batch", "work", "layer", "rows by way", "padding", "µs", "one merged model", "ratio"]


def lines() -> list[list[object]]:
    """One for each batch, product and layer of ViT-B, bf16 at rank 1; then the sum over a block's layers."""
    found: list[list[object]] = []
    for batch in BATCHES:
        name = f"{batch.samples} of {batch.rows} rows, {batch.tasks} tasks"
        for kernel in ("forward", "grad_x"):
            total = [0.0, 0.0]
            for shape in vit_layers("ViT-B", 768):
                cut, times = cut_of(kernel, batch, shape), microseconds(kernel, batch, shape)
                total = [a + b for a, b in zip(total, times, strict=True)]
                rows = [sum(end - first for _, first, end in way) for way in (cut.library, cut.tiled, cut.mixed)]
                ways = ", ".join(
                    f"{count} {what}" for what, count in zip(("merged", "tiled", "mixed"), rows, strict=True) if count
                )
                line = [name, kernel, shape.name, ways, f"{100 * cut.padding:.0f} %", *times, times[0] / times[1]]
                found.append(line)
            found.append([name, kernel, "all four", "", "", *total, total[0] / total[1]])
    return found
