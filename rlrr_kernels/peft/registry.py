"""All that this package touches of PEFT's internals: its closed list of methods, ``all-linear``, its model card.

PEFT finds a method's classes by a member of the enum ``PeftType``; ``register_peft_method`` refuses every other name,
so the enum is given one more member. A process that has not imported this package has no such member, and PEFT's
``from_pretrained`` fails there with a bare ``KeyError``: the model card says what to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import PeftType, register_peft_method

from rlrr_kernels.writing import write_together

NAME = "RLRR"
IMPORT = "import rlrr_kernels.peft"

_HEADING = "## Loading this RLRR adapter"
_CARD = f"""

{_HEADING}

PEFT knows the method once it is imported (`pip install "rlrr-kernels[peft]"`); without the import `from_pretrained`
ends with `KeyError: '{NAME}'`.

```python
{IMPORT}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def add_member(enum: Any, name: str) -> Any:
    """The member ``name`` of the string enum ``enum``, whose value is its name; made where there is none.

    It is a member in every way that ``enum`` offers: by name, by value, in iteration and ``in``, pickled and copied.
    """
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python >= 3.12
        enum._hashable_values_.append(name)
    type.__setattr__(enum, name, member)  # the enum's own refuses
    return member


RLRR = add_member(PeftType, NAME)


def register(config: type, model: type) -> None:
    """Makes PEFT build ``model`` for a ``config``; state-dict keys of the method have ``rlrr_`` in them."""
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)


def expand_all_linear(config: Any, model: Any) -> None:
    """Has ``target_modules`` of ``config`` name the layers of a transformers model that ``all-linear`` stands for."""
    _maybe_include_all_linear_layers(config, model)


def complete_card(folder: Path) -> None:
    """Has the README.md that PEFT wrote, in ``folder`` or for a named adapter the one above, say what to import.

    One that is no model card of PEFT's is left alone: a project may keep its adapters beside its own.
    """
    for card in (folder / "README.md", folder.parent / "README.md"):
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "library_name: peft" in text.partition("\n---")[0]:
            if _HEADING not in text:
                write_together(card.parent, {card.name: (text.rstrip() + _CARD).encode()})
            return
