"""From an image to the input of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from rlrr_kernels.train.config.files import check_types

AUGMENTATIONS = ("none", "flip", "crop", "timm")

RESIZES = ("center", "squash")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model, as timm's configuration of its weights says.

    Args:
        image_size: pixels, height and width.
        crop: share of the shorter side that the centre crop keeps.
        interpolation: of the resize, a name of timm's.
        mean, std: per channel, of values in [0, 1].
        resize: ``center`` keeps the aspect ratio (the shorter side becomes ``image_size / crop``), ``squash`` does not.

    Raises:
        ValueError: a value is of another type or not allowed.
    """

    image_size: int
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "center"

    def __post_init__(self) -> None:
        check_types(self)
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1; got {self.image_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std above 0; got {self.mean} and {self.std}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {self.resize!r}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1; got {self.crop}")

    def transform(self, augment: str | None = None) -> Callable[[Image.Image], Tensor]:
        """An image to [3, image_size, image_size] float32.

        Args:
            augment: None for evaluation (resize, centre crop). For training ``none`` (the same), ``flip`` (and a
                horizontal flip of every other image), ``crop`` (that flip, and the crop at random instead of in the
                centre) or ``timm`` (timm's random crops, flips and colours).
        """
        from timm.data import create_transform
        from torchvision.transforms import CenterCrop, Compose, RandomCrop, RandomHorizontalFlip

        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}; got {augment!r}")
        options = {
            "input_size": (3, self.image_size, self.image_size),
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }
        if augment == "timm":
            return create_transform(is_training=True, **options)
        plain = create_transform(crop_pct=self.crop, crop_mode=self.resize, **options)
        if augment in (None, "none"):
            return plain
        if augment == "crop":
            crop = RandomCrop((self.image_size, self.image_size))
            plain = Compose([crop if isinstance(step, CenterCrop) else step for step in plain.transforms])
        return Compose([RandomHorizontalFlip(), plain])
