"""``check_gradients``: does every adapter parameter take part in the loss?"""

from __future__ import annotations

from torch import nn

from rlrr_kernels.adapt.model import own_parameters


def check_gradients(model: nn.Module) -> None:
    """Raises when an adapter parameter got no gradient; call it once, after the first backward, before ``zero_grad``.

    Whatever keeps a layer from being called (a model that computes with its weight directly, a branch that is never
    taken) shows here: such a layer would train nothing in silence. A gradient that is zero is one: behind a
    zero-initialised head all of them are zero in the first step.

    Raises:
        ValueError: the model is not adapted.
        RuntimeError: parameters without a gradient, all of them named.
    """
    trained = {name: parameter for name, parameter in own_parameters(model).items() if parameter.requires_grad}
    # Of what FSDP1 cuts into pieces, a process has none of some parameters.
    trained = {name: parameter for name, parameter in trained.items() if parameter.numel()}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    if not missing:
        return
    if len(missing) == len(trained):
        raise RuntimeError(
            f"none of the {len(trained)} adapter parameters has a gradient; call check_gradients after backward() and "
            "before zero_grad()"
        )
    raise RuntimeError(
        f"{len(missing)} of {len(trained)} adapter parameters got no gradient, so they would not be trained: "
        f"{', '.join(missing)}. Their layers are never called, or the model reads their weight instead of calling "
        "them; leave them alone with RLRRConfig(exclude=[...])"
    )
