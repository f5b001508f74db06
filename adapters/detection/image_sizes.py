"""Sizes of images, for formats that give boxes in shares of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from PIL import Image

from unicl.data.augment import upright_size


def read_sizes(paths: Sequence[Path]) -> Int32[np.ndarray, "num_images 2"]:
    """Return height and width of images by their headers, upright; 0 for what is no image."""
    sizes = np.zeros((len(paths), 2), np.int32)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                sizes[row] = upright_size(image)[::-1]
        # Pillow raises whatever its parsers do; the loader will say what is wrong with the file.
        except Exception:
            continue
    return sizes
