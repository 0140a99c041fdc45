"""``Rescaled``: what the layers with a frozen weight under a trained low-rank rescaling share."""

from __future__ import annotations

import copy
import operator
import sys
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrr_kernels.nn.scales import draw_scales, with_ones
from rlrr_kernels.ops.checks import MAX_RANK
from rlrr_kernels.ops.dtypes import accumulate_dtype
from rlrr_kernels.ops.host import private

INITS = ("paper", "identity", "normal")
SIDES = ("both", "left", "right")

Plain = TypeVar("Plain", nn.Linear, nn.Conv2d)


def check_sides(sides: str, rank: int) -> None:
    """Raises ``ValueError`` unless ``sides`` is one of :data:`SIDES`, and ``both`` where the rank is above 1."""
    if sides not in SIDES:
        raise ValueError(f"sides must be one of {', '.join(SIDES)}; got {sides!r}")
    if sides != "both" and rank != 1:
        raise ValueError(
            f"rank must be 1 for sides={sides!r}: beside ones, several vectors act as their sum; got {rank}"
        )


_PLAIN_SUBCLASSES = {"timm.layers.linear.Linear"}
"""Classes whose forward is another one that computes the same."""


REPLACED_FORWARD = (
    "its forward was replaced on the module itself, as accelerate's hooks do, and would be lost: take that off "
    "(remove_hook_from_submodules) and put it on again afterwards"
)


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether somebody set another ``forward`` than that of its class on the object ``module``."""
    forward = vars(module).get("forward")  # its own, bound, is what accelerate leaves behind
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see or change a call of ``module``: a hook, or a ``forward`` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_replaced_forward(module)
    )


def unfit_reason(layer: nn.Module) -> str | None:
    """Why ``layer``, an ``nn.Linear`` or ``nn.Conv2d``, does not compute with frozen tensors of its own alone, or None.

    Its class or somebody else has another forward for it, or its weight or bias is computed from other tensors
    (parametrized, spectral- or weight-normed, pruned), quantised, sharded or not there yet.
    """
    kind = type(layer)
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if plain is nn.Conv2d else ("forward",)
    if has_replaced_forward(layer):
        return REPLACED_FORWARD
    tensors = [key for key in ("weight", "bias") if key not in layer._parameters]
    if tensors:
        sources = [key for key in (*layer._parameters, *layer._buffers) if key.startswith(tuple(tensors))]
        made = f" from {', '.join(sources)}" if sources else ""
        return (
            f"its {' and '.join(tensors)} is computed{made}: make it a plain tensor first, by "
            "torch.nn.utils.parametrize.remove_parametrizations, prune.remove or remove_spectral_norm"
        )
    if f"{kind.__module__}.{kind.__name__}" not in _PLAIN_SUBCLASSES and any(
        getattr(kind, method) is not getattr(plain, method) for method in methods
    ):
        return f"{kind.__name__} has a forward of its own"
    for key in ("weight", "bias"):
        parameter = layer._parameters[key]
        if parameter is not None and not _is_plain(parameter):
            return f"its {key} is a {type(parameter).__name__} of {parameter.dtype}, not a plain floating-point tensor"
    weight = layer._parameters["weight"]
    if weight is None or weight.dim() != (4 if plain is nn.Conv2d else 2):
        return "its weight is not there, or of other dimensions"
    return None


def check_plain(argument: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ``TypeError`` unless ``layer`` is a plain one of ``kind``, ``nn.Linear`` or ``nn.Conv2d``."""
    if not isinstance(layer, kind):
        got, name = type(layer), type(layer).__name__  # quantised ones are called Linear too
        name = f"{got.__module__}.{name}" if name == kind.__name__ else name
        raise TypeError(f"{argument} must be an nn.{kind.__name__}; got {name}")
    reason = unfit_reason(layer)
    if reason is not None:
        raise TypeError(f"{argument} must be a plain nn.{kind.__name__}, but {reason}")


