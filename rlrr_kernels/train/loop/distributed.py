"""Training on several processes: copies of the model (DDP) or shares of it (FSDP2), and the bytes they exchange."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlrr_kernels.ops.host import private
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.loop.trained import trained_buffers

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

COMPILER = "inductor"
"""The backend of ``torch.compile``."""

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where accelerate looks for it


def make_accelerator(config: TrainConfig, *, cpu: bool = False) -> Accelerator:
    """The accelerator a run under ``config`` uses; ``cpu`` leaves a GPU alone."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

    # accelerate keeps the first precision of a process for good; a second run may want another one.
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    _warn_of_missing_processes()
    precision = config.mixed_precision
    if precision == "auto":
        precision = _fastest_precision(torch.cuda.is_available() and not cpu)
    # Sizes by themselves: else a resumed run, which meets them in another order, would compute by other kernels.
    plugin = {"dynamo_plugin": TorchDynamoPlugin(backend=COMPILER, dynamic=False)} if config.compile else {}
    return Accelerator(
        mixed_precision=precision,
        # Run weights steps itself: else a number in the user's configuration of accelerate would divide gradients too.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        cpu=cpu or not torch.accelerator.is_available(),  # else processes without a GPU would each train alone
        **plugin,
    )


def _warn_of_missing_processes() -> None:
    """Where ``accelerate launch`` prepared for several processes, but left it to an MPI that is not there."""
    prepared = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if prepared and not any(name in os.environ for name in _SIZES):
        warnings.warn(
            "accelerate launch was asked for several processes and has started one; without a GPU, too, it needs "
            "--multi_gpu for that, or MPI. torchrun --nproc-per-node N starts N processes anywhere",
            stacklevel=3,
        )


def _fastest_precision(cuda: bool) -> str:
    if cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Three times as fast as float32 where the processor multiplies bfloat16, and slower where it does not.
    return "bf16" if private.has_bf16_units() else "no"


def from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What ``function`` returns, or raises, in the main process; it runs in no other."""
    if accelerator.num_processes == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# ---------------------------------------------------------------- what is exchanged


@dataclasses.dataclass
class Exchange:
    """Bytes one process has handed to collective operations: of ``gradients`` reduced, and of ``weights`` gathered."""

    gradients: int = 0
    weights: int = 0

    def per_update(self, updates: int) -> dict[str, int]:
        """The same, of one of ``updates`` optimizer updates."""
        return {name: round(total / updates) for name, total in dataclasses.asdict(self).items()}

    def restrict_to_gradients(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Has DDP exchange gradients alone from now on, and counts its buckets."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(group, bucket):  # DDP checks annotations, and would not take these as text
            self.gradients += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, hook)
        # Else DDP would send those of the frozen backbone around in every step.
        model.broadcast_buffers = bool(trained_buffers(model.module))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Averages the gradients of ``parameters`` over all processes, those of a dtype in one operation."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self.gradients += flat.nbytes
            flat /= dist.get_world_size()
            dist.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            private.foreach_copy(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


class _CountedAllGather:
    """FSDP2's gathering of weights, counted."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.exchange.weights += output_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


# ---------------------------------------------------------------- copies and shares


def copy_to_all(model: nn.Module, accelerator: Accelerator, exchange: Exchange) -> nn.Module:
    """``model`` on the device of ``accelerator``; in several processes wrapped by DDP, which averages gradients.

    Compiled where the accelerator has a compiler.
    """
    prepared = accelerator.prepare(model)
    if accelerator.num_processes > 1:
        exchange.restrict_to_gradients(getattr(prepared, "_orig_mod", prepared))  # the DDP inside a compiled module
    return prepared


def shard_frozen(model: nn.Module, accelerator: Accelerator, exchange: Exchange) -> nn.Module:
    """A copy of ``model`` whose frozen parameters are spread over the processes by FSDP2, block by block.

    Blocks are the members of the model's lists and sequences; what is outside them is one more share. The weights of a
    block are gathered when it is used and freed after it. Trained parameters are not spread: they are few, and their
    gradients are averaged by :meth:`Exchange.average_gradients`. The copy shares them with ``model``, on the device of
    ``accelerator``; the rest of ``model`` stays as it is, where it is.

    Raises:
        ValueError: nothing is frozen, or batch norms are trained.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    if all(id(p) in trained for p in model.parameters()):
        raise ValueError("fsdp spreads frozen weights over the processes; nothing of this model is frozen")
    if trained_buffers(model):
        raise ValueError(f"fsdp does not share running statistics: {', '.join(trained_buffers(model))} are trained")
    for parameter in trained.values():
        parameter.data = parameter.data.to(accelerator.device)
    sharded = copy.deepcopy(model, dict(trained))
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in [*_blocks(sharded), sharded]:
        fully_shard(module, mesh=mesh, ignored_params=set(trained.values()))
        module.set_custom_all_gather(_CountedAllGather(exchange))
    return sharded


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Members of lists and sequences that hold parameters in modules of their own, inner ones first."""
    for parent in reversed(list(model.modules())):
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            yield from (block for block in parent if _is_block(block))


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None
