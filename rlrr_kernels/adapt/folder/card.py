"""The model card of an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlrr_kernels.adapt.report import AdaptReport

_TEMPLATE = """\
---
library_name: rlrr-kernels
tags:
- rlrr
- parameter-efficient-fine-tuning
{front_matter}---

# RLRR adapter for {base}

Trained scales and shifts (and head) of a frozen {base_class}, by residual low-rank rescaling (Dong et al., CVPR 2024,
arXiv 2403.19067). The backbone's own weights are not part of it.

## Use

```python
{use}
```

## Trained parameters

```
{report}
```

## Configuration

```json
{config}
```
{metadata}"""


def model_card(document: Mapping[str, Any], report: AdaptReport | str, usage: str | None = None) -> str:
    """The card's text. ``document`` is what ``config.json`` holds, ``report`` the adapted model's, or other text."""
    base = document["base_model"]
    name = base["name"]
    metadata = document["metadata"]
    return _TEMPLATE.format(
        front_matter=f"base_model: timm/{name}\n" if name else "",
        base=name or base["class"],
        base_class=base["class"],
        use=usage or _usage(base),
        report=report,
        config=json.dumps(document["adaptation"], indent=2),
        metadata=f"\n## Metadata\n\n```json\n{json.dumps(metadata, indent=2)}\n```\n" if metadata else "",
    )


def _usage(base: Mapping[str, Any]) -> str:
    name, classes = base["name"], base["num_classes"]
    lines = ["from rlrr_kernels import load_adapter, merge_adapter", ""]
    if name:
        arguments = f'"{name}", pretrained=True' + ("" if classes is None else f", num_classes={classes}")
        lines = ["import timm", *lines, f"model = timm.create_model({arguments})"]
    else:
        lines.append(f"model = ...  # the {base['class']} it was trained on")
    lines += [
        'load_adapter(model, "path/to/this/folder")',
        "merge_adapter(model)  # optional: a plain model, nothing left to pay at inference",
    ]
    return "\n".join(lines)
