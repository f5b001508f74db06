"""Images with depth maps, made for tests."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """Encode RGB or grey of 8 bits, or a depth map of 16 bits."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, encoded: bytes) -> None:
    """Write a file, its folders with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)
