"""What is measured: precisions, layer shapes, models, and their tiny stand-ins for the run on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from benchmarks.support.common import Problem

TOKENS = 197
"""Of a 224 pixel image in 16 pixel patches, with the class token."""


class Precision(NamedTuple):
    """Dtypes of one case. Under another ``weight_dtype`` than ``dtype`` everything runs in autocast to ``dtype``."""

    name: str
    dtype: torch.dtype  # of x and the products
    weight_dtype: torch.dtype
    matmul: str = "highest"  # torch.set_float32_matmul_precision

    @property
    def mixed(self) -> bool:
        """Whether the weight is wider than the products."""
        return self.dtype != self.weight_dtype

    def autocast(self, device: str) -> AbstractContextManager:
        """Autocast where the weight is wider; its cache is off, because a CUDA graph must hold the casts."""
        if not self.mixed:
            return nullcontext()
        return torch.autocast(device, self.dtype, cache_enabled=False)

    @contextmanager
    def applied(self):
        """Sets the float32 matmul precision for a block."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


PRECISIONS = {
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
    "bf16/fp32": Precision("bf16/fp32", torch.bfloat16, torch.float32),
    "fp16/fp32": Precision("fp16/fp32", torch.float16, torch.float32),
    "fp16": Precision("fp16", torch.float16, torch.float16),
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "tf32": Precision("tf32", torch.float32, torch.float32, "high"),
}
"""The name is the dtype of x and, behind a slash, that of W: fp32 weights under bf16 autocast. tf32 is fp32 in TF32."""


class Shape(NamedTuple):
    """A linear layer of a model: K to N; ``groups`` and ``rank`` of its scales."""

    name: str
    n: int
    k: int
    groups: int = 1
    rank: int = 1

    def with_rank(self, rank: int) -> Shape:
        """The same layer with scales of another rank, and its name with it."""
        return self._replace(name=f"{self.name} (r = {rank})", rank=rank)


class Batch(NamedTuple):
    """Samples of some rows each, dealt out to tasks, through one layer."""

    shape: Shape
    samples: int
    rows: int  # a sample
    tasks: int


def vit_layers(model: str, width: int) -> list[Shape]:
    """The four linear layers of a ViT block of this width."""
    sizes = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
    return [Shape(f"{model} {name}", n * width, k * width) for name, (n, k) in sizes.items()]


class RunPlan(NamedTuple):
    """Everything the sections iterate over; ``tiny`` marks the CPU's run, whose timings mean nothing."""

    device: str
    tiny: bool
    main: str  # the precision of the targets
    many_m: int  # M from which the targets for large M hold
    layers: list[tuple[int, Shape, int, str]]  # tier, shape, M, precision
    compiled: list[tuple[int, Shape, int, str, str]]  # and the mode of torch.compile
    again: list[tuple[int, Shape, int, str]]  # layers once more, where the tuner found faster tiles
    memory: list[tuple[int, Shape, int, str]]
    blocks: list[tuple[int, int, int, int, str]]  # tier, width, heads, images of 17 tokens, precision
    tuned: list[tuple[int, list[tuple[Shape, int]], str]]  # tier, problems (shape, M) of one class of M, precision
    check_cases: list[tuple[int, int, int, int, int]]  # M, N, K, G, r of the correctness checks
    rule_m: int  # largest M of these on which the error rule takes its many seeds
    host: Shape
    batches: list[tuple[int, Batch, str]]  # tier, samples of many tasks, precision
    models: list[tuple[int, str, int, str, str]]  # tier, model, batch, precision, mode
    build: Callable[[str], Any]  # a timm model by name
    compile_options: dict[str, Any]
    seconds: float  # for the rounds of one interleaved group
    graphs: bool

    def problem(self, m: int, shape: Shape, precision: Precision) -> Problem:
        """The problem of one layer call."""
        dtypes = precision.dtype, True, self.device, precision.weight_dtype
        return Problem(m, shape.n, shape.k, *dtypes, shape.rank, shape.groups)


def _build(name: str) -> Any:
    import timm

    return timm.create_model(name, num_classes=100)


def _build_tiny(name: str) -> Any:
    import timm

    return timm.create_model(
        name, num_classes=3, depth=1, embed_dim=16, num_heads=1, img_size=16, patch_size=8, mlp_ratio=1
    )


