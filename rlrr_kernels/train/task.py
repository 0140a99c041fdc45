"""A classifier as an adapter folder describes it: enough to make the model again and to feed it images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rlrr_kernels.train.config.files import check_types
from rlrr_kernels.train.data.preprocessing import Preprocessing
from rlrr_kernels.train.methods.files import folder_info, load_trained
from rlrr_kernels.train.models.backbones import HUB, NO_WEIGHTS, create_model


@dataclasses.dataclass(frozen=True)
class Task:
    """What a classifier is.

    Args:
        model: timm's name of the backbone.
        weights: where its weights came from: ``hub``, ``none``, or the name of a file.
        classes: names, in label order.
        preprocessing: of its images.

    Raises:
        ValueError: a value is of another type, or two classes have one name.
    """

    model: str
    weights: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.classes) < 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be different names, at least one; got {', '.join(self.classes) or 'none'}")

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON types."""
        return dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def of_adapter(cls, folder: str | Path) -> Task:
        """Reads the task out of an adapter folder.

        Raises:
            FileNotFoundError, ValueError: as for :func:`rlrr_kernels.train.methods.files.folder_info`; or it was not
                written by ``rlrr finetune``.
        """
        return cls.of_metadata(folder_info(folder).metadata, folder)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], folder: str | Path) -> Task:
        """The task that the metadata of the adapter in ``folder`` hold; raises ``ValueError`` as :meth:`of_adapter`."""
        values = metadata.get("task")
        try:
            preprocessing = Preprocessing(**values["preprocessing"])
            return cls(values["model"], values["weights"], tuple(values["classes"]), preprocessing)
        except ValueError as error:
            raise ValueError(f"the task of the adapter in {folder} is damaged: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the adapter in {folder} does not say which model and classes it is for: it was not written by "
                "`rlrr finetune`"
            ) from error

    def usage(self) -> str:
        """Python for a model card that makes the trained model again."""
        file = self.weights not in (HUB, NO_WEIGHTS)
        weights = f', weights="path/to/{self.weights}"' if file else ""
        return (
            "from rlrr_kernels import merge_adapter\n"
            "from rlrr_kernels.train.task import load_task\n\n"
            f'model, task = load_task("path/to/this/folder"{weights})\n'
            "transform = task.preprocessing.transform()  # of a PIL image; task.classes are the names by label\n"
            "merge_adapter(model)  # optional: a plain model, nothing left to pay at inference"
        )

    def backbone(self, weights: str | Path | None = None) -> nn.Module:
        """The frozen model with a new head.

        Args:
            weights: as for :func:`create_model`; None: where they came from in training,
                unless that was a file.

        Raises:
            ValueError: weights are None and came from a file; or as for ``create_model``.
        """
        size = self.preprocessing.image_size
        return create_model(self.model, len(self.classes), image_size=size, weights=weights or self.own_weights())[0]

    def own_weights(self) -> str:
        """Where the backbone's weights came from.

        Raises:
            ValueError: from a file, which may lie anywhere.
        """
        if self.weights not in (HUB, NO_WEIGHTS):
            raise ValueError(
                f"the adapter was trained on weights from a file called {self.weights}; "
                "say where it is with --weights FILE"
            )
        return self.weights


def load_task(
    folder: str | Path, weights: str | Path | None = None, *, image_size: int | None = None
) -> tuple[nn.Module, Task]:
    """The model of a folder written by ``rlrr finetune``, adapted by RLRR or a baseline, and its task.

    Full fine-tuning left nothing of the backbone's weights: ``weights`` are not read for it.

    Args:
        folder: the adapter's.
        weights: as for :meth:`Task.backbone`.
        image_size: pixels; None: those it was trained at.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for :meth:`Task.of_adapter`, :meth:`Task.backbone` and
            :func:`rlrr_kernels.train.methods.files.load_trained`.
    """
    task = Task.of_adapter(folder)
    if image_size is not None:
        preprocessing = dataclasses.replace(task.preprocessing, image_size=image_size)
        task = dataclasses.replace(task, preprocessing=preprocessing)
    model = task.backbone(NO_WEIGHTS if folder_info(folder).method == "full" else weights)
    load_trained(model, folder)
    return model, task
