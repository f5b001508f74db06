"""An image and its depth map as one encoded file, and decoded as four channels of bytes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from PIL import Image
from torch import Tensor

from unicl.data.augment import UndecodableImage, upright_size
from unicl.data.reader import ImageDecoder, Transform
from unicl.data.shards import SampleError

# Behind the depth map stand its length and this.
_MARK = b"\0rgb+d1\n"
_LENGTH = 8

# As Pillow opens a PNG of 16 bits.
_MODES = ("I;16", "I;16B", "I")


def join(image: bytes, depth: bytes) -> bytes:
    """Put the files of an image and of its depth map into one, which still shows as the image."""
    return b"".join((image, depth, len(depth).to_bytes(_LENGTH, "little"), _MARK))


def part(encoded: bytes) -> tuple[bytes, bytes]:
    """Return the files that `join` put together.

    Raises:
        SampleError: There is no depth map.
    """
    end = len(encoded) - _LENGTH - len(_MARK)
    if end < 0 or not encoded.endswith(_MARK):
        raise SampleError("no depth")
    start = end - int.from_bytes(encoded[end : end + _LENGTH], "little")
    if start < 0:
        raise SampleError("no depth")
    return encoded[:start], encoded[start:end]


@dataclass(frozen=True)
class RgbdDecoder:
    """Decodes images with depth: red, green, blue and disparity.

    The fourth channel is `255 * nearest / depth`, from 1 to 255; 0 is where nothing was measured.
    The inverse of depth is what Omnivore takes (Girdhar et al. 2022); the sensors' noise is about
    the same everywhere in it, and far away and unknown are neighbours. A depth map of fewer pixels
    than its image is enlarged.

    Args:
        transform: Cuts out, resizes and mirrors; by the size of an image and a seed alone, so that
            image and depth map are treated alike. It changes no colours.
        max_pixels: Larger images are skipped, judged by their headers.
        unit: Metres that a step of the depth map stands for: 1/1000 in NYUv2 and ScanNet, 1/5000 in
            TUM RGB-D, 1/8000 in SUN RGB-D.
        nearest: Depth in metres of byte 255; what is nearer has it, too.
        depthless: Take an image without a depth map as one of whose depth nothing is known.
    """

    transform: Transform
    max_pixels: int
    unit: float = 0.001
    nearest: float = 0.5
    depthless: bool = False

    def __call__(self, encoded: bytes, seed: int) -> UInt8[Tensor, "4 height width"]:
        """Decode what `join` made.

        Raises:
            SampleError: One of the two files is missing or cannot be decoded, or they do not fit.
        """
        if self.depthless and not encoded.endswith(_MARK):
            rgb = ImageDecoder(self.transform, self.max_pixels)(encoded, seed)
            return torch.cat([rgb, torch.zeros_like(rgb[:1])])
        image, depth = part(encoded)
        size = (0, 0)

        def see_image(opened: Image.Image, seed: int) -> Tensor:
            nonlocal size
            size = upright_size(opened)
            return self.transform(opened, seed)

        def see_depth(opened: Image.Image, seed: int) -> Tensor:
            return self._disparity(_at_size(opened, size), seed)

        rgb = ImageDecoder(see_image, self.max_pixels)(image, seed)
        try:
            disparity = ImageDecoder(see_depth, self.max_pixels)(depth, seed)
        except SampleError as error:
            raise SampleError(error.reason.replace("image", "depth")) from error
        return torch.cat([rgb, disparity])

    def empty(self) -> UInt8[Tensor, "0 4 height width"]:
        """Return no images, of the shape that images have."""
        rgb = ImageDecoder(self.transform, self.max_pixels).empty()
        return rgb.new_empty(0, 4, *rgb.shape[2:])

    def _disparity(
        self, depth: UInt16[np.ndarray, "height width"], seed: int
    ) -> UInt8[Tensor, "1 new_height new_width"]:
        """Treat a depth map as the image was; what is unknown has no part in any mean."""
        values = self._bytes[depth]
        known = self.transform(Image.fromarray(np.where(values > 0, np.uint8(255), 0)), seed)[:1]
        means = self.transform(Image.fromarray(values), seed)[:1] / known.clamp(min=1) * 255
        return torch.where(known < 128, 0, means.round().clamp(1, 255)).to(torch.uint8)

    @cached_property
    def _bytes(self) -> UInt8[np.ndarray, " 65536"]:
        """Disparity by the value of a depth map."""
        with np.errstate(divide="ignore"):
            disparity = 255 * self.nearest / (self.unit * np.arange(65536))
        disparity = disparity.round().clip(1, 255).astype(np.uint8)
        disparity[0] = 0
        return disparity


def _at_size(image: Image.Image, size: tuple[int, int]) -> UInt16[np.ndarray, "height width"]:
    """Decode a depth map to the size of its image, of which it has the shape.

    Raises:
        SampleError: It has another shape, or fewer bits than depth needs.
        UndecodableImage: Pillow cannot decode it.
    """
    if image.mode not in _MODES:
        raise SampleError("depth is not of 16 bits")
    # Rounded to a whole pixel, a side of the smaller one may be half a pixel off.
    if abs(image.width * size[1] - image.height * size[0]) > max(size):
        raise SampleError("depth of another shape")
    try:
        image.load()
        if image.size != size:
            image = image.resize(size, Image.Resampling.NEAREST)
        values = np.asarray(image)
        return values if values.dtype == np.uint16 else values.clip(0, 65535).astype(np.uint16)
    except MemoryError:
        raise
    except Exception as error:  # Only Pillow runs here, and bad files make it raise all sorts.
        raise UndecodableImage(str(error)) from error
