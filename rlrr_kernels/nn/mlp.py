"""``RLRRMlp``: timm's ``Mlp`` over rescaled layers, without keeping the activation's result for the backward."""

from __future__ import annotations

from timm.layers import Mlp
from timm.layers.activations import GELU, GELUTanh
from torch import Tensor, nn

from rlrr_kernels.nn.linear import RLRRLinear
from rlrr_kernels.nn.rescaled import has_hooks, is_proxy
from rlrr_kernels.ops.host import private
from rlrr_kernels.ops.mlp import rlrr_mlp


class RLRRMlp(Mlp):
    """timm's ``Mlp`` whose fc1 and fc2 are :class:`rlrr_kernels.RLRRLinear`, by :func:`rlrr_kernels.rlrr_mlp`.

    Modules, parameters and state dict are timm's own, so an ``Mlp`` becomes one by its ``__class__`` alone. Where the
    operator does not do the same, timm's forward runs: while a dropout between the layers is active, with another
    activation than GELU or a norm, with merged layers, with hooks on a module inside or on all modules, and while
    ``torch.fx`` or ``torch.jit`` traces.
    """

    fc1: RLRRLinear  # type: ignore[assignment]  # what an adapted Mlp holds in place of its nn.Linear
    fc2: RLRRLinear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        activation = fused_activation(self)
        if activation is None or is_proxy(x) or not self._undisturbed():
            return super().forward(x)
        fc1, fc2 = self.fc1, self.fc2
        y = rlrr_mlp(
            x, fc1.weight, *fc1.scales(), fc1._total_bias(), fc2.weight, *fc2.scales(), fc2._total_bias(),
            activation=activation, residual=fc1.residual,
            fc1_scale_grad_rows=fc1._draw_rows(x), fc2_scale_grad_rows=fc2._draw_rows(x),
        )  # fmt: skip
        return self.drop2(y)

    def _undisturbed(self) -> bool:
        """Whether nothing happens between the layers, for now, that the operator would leave out."""
        if private.any_global_hook() or private.tracing_state() is not None:
            return False
        if self.fc1.weight.requires_grad or self.fc2.weight.requires_grad:  # FSDP1's: the layers know
            return False
        drop1 = self.drop1
        drops = self.training and type(drop1) is nn.Dropout and drop1.p > 0
        if self.fc1.merged or self.fc2.merged or drops or type(drop1) not in (nn.Dropout, nn.Identity):
            return False
        return not any(map(has_hooks, (self.fc1, self.act, self.drop1, self.norm, self.fc2)))


def fused_activation(mlp: Mlp) -> str | None:
    """What ``rlrr_mlp`` calls the activation of ``mlp``; None where the operator cannot compute the module."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    if type(fc1) is not RLRRLinear or type(fc2) is not RLRRLinear or fc1.residual != fc2.residual:
        return None
    return activation_name(mlp.act) if type(mlp.norm) is nn.Identity else None


def activation_name(module: nn.Module) -> str | None:
    """What ``rlrr_mlp`` calls an activation module; None for one it does not know."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {GELU: "gelu", GELUTanh: "gelu_tanh"}.get(type(module))
