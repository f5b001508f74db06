"""What an evaluation needs of a set of images: the images, and their classes or captions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from unicl.data.image_sets.images import ImageFiles, Images
from unicl.data.shards import RawSample
from unicl.errors import UsageError


class MissingSetError(UsageError):
    """The files of a known set are not where they belong."""


Metric = Literal["top1", "mean_per_class", "map11", "map"]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One split of a set of images.

    It can be pickled, and is cheap to fork.

    Raises:
        UsageError: There are no images.
    """

    name: str
    """What it is called: a known name, or the path that was opened."""
    split: str
    """Which part of it this is; empty for the whole of a set without parts."""
    splits: tuple[str, ...]
    """Names of all parts that can be opened; empty for a set without parts."""
    images: Images
    """The images, in a fixed order."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples that lie in the set but cannot be evaluated on, counted by reason."""
    where: Path | None = None
    """What opens it again from anywhere, where it was opened by the name of a known set."""

    def __post_init__(self) -> None:
        if not self.images.num_samples:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.items())
            raise UsageError(f"{self} holds no images ({reasons or 'it is empty'})")

    def __str__(self) -> str:
        return f"{self.name} ({self.split})" if self.split else self.name

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self.images.num_samples

    @cached_property
    def fingerprint(self) -> str:
        """Digest that changes when the images or their order may have changed.

        It is of paths, sizes and times of change, or of the pixels where there are no files.
        Classes and captions have no part in it.

        Raises:
            UniclError: Images are missing.
        """
        return self.images.digest()

    def read(self, index: int) -> RawSample:
        """Return an image as encoded bytes, with an empty text.

        Raises:
            SampleError: It is out of reach.
        """
        return self.images.read(index)

    def locate(self, index: int) -> tuple[str, int]:
        """Return where an image lies and its place there, for messages."""
        return self.images.locate(index)

    def path(self, index: int) -> Path | None:
        """Return the absolute path of an image that is a file of its own; None for others."""
        if not isinstance(self.images, ImageFiles):
            return None
        return (self.images.folder / self.locate(index)[0]).absolute()


@dataclass(frozen=True, kw_only=True)
class ClassificationSet(ImageSet):
    """Images with one class each, or with several."""

    class_names: tuple[str, ...]
    """One name per class, fit for a prompt; two classes may share a name (ImageNet's do)."""
    empty_classes: tuple[str, ...] = ()
    """Those of them, by their folders' names, that no part has an image of."""
    templates: tuple[str, ...]
    """The prompt ensemble; each has `{}` once, for the name."""
    short_text_words: int | None = None
    """Names of more words stay as they are, as in pretraining; None fills templates with all."""
    targets: Int64[np.ndarray, " num_images"] | Bool[np.ndarray, "num_images num_classes"]
    """Number of each image's class, or which classes it shows."""
    metric: Metric
    """The published one: accuracy, mean of the classes' accuracies, 11-point mAP (VOC2007), or mAP
    without interpolation (CLIP_benchmark's sets of several classes)."""
    counted: Bool[np.ndarray, "num_images num_classes"] | None = None
    """Which images count for which class; None where all do. VOC2007 leaves `difficult` out."""


@dataclass(frozen=True, kw_only=True)
class CaptionSet(ImageSet):
    """Images with one caption or several."""

    captions: tuple[tuple[str, ...], ...]
    """The captions of each image."""


def choose_split(name: str, split: str, splits: tuple[str, ...]) -> str:
    """Return the split of a set that is asked about: `val` for `test` where only that is there.

    Raises:
        UsageError: It has other splits.
    """
    if split in splits:
        return split
    # As everywhere with ImageNet, whose test part has no labels.
    if split == "test" and "val" in splits:
        return "val"
    raise UsageError(f"{name} has no split {split!r}; it has {', '.join(splits)}")


def require_whole(name: str, split: str) -> None:
    """Refuse every split of a set without parts but `test`, which it is as a whole.

    Raises:
        UsageError: Another split was asked for.
    """
    if split != "test":
        raise UsageError(f"{name} is one part, to be tested on; give its {split} images as a set")
