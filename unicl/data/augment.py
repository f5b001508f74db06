"""From a PIL image to a square uint8 tensor: random crops as in UniCL's lineage, or a centre crop.

Randomness comes from one integer per sample. Cutting out and resizing are one Pillow call, and a
JPEG much larger than its target is decoded at a half, a quarter or an eighth of its size.
"""

import math
from functools import cache
from io import BytesIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unicl.data.order import mix

_ORIENTATION = 0x0112
_ATTEMPTS = 10
_LINEAGE_CROP = 224 / 256

# What the web holds. Pillow reads more, some of it (EPS) by running other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")

Box = tuple[float, float, float, float]


class UndecodableImage(ValueError):
    """The file's header promised an image that its body does not give."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image, reading its header only.

    Raises:
        UndecodableImage: It is no image, or larger than Pillow's limit allows.
    """
    try:
        return Image.open(BytesIO(data), formats=_formats())
    except Exception as error:  # As in `_decode`.
        raise UndecodableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Say in our own words what Pillow says of memory addresses and attacks."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known type"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return "it has more pixels than an image should"
    return str(error) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


class TrainTransform:
    """Random resized crop, bicubic, optionally mirrored; a pure function of (image, seed).

    Args:
        size: Side of the result, in pixels.
        scale: Range of the crop's area, as a share of the image.
        ratio: Range of the crop's width over its height.
        flip: Mirror half of the images.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
    ) -> None:
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    def __call__(self, image: Image.Image, seed: int) -> UInt8[Tensor, "3 {self.size} {self.size}"]:
        """Crop, resize and perhaps mirror an image; the seed decides how.

        Raises:
            UndecodableImage: Pillow cannot decode the image.
        """
        orientation = _orientation(image)
        box = self.draw_crop(*_upright_size(image, orientation), seed)
        # At least as many pixels as the target has: reading fewer would blur.
        share = self.size / min(box[2] - box[0], box[3] - box[1])
        image, share = _decode(image, share, orientation)
        image = _resize(image, share, box, self.size)
        if self.flip and mix(seed, -1) % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _pixels(image)

    def draw_crop(self, width: int, height: int, seed: int) -> Box:
        """Draw a crop as torchvision's RandomResizedCrop does: area uniform, ratio log-uniform."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_ATTEMPTS):
            bits = mix(seed, attempt)
            area = width * height * _between(*self.scale, bits & 0xFFFFFFFF)
            ratio = math.exp(_between(low, high, bits >> 32))
            crop_width = max(1, round(math.sqrt(area * ratio)))
            crop_height = max(1, round(math.sqrt(area / ratio)))
            if crop_width <= width and crop_height <= height:
                place = mix(seed, _ATTEMPTS + attempt)
                left = float((place & 0xFFFFFFFF) % (width - crop_width + 1))
                top = float((place >> 32) % (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        # A very long or tall image: the largest crop from its middle that the ratios allow.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        widest = min(float(width), height * ratio)
        # Rounding may leave the quotient a hair above the height.
        return _centre(width, height, widest, min(float(height), widest / ratio))


class EvalTransform:
    """The square in the middle, resized bicubically.

    Args:
        size: Side of the result, in pixels.
        crop: Side of the square, as a share of the image's shorter side. Unset means the lineage's
            224/256 from 128 pixels up, and all of it below: thumbnails have no edge to spare.
    """

    def __init__(self, size: int, *, crop: float | None = None) -> None:
        self.size = size
        self.crop = crop if crop is not None else _LINEAGE_CROP if size >= 128 else 1.0

    def __call__(
        self, image: Image.Image, seed: int = 0
    ) -> UInt8[Tensor, "3 {self.size} {self.size}"]:
        """Resize the middle of an image; the seed has no effect.

        Raises:
            UndecodableImage: Pillow cannot decode the image.
        """
        orientation = _orientation(image)
        width, height = _upright_size(image, orientation)
        side = self.crop * min(width, height)
        # Twice the pixels needed, so that figures do not depend on the JPEG decoder's reduction.
        image, share = _decode(image, 2 * self.size / side, orientation)
        box = _centre(width, height, side, side)
        return _pixels(_resize(image, share, box, self.size))


class WholeTransform:
    """The whole image, squeezed bicubically into a square: for what may be asked of any corner.

    Args:
        size: Side of the result, in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self, image: Image.Image, seed: int = 0
    ) -> UInt8[Tensor, "3 {self.size} {self.size}"]:
        """Resize an image; the seed has no effect.

        Raises:
            UndecodableImage: Pillow cannot decode the image.
        """
        orientation = _orientation(image)
        width, height = _upright_size(image, orientation)
        # As in `EvalTransform`.
        image, share = _decode(image, 2 * self.size / min(width, height), orientation)
        return _pixels(_resize(image, share, (0.0, 0.0, float(width), float(height)), self.size))


def upright(
    image: Image.Image, *, longer_side: int | None = None, as_stored: bool = False
) -> Image.Image:
    """Decode a whole image as the transforms see it: upright, in 8 bits, in RGB, on white.

    Args:
        image: An image that is opened, not yet decoded.
        longer_side: Pixels that suffice; a JPEG is decoded to no fewer, if it has as many. Unset
            decodes all.
        as_stored: Take the pixels as upright as they lie in the file, whatever EXIF says.

    Raises:
        UndecodableImage: Pillow cannot decode the image.
    """
    share = 1.0 if longer_side is None else longer_side / max(image.size)
    orientation = 1 if as_stored else _orientation(image)
    decoded = _on_white(_decode(image, share, orientation)[0])
    decoded.info = {}  # what is upright now must not be turned once more
    return decoded


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image as they are once it is upright."""
    return _upright_size(image, _orientation(image))


def _between(low: float, high: float, bits: int) -> float:
    return low + (high - low) * (bits / 2**32)


def _centre(width: int, height: int, crop_width: float, crop_height: float) -> Box:
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Return width and height as they will be once the orientation is applied."""
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright."""
    # Pillow reads a PNG to its end in search of EXIF data; most files have none, so ask first.
    if not {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's EXIF parser fails in many ways; a broken tag spoils no image.
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _decode(image: Image.Image, share: float, orientation: int) -> tuple[Image.Image, float]:
    """Decode to an upright image in a mode that resizes well.

    Args:
        image: An image that is opened, not yet decoded.
        share: The smallest share of its width and height that suffices; JPEGs can be decoded to
            less than their full size at a fraction of the time.
        orientation: From EXIF, 1 to 8.

    Returns:
        The image, and which share of its full width and height it has.
    """
    try:
        size, reduced = image.size, None
        if share <= 0.5:
            needed = math.ceil(image.width * share), math.ceil(image.height * share)
            reduced = image.draft(None, needed)
        image.load()
        if reduced is None and image.size != size:
            raise UndecodableImage(f"{image.size} pixels where the header says {size}")
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return _resizable(image), 1.0 if reduced is None else reduced[1][2] / size[0]
    except MemoryError:
        raise
    except Exception as error:  # Only Pillow runs here, and bad files make it raise all sorts.
        raise UndecodableImage(_reason(error)) from error


def _resizable(image: Image.Image) -> Image.Image:
    """Convert to RGB, RGBA or L, the modes that Pillow filters."""
    if image.mode == "RGBA" or (image.mode in ("RGB", "L") and "transparency" not in image.info):
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Bring 16-bit grey to 8 bits; stretch floats, which have no known white, to their range."""
    values = np.asarray(image, dtype=np.float32)
    if image.mode.startswith("F"):
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        values = (values - values.min()) * (65535.0 / max(float(np.ptp(values)), 1e-20))
    return Image.fromarray((values / 257.0).round().clip(0, 255).astype(np.uint8))


def _resize(image: Image.Image, share: float, box: Box, size: int) -> Image.Image:
    """Resize a box to a square RGB image; the box is in pixels of the full size."""
    # Neither rounding nor the last, partial pixel of a reduced image may carry the box over the
    # edge, which Pillow refuses.
    scaled = (
        box[0] * share, box[1] * share,
        min(box[2] * share, image.width), min(box[3] * share, image.height),
    )  # fmt: skip
    return _on_white(image.resize((size, size), Image.Resampling.BICUBIC, box=scaled))


def _on_white(image: Image.Image) -> Image.Image:
    """Convert RGBA, RGB or L to RGB; what is transparent becomes white."""
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
