"""``RLRRPeftConfig``: what PEFT's ``get_peft_model`` is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from rlrr_kernels.adapt.config import WITH_BIAS, RLRRConfig
from rlrr_kernels.nn.rescaled import INITS
from rlrr_kernels.ops.checks import MAX_RANK
from rlrr_kernels.peft.registry import RLRR, complete_card

Names = list[str] | set[str] | str | None


@dataclass
class RLRRPeftConfig(PeftConfig):
    """RLRR for PEFT: W' = W ⊙ (1 + s_r s_c) and a shift of the bias, on linear layers.

    Args:
        r: rank, 1 to 64; 1 is the paper's.
        groups: G, divides the layers' N; row n uses ``scale_col[n // (N / G)]``. None: 1, and 3 on the fused qkv of
            timm's transformers where ``target_modules`` is None too, as in the paper.
        shift: whether a shift f [N] is trained. ``with_bias``: only where the layer has a bias, so that a merged model
            gains none, which its class would not load.
        residual: ``False`` drops the 1: W' = W ⊙ (s_r s_c).
        sides: ``both`` scales, or ``left`` (s_r alone) or ``right`` (s_c alone) with rank 1.
        init_weights: True: ``identity``, the adapted model starts as the base model. Or the name of a start, see
            :meth:`rlrr_kernels.nn.rescaled.Rescaled.reset_parameters`: ``paper``, ``identity``, ``normal``. False:
            ``paper`` and a random shift, for debugging.
        target_modules: names (ends of names) of linear layers, a regular expression, or ``all-linear``, which leaves
            out the head of a model of timm's, and of one of transformers' what PEFT leaves out: the output embedding,
            and the head where ``task_type`` is ``SEQ_CLS``. None: the linear layers in the numbered blocks of a model
            of timm's or transformers'.
        exclude_modules: names or a regular expression of layers to leave alone.
        modules_to_save: modules trained and saved as they are, a head say.
        layers_to_transform: indices of the blocks to adapt. layers_pattern: what the list of blocks is called.
        rank_pattern, groups_pattern: name or regular expression → r or G of such layers.

    Raises:
        TypeError, ValueError: an argument has a type or value that is not allowed.
    """

    r: int = field(default=1, metadata={"help": "Rank, 1 to 64"})
    groups: int | None = field(default=None, metadata={"help": "G, which divides out_features"})
    shift: bool | str = field(default=WITH_BIAS, metadata={"help": "Train a shift: True, False, 'with_bias'"})
    residual: bool = field(default=True, metadata={"help": "Whether W itself is added"})
    sides: str = field(default="both", metadata={"help": "Trained scales: both, left or right"})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True (no-op), False (random), or paper, identity, normal"}
    )
    target_modules: Names = field(default=None, metadata={"help": "Names, a regular expression or 'all-linear'"})
    exclude_modules: Names = field(default=None, metadata={"help": "Names or a regular expression of layers to leave"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained as they are"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks"})
    layers_pattern: Names = field(default=None, metadata={"help": "What the list of blocks is called"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Name or pattern → r"})
    groups_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Name or pattern → G"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RLRR
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        self.rank_pattern, self.groups_pattern = self.rank_pattern or {}, self.groups_pattern or {}
        if self.init not in INITS:
            raise ValueError(
                f"init_weights must be True, False or one of {', '.join(INITS)}; got {self.init_weights!r}"
            )
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": r for k, r in self.rank_pattern.items()}}.items():
            if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise ValueError(f"{name} must be an integer from 1 to {MAX_RANK}; got {rank!r}")
        self.adaptation()
        self.adaptation(groups=self.groups_pattern)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None where target_modules is a string; got {getattr(self, name)!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern needs layers_to_transform too; got {self.layers_pattern!r} alone")

    @property
    def init(self) -> str:
        """The start of the scales, by its name."""
        if isinstance(self.init_weights, str):
            return self.init_weights
        return "identity" if self.init_weights else "paper"

    def adaptation(self, **changes: Any) -> RLRRConfig:
        """What a layer gets, as :func:`rlrr_kernels.adapt_model` would be told it; ``changes``: ``rank``, ``groups``.

        Raises:
            TypeError, ValueError: a value is not allowed.
        """
        values: dict[str, Any] = {"rank": self.r, "groups": self.groups, "init": self.init}
        values |= {name: getattr(self, name) for name in ("shift", "residual", "sides")}
        return RLRRConfig(**values | changes)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration as PEFT does, and what to import into the model card that lies there."""
        super().save_pretrained(save_directory, **kwargs)
        complete_card(Path(save_directory))
