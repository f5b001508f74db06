"""What an image and its boxes go through, together: crop, mirror, resize, and pad to a batch.

Randomness comes from one integer per image. torchvision's own random transforms draw from the
process's generator, which threads share; so the draws are made here, and its kernels do the work.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from unicl.data.augment import upright
from unicl.data.order import mix
from unicl.errors import UsageError

_ATTEMPTS = 10
_MEAN_COLOUR = torch.tensor([round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN])

Sample = tuple[
    UInt8[Tensor, "3 new_height new_width"], Float32[Tensor, "kept 4"], Int64[Tensor, " kept"]
]
"""An image, its boxes (xyxy, in its pixels) and their labels."""


class TrainTransform:
    """Perhaps a crop, perhaps mirrored, resized to one of several sizes; the seed decides.

    Args:
        min_sizes: What the shorter side may become, in pixels, all equally likely.
        max_size: What the longer side may be at most; the shorter one gives way.
        flip: Mirror half of the images.
        crop_scale: Range of the crop's width and of its height, drawn apart, as shares of the
            image's. A box stays if its centre does, cut at the border; a crop that would lose
            every box is drawn again, as in torchvision's RandomIoUCrop. (1, 1) does not crop.

    Raises:
        UsageError: There is no size, or one is not positive, or a scale is not in (0, 1].
    """

    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        *,
        flip: bool,
        crop_scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        if not min_sizes or min(*min_sizes, max_size) < 1:
            raise UsageError(
                f"min_sizes and max_size must be positive, got {tuple(min_sizes)} and {max_size}"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UsageError(f"crop_scale must rise within (0, 1], got {crop_scale}")
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip
        self.crop_scale = crop_scale

    def __call__(
        self,
        image: Image.Image | UInt8[Tensor, "3 height width"],
        boxes: Float32[Tensor, "boxes 4"],
        labels: Int64[Tensor, " boxes"],
        seed: int,
    ) -> Sample:
        """Transform an image with its boxes; both are of the image as it is upright.

        Raises:
            UndecodableImage: Pillow cannot decode the image.
        """
        pixels, boxes = _start(image, boxes)
        if self.crop_scale != (1.0, 1.0):
            pixels, boxes, labels = self._crop(pixels, boxes, labels, seed)
        if self.flip and mix(seed, -1) % 2:
            pixels, boxes = F.horizontal_flip(pixels), F.horizontal_flip(boxes)
        side = self.min_sizes[mix(seed, -2) % len(self.min_sizes)]
        return _finish(pixels, boxes, labels, side, self.max_size)

    def _crop(
        self, pixels: Tensor, boxes: tv_tensors.BoundingBoxes, labels: Tensor, seed: int
    ) -> tuple[Tensor, tv_tensors.BoundingBoxes, Tensor]:
        height, width = pixels.shape[-2:]
        for attempt in range(_ATTEMPTS):
            shares, places = mix(seed, attempt, 0), mix(seed, attempt, 1)
            new_height = _share(height, self.crop_scale, shares >> 32)
            new_width = _share(width, self.crop_scale, shares & 0xFFFFFFFF)
            top = (places >> 32) % (height - new_height + 1)
            left = (places & 0xFFFFFFFF) % (width - new_width + 1)
            inside = _centres_inside(boxes, left, top, left + new_width, top + new_height)
            if inside.any() or len(boxes) == 0:
                window = (top, left, new_height, new_width)
                kept = tv_tensors.wrap(boxes[inside], like=boxes)
                return F.crop(pixels, *window), F.crop(kept, *window), labels[inside]
        return pixels, boxes, labels


class EvalTransform:
    """The whole image, its shorter side resized to `size`, the longer one at most `max_size`.

    Raises:
        UsageError: A size is not positive.
    """

    def __init__(self, size: int, max_size: int) -> None:
        if min(size, max_size) < 1:
            raise UsageError(f"size and max_size must be positive, got {size} and {max_size}")
        self.size = size
        self.max_size = max_size

    def __call__(
        self,
        image: Image.Image | UInt8[Tensor, "3 height width"],
        boxes: Float32[Tensor, "boxes 4"],
        labels: Int64[Tensor, " boxes"],
        seed: int = 0,
    ) -> Sample:
        """Resize an image with its boxes; the seed has no effect.

        Raises:
            UndecodableImage: Pillow cannot decode the image.
        """
        return _finish(*_start(image, boxes), labels, self.size, self.max_size)


def resized(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """Return height and width with the shorter one `size`, unless the other is over `max_size`."""
    share = min(size / min(height, width), max_size / max(height, width))
    return max(1, round(height * share)), max(1, round(width * share))


def pad(
    images: Sequence[UInt8[Tensor, "3 _ _"]], *, multiple: int = 32
) -> UInt8[Tensor, "batch 3 padded_height padded_width"]:
    """Bring images to one size, a multiple of `multiple`, by the mean colour at right and bottom.

    The colour is ImageNet's mean, which normalisation takes to about zero.

    Raises:
        UsageError: There is no image.
    """
    if not images:
        raise UsageError("a batch needs at least one image")
    height, width = (
        -(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2)
    )
    colour = _MEAN_COLOUR.to(images[0])[None, :, None, None]
    batch = colour.repeat(len(images), 1, height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def _start(
    image: Image.Image | Tensor, boxes: Tensor
) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
    if isinstance(image, Image.Image):
        pixels = F.pil_to_tensor(upright(image, longer_side=max(image.size)))
    else:
        pixels = image
    height, width = pixels.shape[-2:]
    together = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(pixels), F.clamp_bounding_boxes(together)


def _finish(
    pixels: Tensor, boxes: tv_tensors.BoundingBoxes, labels: Tensor, size: int, max_size: int
) -> Sample:
    """Resize, and leave out boxes that are under a pixel wide or high."""
    height, width = pixels.shape[-2:]
    new = list(resized(height, width, size, max_size))
    # Bicubic as the towers were pretrained; it costs no more than bilinear here.
    image = F.resize(pixels, new, InterpolationMode.BICUBIC, antialias=True).as_subclass(Tensor)
    clamped = F.clamp_bounding_boxes(F.resize(boxes, new)).as_subclass(Tensor)
    kept = ((clamped[:, 2:] - clamped[:, :2]) >= 1).all(1)
    return image, clamped[kept], labels[kept]


def _share(side: int, scale: tuple[float, float], bits: int) -> int:
    return max(1, round(side * (scale[0] + (scale[1] - scale[0]) * bits / 2**32)))


def _centres_inside(
    boxes: Float32[Tensor, "boxes 4"], left: int, top: int, right: int, bottom: int
) -> Bool[Tensor, " boxes"]:
    x, y = (boxes[:, :2] + boxes[:, 2:]).as_subclass(Tensor).T / 2
    return (left < x) & (x < right) & (top < y) & (y < bottom)