def gpu_plan() -> RunPlan:
    """The plan for a CUDA GPU. A lower tier is measured earlier."""
    base, large, huge = vit_layers("ViT-B", 768), vit_layers("ViT-L", 1024), vit_layers("ViT-H", 1280)
    batches = [TOKENS * batch for batch in (1, 8, 64, 256)]
    wide = Shape("wide", 8192, 8192)  # 128 MiB of bf16: more than any L2 holds
    first = [(shape, m) for m in (batches[2], batches[1], 16) for shape in base]
    layers = [(1, *entry, "bf16") for entry in first]
    layers += [(4, shape, m, "bf16") for m in (64, 1) for shape in base]
    layers += [(4, wide, m, "bf16") for m in (1, 16, 64)]
    layers += [(5, *entry, "bf16/fp32") for entry in first]
    layers += [(5, shape.with_rank(r), m, "bf16") for r in (32, 8) for m in (batches[1], 16) for shape in base]
    layers += [(6, shape, m, "bf16") for m in (batches[2], batches[1], 16) for shape in large + huge]
    layers += [(7, shape, m, "bf16") for m in (batches[3], batches[0], 4) for shape in base]
    layers += [(7, shape, m, "fp16") for m in (batches[2], 16) for shape in base]
    layers += [(8, shape, m, name) for name in ("tf32", "fp32") for m in (batches[2], 16) for shape in base]
    done = {entry[1:] for entry in layers}
    rest = [(shape, m, "bf16") for m in (*batches, 1, 4, 16, 64) for shape in base + large + huge]
    layers += [(9, *entry) for entry in rest if entry not in done]
    proj, fc1 = base[1], base[2]
    compiled = [(5, shape, batches[2], "bf16", "default") for shape in base]
    compiled += [(7, fc1, m, "bf16", "default") for m in (batches[1], 16)]
    compiled += [(8, shape, batches[2], "bf16", "max-autotune") for shape in base]
    memory = [(3, shape, batches[2], name) for name in ("bf16", "bf16/fp32") for shape in (fc1, huge[2])]
    blocks = [(3, 768, 12, 741, name) for name in ("bf16", "bf16/fp32")]  # 12,597 tokens
    many, few = [(fc1, batches[2]), (fc1, batches[1])], [(fc1, 16), (proj, 16)]
    tuned = [(2, many, "bf16"), (2, few, "bf16"), (2, many, "bf16/fp32"), (4, [(fc1, 64), (proj, 64)], "bf16")]
    tuned.append((8, many[:1], "tf32"))
    models = [(3, "vit_base_patch16_224", batch, "bf16/fp32", mode) for batch in (64, 8) for mode in ("eager", "graph")]
    models += [(5, "vit_base_patch16_224", 8, "bf16", mode) for mode in ("eager", "graph")]
    models += [(6, "vit_base_patch16_224", batch, "bf16/fp32", "compile") for batch in (8, 64)]
    models += [(6, "vit_base_patch16_224", batch, "bf16/fp32", "estimate") for batch in (64, 8)]
    for name in ("vit_large_patch16_224", "vit_huge_patch14_224"):
        models += [(7, name, batch, "bf16/fp32", mode) for batch in (8, 64) for mode in ("eager", "graph")]
        models.append((9, name, 8, "bf16/fp32", "compile"))
    many_tasks = (64, TOKENS, 64), (64, TOKENS, 4), (64, 1, 64)
    batches = [(5, Batch(shape, *sizes), "bf16") for sizes in many_tasks for shape in base]
    # Tiles differ at M = 16, 64 and above, for strides that are no multiple of 16 and for ranks over 4; M of 1 and of
    # multiples of 16 are compiled differently; few rows take split-K; the large ones take many waves of programs.
    check_cases = [
        (256, 768, 768, 3, 1), (48, 768, 768, 1, 4), (8, 768, 768, 1, 1), (1, 768, 3072, 1, 1), (197, 387, 201, 3, 4),
        (130, 256, 512, 1, 17), (256, 768, 768, 1, 32), (1576, 2304, 768, 3, 1), (12608, 768, 3072, 1, 1),
        (5003, 3072, 768, 1, 1),
    ]  # fmt: skip
    return RunPlan(
        "cuda", False, "bf16", 4096, layers, compiled, [(3, *entry, "bf16") for entry in first], memory, blocks, tuned,
        check_cases, 256, base[1], batches, models, _build, {}, 0.15, True,
    )  # fmt: skip


def cpu_plan() -> RunPlan:
    """The same sections on tiny shapes, for Triton's interpreter (which cannot do bf16) or the torch path alone."""
    shape, wide = Shape("ViT-B fc1", 32, 16), Shape("wide", 32, 32)
    layers = [(1, shape, 32, "fp32"), (1, wide, 3, "fp32"), (3, shape.with_rank(16), 3, "fp32")]
    models = [
        (tier, "vit_base_patch16_224", 8, "fp32", mode)
        for tier, mode in ((2, "eager"), (3, "compile"), (4, "estimate"))
    ]
    return RunPlan(
        "cpu", True, "fp32", 32, layers, [(3, shape, 3, "fp32", "default")], [(5, shape, 32, "fp32")],
        [(2, shape, 8, "fp32")], [(2, 16, 1, 1, "fp32")], [(4, [(shape, 8), (wide, 8)], "fp32")],
        [(20, 33, 40, 3, 4)], 16, shape,
        [(3, Batch(Shape("small", 16, 16), 3, 3, 2), "fp32")], models, _build_tiny, {"backend": "eager"}, 0.0, False,
    )  # fmt: skip
