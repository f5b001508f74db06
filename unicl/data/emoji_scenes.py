"""Composed scenes of emoji on varied backgrounds: what adapters are shown on without a download.

A scene is drawn from a generator; the same generator draws the same scene.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from unicl.data.composition import MAX_ROTATION, Stream, background
from unicl.data.twemoji import load_glyph, read_catalogue

EMOJI = (
    *("tiger", "penguin", "octopus", "butterfly", "lady beetle", "tropical fish", "flamingo"),
    *("watermelon", "banana", "strawberry", "grapes", "carrot", "broccoli", "hamburger", "pretzel"),
    *("soccer ball", "doughnut", "guitar", "violin", "game die", "balloon", "trophy"),
    *("rocket", "bus", "tractor", "bicycle", "sailboat", "helicopter", "anchor", "key", "hammer"),
    *("umbrella", "alarm clock", "sunflower", "cactus", "evergreen tree", "mushroom", "snowman"),
    *("crown", "gem stone"),
)
"""Their names, which the embedded corpus has, too."""

# The share of an object's box that those of others may cover: they touch, none hides another.
_MAX_SHARED = 0.2
_ATTEMPTS = 30


@dataclass(frozen=True)
class Scene:
    """An image and the objects in it, each drawn over those before it."""

    pixels: UInt8[np.ndarray, "height width 3"]
    names: tuple[str, ...]
    boxes: Float64[np.ndarray, "objects 4"]
    """x1, y1, x2, y2 in pixels."""


def make_generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return the generator of one scene; each purpose, as a part, has others."""
    return np.random.default_rng((seed, int.from_bytes(purpose.encode()), index))


def paint_emoji(
    rng: np.random.Generator, names: Iterable[str], *, side: int, sizes: tuple[int, int]
) -> Scene:
    """Paint an emoji for each name at a random place.

    Args:
        rng: Decides everything.
        names: Of `EMOJI`.
        side: Of the image, in pixels.
        sizes: Smallest and largest side of an emoji before it is turned a little.
    """
    names = tuple(str(name) for name in names)
    pictures: list[Image.Image] = []

    def draw_sizes() -> Float64[np.ndarray, "objects 2"]:
        pictures[:] = [turned(rng, name, sizes) for name in names]
        return np.array([picture.size for picture in pictures], dtype=np.float64)

    boxes = arrange(rng, side, draw_sizes).round()
    image = Image.fromarray(background(Stream(int(rng.integers(2**63))), side))
    for picture, (left, top, _, _) in zip(pictures, boxes, strict=True):
        image.paste(picture, (int(left), int(top)), picture)
    return Scene(np.asarray(image), names, boxes)


def turned(rng: np.random.Generator, name: str, sizes: tuple[int, int]) -> Image.Image:
    """Return an emoji at a random size, turned a little, cut to what is to be seen of it."""
    size = int(rng.integers(*sizes, endpoint=True))
    scaled = _glyphs()[name].resize((size, size), Image.Resampling.BICUBIC)
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    image = scaled.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return image.crop(image.getchannel("A").point(lambda alpha: alpha > 127 and 255).getbbox())


@cache
def _glyphs() -> dict[str, Image.Image]:
    emoji = {emoji.name: emoji for emoji in read_catalogue().emoji}
    return {name: load_glyph(emoji[name].glyph) for name in EMOJI}


def arrange(
    rng: np.random.Generator, side: int, draw_sizes: Callable[[], Float64[np.ndarray, "objects 2"]]
) -> Float64[np.ndarray, "objects 4"]:
    """Put boxes of random sizes (width, height) at random places; both are drawn until all fit."""
    while True:
        boxes = np.empty((0, 4))
        for size in draw_sizes():
            for _ in range(_ATTEMPTS):
                corner = rng.uniform(0, side - size)
                more = np.concatenate([boxes, [[*corner, *(corner + size)]]])
                if _shared(more).max() <= _MAX_SHARED:
                    boxes = more
                    break
            else:
                break
        else:
            return boxes


def _shared(boxes: Float64[np.ndarray, "objects 4"]) -> Float64[np.ndarray, " objects"]:
    """Return which share of each box others cover; what several cover counts several times."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    return common.sum(1) / common.diagonal() - 1


def encode(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Return the pixels as a PNG file."""
    buffer = BytesIO()
    # Noise does not get smaller by trying harder.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
