"""Small runs of ``fit``, stopped at will."""

import math

import torch

from rlrr_kernels import RLRRConfig, adapt_model, parameter_groups
from rlrr_kernels.train.config.train_config import TrainConfig
from rlrr_kernels.train.data.folders import ImageDataset, find_splits
from rlrr_kernels.train.loop.fit import fit
from rlrr_kernels.train.models.backbones import create_model

CONFIG = TrainConfig(
    epochs=4, batch_size=5, accumulate=2, warmup_epochs=1, checkpoint_minutes=0, clip_grad=1.0, mixed_precision="no"
)


class Stop(Exception):
    """Raised in the place where a run is to be stopped."""


class StoppingDataset(ImageDataset):
    """Raises ``Stop`` when ``reads`` images have been read."""

    reads = math.inf

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise Stop
        return super().__getitem__(index)


def train(images, folder, config=CONFIG, *, reads=math.inf, resume=False, lr=1e-2, identity=None):
    """Adapts and fits test_vit on ``images``; returns the model and the result."""
    folder.mkdir(exist_ok=True)
    splits = find_splits(images)
    torch.manual_seed(0)
    model, preprocessing = create_model("test_vit", 2, image_size=32, weights="none")
    adapt_model(model, RLRRConfig(recipe="paper"))
    train_set = StoppingDataset(splits["train"], preprocessing.transform("flip"), seed=0)
    train_set.reads = reads
    val_set = ImageDataset(splits["val"], preprocessing.transform())
    groups = parameter_groups(model, lr, 1e-2)
    result = fit(model, groups, train_set, val_set, config, folder, resume=resume, quiet=True, identity=identity)
    return model, result


def trained(model):
    """The trained tensors by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, other):
    """Every trained tensor is equal, bit by bit."""
    for name, tensor in trained(other).items():
        assert torch.equal(trained(model)[name], tensor), name


def numbers(result):
    """The history without what differs from run to run."""
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