def _is_plain(parameter: nn.Parameter) -> bool:
    """Not so for the classes of quantised, sharded and uninitialised tensors; fake tensors stand for plain ones."""
    kind = type(parameter)
    return (kind is nn.Parameter or kind.__module__.startswith("torch._subclasses.")) and parameter.is_floating_point()


def frozen(parameter: Tensor) -> Tensor:
    """``parameter`` without the gradient that FSDP1 asks for: its views of a flat one require it, trained or not."""
    return parameter.detach() if getattr(parameter._base, "_is_flat_param", False) else parameter


def is_proxy(x: Any) -> bool:
    """Whether ``torch.fx`` traces: ``x`` stands for a tensor."""
    return isinstance(x, torch.fx.Proxy)


def call_in_graph(module: nn.Module, x: Any) -> Any:
    """A node of the graph that ``torch.fx`` records which calls ``module``, as it has them for ``torch.nn``'s own."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def refuse_script(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` calls as ``__prepare_scriptable__``: the kernels are no TorchScript."""
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(module).__name__}; merge_adapter(model) first, or use torch.jit.trace "
        "or torch.export"
    )


class Rescaled(nn.Module):
    """A frozen layer whose weight, seen as a matrix W [N, K], is W ⊙ (1 + s_r s_c), with a shift f on its bias.

    A subclass says how W' is made and used: :meth:`merged_weight`, :meth:`_rescaled` and :meth:`_plain`.

    Attributes:
        weight, bias: of the frozen layer, its own parameter objects under its own state-dict keys; bias may be None.
        scale_row: [N, r], or None for ones. scale_col: [G, r, K], or None for ones. shift: [out] or None. (trained)
        rank: r. residual: whether the 1 is there. init: see :meth:`reset_parameters`.
        sides: ``both`` scales are trained, or ``left`` (s_r alone, s_c = 1) or ``right`` (s_c alone, s_r = 1; r = 1).
    """

    weight: Tensor
    bias: Tensor | None
    scale_row: nn.Parameter | None
    scale_col: nn.Parameter | None
    shift: nn.Parameter | None

    def _adopt(
        self,
        layer: nn.Linear | nn.Conv2d,
        rows: int,
        cols: int,
        *,
        rank: int,
        col_groups: int,
        shift: bool,
        residual: bool,
        sides: str,
        init: str,
        scale_dtype: torch.dtype,
    ) -> None:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank must be from 1 to {MAX_RANK}; got {rank}")
        if not scale_dtype.is_floating_point:
            raise TypeError(f"scale_dtype must be a floating-point dtype; got {scale_dtype}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
        check_sides(sides, rank)
        self.rank, self.residual, self.sides, self.init = rank, residual, sides, init
        self._size = rows, cols
        self.weight = layer.weight.requires_grad_(False)
        self.bias = None if layer.bias is None else layer.bias.requires_grad_(False)
        options: dict[str, Any] = {"dtype": scale_dtype, "device": layer.weight.device}
        self.scale_row = None if sides == "right" else nn.Parameter(torch.empty(rows, rank, **options))
        self.scale_col = None if sides == "left" else nn.Parameter(torch.empty(col_groups, rank, cols, **options))
        self.shift = nn.Parameter(torch.empty(layer.weight.shape[0], **options)) if shift else None
        self._merged: tuple[Tensor, Tensor | None] | None = None
        self._merged_from: tuple[list[Tensor | None], list[int]] = [], []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the scales anew; the frozen tensors stay. F = 1 + s_r s_c below is the factor W'/W.

        * ``paper``: s_c ~ U(±√(6/K)), s_r ~ U(±√(6/r)), the authors' ``kaiming_uniform_`` on [1, K] and [N, 1]. F has
          mean 1 and standard deviation 2/√K at any rank: 7 % for K = 768.
        * ``identity``: s_r = 0, s_c as in ``paper``. F = 1; in the first step only s_r has a gradient.
        * ``normal``: both N(0, 0.02). F has standard deviation 0.0004 √r.

        Without the residual F = s_r s_c starts near 1 too: the first pair of vectors is 1 plus U(±√(6/K)) for
        ``paper`` (standard deviation 2/√K), exactly 1 for ``identity``, 1 plus N(0, 0.02) for ``normal`` (0.028);
        further pairs start as they do with the residual. The shift starts at 0.

        With one side alone F = 1 + s, and s is U(±√(6/K)) on either side for ``paper`` (s_r as wide as it is beside s_c
        would leave nothing of W), 0 for ``identity``, N(0, 0.02) for ``normal``. Without the residual F = s starts at 1
        plus these: the same function with the same start, which weight decay pulls towards 0 instead of W.
        """
        draw_scales(self.scale_row, self.scale_col, self._size[1], self.init, self.residual)
        if self.shift is not None:
            with torch.no_grad():
                self.shift.zero_()

    def scales(self) -> tuple[Tensor, Tensor]:
        """s_r [N, r] and s_c [G, r, K], ones where a side is not trained."""
        scale_row, scale_col = self.scale_row, self.scale_col  # once each, see _total_bias
        if scale_row is not None and scale_col is not None:
            return scale_row, scale_col
        return with_ones(scale_row, scale_col, *self._size)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' in the shape of the weight, as a new tensor."""
        raise NotImplementedError

    def _rescaled(self, x: Tensor) -> Tensor:
        """The layer's result for ``x``, differentiable in the scales and the shift."""
        raise NotImplementedError

    def _formula(self, x: Tensor) -> Tensor:
        """The same as :meth:`_rescaled` in PyTorch's own operations."""
        raise NotImplementedError

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The frozen layer's operation with another weight and bias."""
        raise NotImplementedError

    __prepare_scriptable__ = refuse_script

    def _wide_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, s_r and s_c in the dtype in which W' is computed before it is rounded."""
        wide = accumulate_dtype(self.weight.dtype)
        scale_row, scale_col = self.scales()
        return self.weight.to(wide), scale_row.to(wide), scale_col.to(wide)

    def _slow_forward(self, input: Tensor) -> Tensor:
        # What a module's call runs instead of the forward while torch.jit.trace records: it could neither save nor
        # move what an autograd.Function does, and would record a merge that the next call does not need.
        return self._formula(input) if self._merged is None or self._is_outdated() else self.forward(input)

    def forward(self, input: Tensor) -> Tensor:  # as torch.nn's own call it
        """The rescaled layer, or the merged one after :meth:`merge`.

        Raises:
            RuntimeError: the layer is merged and in training mode with gradients on: nothing would be trained.
        """
        if type(input) is not Tensor and is_proxy(input):
            return call_in_graph(self, input)
        if self._merged is None:
            return self._rescaled(input)
        if self.training and torch.is_grad_enabled():
            kind = type(self).__name__
            raise RuntimeError(f"this {kind} is merged, so its scales would not be trained; call unmerge() first")
        if not torch.compiler.is_compiling() and self._is_outdated():
            if private.transforms_active():  # a call with tensors of its own, of which no W' may stay
                return self._rescaled(input)
            self.merge()
        weight, bias = self._merged
        dtype = input.dtype
        if dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return self._plain(input, weight, bias)

    def _total_bias(self) -> Tensor | None:
        bias, shift = self.bias, self.shift  # once each: looking up a parameter costs the host a third of a microsecond
        if shift is None:
            return bias
        return shift if bias is None else bias + shift

    @torch.no_grad()
    def merged_bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """b + f, rounded once to ``dtype`` (default: W's); None without a bias and a shift."""
        bias = self._total_bias()
        return None if bias is None else bias.to(dtype or self.weight.dtype, copy=True)

    @property
    def merged(self) -> bool:
        """Whether the forward uses a merged weight."""
        return self._merged is not None

    def merge(self) -> Rescaled:
        """Computes W' and b + f once and uses them from now on, as the plain layer would; returns self.

        ``weight`` is neither written nor replaced (it may be shared): ``state_dict``, ``deepcopy`` and saving see the
        frozen tensors as before. Costs one more weight of memory until :meth:`unmerge`; a plain layer of its own
        (``to_linear``, ``to_conv``) does not. The next forward merges anew where a tensor was replaced or written in
        place; what is written through ``.data``, or to inference tensors, or under a compiled or exported forward,
        it does not see.
        """
        sources = self._sources()  # before they are read: what is written meanwhile shows in the next forward
        with torch.inference_mode(False):  # else no later forward could be differentiated in its input
            self._merged = self.merged_weight(), self.merged_bias()
        self._merged_from = sources
        return self

    def _sources(self) -> tuple[list[Tensor | None], list[int]]:
        """What W' and b + f are made of, and how often each tensor was written."""
        own = self._parameters  # without a module's slow way to its attributes, for every forward asks
        names = "weight", "bias", "scale_row", "scale_col", "shift"
        tensors = [own[name] if name in own else getattr(self, name) for name in names]
        return tensors, [-1 if t is None or t.is_inference() else t._version for t in tensors]

    def _is_outdated(self) -> bool:
        """Whether W' and b + f are of other tensors, or of what was in them before they were written."""
        (merged, written), (tensors, now) = self._merged_from, self._sources()
        return written != now or any(map(operator.is_not, merged, tensors))

    def unmerge(self) -> Rescaled:
        """Goes back to the frozen weight, which was never touched; returns self."""
        self._merged = None
        return self

    @torch.no_grad()
    def merge_error(self, x: Tensor) -> float:
        """‖y_merged - y‖ / ‖y‖ for inputs x: what rounding W' to the dtype of the weight costs."""
        weight, bias = self.merged_weight().to(x.dtype), self.merged_bias()
        y = self._rescaled(x).double()
        error = self._plain(x, weight, None if bias is None else bias.to(x.dtype)).double() - y
        return (error.norm() / y.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()

    @torch.no_grad()
    def _merged_into(self, plain: Plain) -> Plain:
        """``plain``, a layer of the same kind without values, with W' and b + f, sharing nothing with this one."""
        weight, bias = self.merged_weight(), self.merged_bias()
        plain.weight = nn.Parameter(weight)
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        return plain.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rescaled:
        # fuse_linear_bn_eval and fuse_conv_bn_eval set another weight and bias on a copy, under scales and a shift that
        # they do not know. They ask the layer nothing before that.
        fusion, caller = sys.modules.get("torch.nn.utils.fusion"), sys._getframe(1).f_back
        if fusion is not None and caller is not None and caller.f_code.co_filename == fusion.__file__:
            raise TypeError(
                f"{type(self).__name__} cannot be fused with a batch norm before it is merged; merge_adapter(model) "
                "first, or pass its to_linear() or to_conv()"
            )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(vars(self), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._merged_from = [], []  # a copy's tensors count their writes anew; earlier pickles have no such list

    def _apply(self, fn: Any, recurse: bool = True) -> Rescaled:
        super()._apply(fn, recurse)
        return self.merge() if self.merged else self  # a moved or cast layer merges its moved or cast tensors

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged:
            self.merge()

    def _extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, rank={self.rank}, shift={self.shift is not None}, residual={self.residual}"
            + ("" if self.sides == "both" else f", sides={self.sides!r}")
            + (", merged" if self.merged else "")
        )


class RescaledLinear(Rescaled):
    """What those of them share whose frozen layer is an ``nn.Linear``; G groups of rows have a vector of s_c each."""

    def _adopt_linear(self, linear: nn.Linear, groups: int, **options: Any) -> None:
        rows, cols = linear.weight.shape
        if groups < 1 or rows % groups:
            raise ValueError(f"groups must divide out_features = {rows}; got {groups}")
        self.in_features, self.out_features, self.groups = cols, rows, groups
        self._adopt(linear, rows, cols, col_groups=groups, **options)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W' and b + f, sharing nothing with this layer. A shift makes it have a bias."""
        return self._merged_into(nn.Linear(self.in_features, self.out_features, device="meta"))

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"
        return f"{size}, {self._extra_repr()}"
