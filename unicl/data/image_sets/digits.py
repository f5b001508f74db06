"""Scikit-learn's digits as images: 1,797 scans of handwritten digits, 8 x 8 pixels in 17 greys."""

import numpy as np

from unicl.data.image_sets.image_set import ClassificationSet, choose_split
from unicl.data.image_sets.images import PixelArray
from unicl.errors import UniclError

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of MNIST in CLIP's data/prompts.md, there with figures for names.
_TEMPLATES = ('a photo of the number: "{}".',)
# In the order of the package, which is by writer: nobody wrote for two splits but at their borders.
_SPLITS = {"train": slice(0, 1000), "val": slice(1000, 1297), "test": slice(1297, 1797)}


def open_digits(*, split: str) -> ClassificationSet:
    """Open the first 1,000 scans as `train`, the next 297 as `val`, or the last 500 as `test`.

    Raises:
        UsageError: There is no such split.
        UniclError: scikit-learn is not installed.
    """
    split = choose_split("digits", split, tuple(_SPLITS))
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UniclError("digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    pixels = np.round(digits.images[_SPLITS[split]] * (255 / 16)).astype(np.uint8)
    return ClassificationSet(
        name="digits",
        split=split,
        splits=tuple(_SPLITS),
        images=PixelArray(pixels, f"digits ({split})"),
        class_names=_NAMES,
        templates=_TEMPLATES,
        targets=digits.target[_SPLITS[split]].astype(np.int64),
        metric="top1",
    )
