"""What training changes in a model: the tensors a checkpoint has to hold."""

from __future__ import annotations

from torch import Tensor, nn


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients, and the running statistics of the batch norms they belong to, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | trained_buffers(model)


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the batch norms that are trained, by name."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_frozen(module)
        for key, buffer in module.named_buffers()
    }


def is_frozen(module: nn.Module) -> bool:
    """Whether none of the module's own parameters requires a gradient."""
    return all(not parameter.requires_grad for parameter in module.parameters(recurse=False))
