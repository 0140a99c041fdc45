"""Mixup and cutmix, the same for a batch whether or not the run was stopped before it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from rlrr_kernels.train.config.train_config import TrainConfig


class Mixing:
    """timm's Mixup on batches; what it draws depends on seed, epoch, batch and process alone."""

    def __init__(self, config: TrainConfig, classes: int, process: int) -> None:
        from timm.data import Mixup

        self.seed, self.process = config.seed, process
        # The smoothing is the loss's: on mixed labels it is the same sum.
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Mixes [B, 3, H, W] in place, each image with one of the same batch; returns it and the labels as [B, C].

        Of an odd batch the last image is left as it is.
        """
        import numpy as np

        even = len(images) - len(images) % 2
        targets = torch.nn.functional.one_hot(labels, self.mixup.num_classes).float()
        if even:
            before = np.random.get_state()  # noqa: NPY002 (timm draws from the global generator)
            np.random.seed(random.Random(f"{self.seed} {epoch} {batch} {self.process}").getrandbits(32))  # noqa: NPY002
            try:
                images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
            finally:
                np.random.set_state(before)  # noqa: NPY002
        return images, targets
