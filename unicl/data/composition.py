"""Pictures for the embedded corpus: a glyph somewhere on a background, all from one integer.

Random numbers come from splitmix64 (Steele, Lea and Flood, 2014), written out here: NumPy's
generators may change between versions, and a corpus must not.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
SIZES = (0.7, 1.0)
MAX_ROTATION = 15.0


class Stream:
    """Random numbers from an integer seed, the same on every machine."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def bits(self) -> int:
        """Return 64 random bits."""
        self._state = (self._state + _STEP) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number from [low, high)."""
        return low + (high - low) * (self.bits() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Return an integer from 0 to count - 1."""
        return self.bits() % count

    def bytes(self, count: int) -> UInt8[np.ndarray, " count"]:
        """Return many random bytes at once."""
        words = np.arange(1, -(-count // 8) + 1, dtype=np.uint64) * np.uint64(_STEP)
        words += np.uint64(self.bits())
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        # Little-endian on every machine.
        return words.astype("<u8", copy=False).view(np.uint8)[:count]


def compose(glyph: Image.Image, seed: int, *, size: int) -> Image.Image:
    """Return an RGB image of a glyph on a background; the seed decides all about it."""
    stream = Stream(seed)
    image = Image.fromarray(background(stream, size))
    side = round(size * stream.uniform(*SIZES))
    scaled = glyph.resize((side, side), Image.Resampling.BICUBIC)
    # Bilinear halves the time of the turn, the slowest step, and looks the same at its final size.
    angle = stream.uniform(-MAX_ROTATION, MAX_ROTATION)
    turned = scaled.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    # The corners of a turned glyph are mostly empty, so they may leave the picture.
    left, top = (round(stream.uniform(0.0, float(size - side))) for _ in range(2))
    shift = (turned.width - side) // 2
    image.paste(turned, (left - shift, top - shift), turned)
    return image


def encode(image: Image.Image) -> bytes:
    """Encode an image as JPEG, which is smaller than PNG here and five times as fast to write."""
    file = BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def background(stream: Stream, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Return one of several kinds of background in random colours."""
    first, second = (stream.bytes(3).astype(np.float32) for _ in range(2))
    kind = _KINDS[stream.below(len(_KINDS))]
    # How much of the second colour each pixel has, from 0 to 1.
    mix = kind(stream, size)[..., None]
    return np.clip(first + (second - first) * mix, 0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Float32[np.ndarray, "1 size"], Float32[np.ndarray, "size 1"]]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return line[None, :], line[:, None]


def _along(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    # Position along a random direction, from about -0.7 to 0.7.
    x, y = _grid(size)
    angle = stream.uniform(0.0, 2 * math.pi)
    return x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))


def _distance(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    # Squared distance from a random point.
    x, y = _grid(size)
    centre_x, centre_y = (np.float32(stream.uniform(-0.5, 0.5)) for _ in range(2))
    return (x - centre_x) ** 2 + (y - centre_y) ** 2


def _solid(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    return np.zeros((size, size), np.float32)


def _gradient(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    return _along(stream, size) + np.float32(0.5)


def _glow(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    return np.minimum(_distance(stream, size) * np.float32(stream.uniform(1.0, 4.0)), np.float32(1))


def _stripes(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    lines = _along(stream, size) * np.float32(stream.uniform(4.0, 16.0))
    return np.floor(lines) % np.float32(2)


def _checks(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    x, y = _grid(size)
    fields = np.float32(stream.uniform(4.0, 14.0))
    return (np.floor(x * fields) + np.floor(y * fields)) % np.float32(2)


def _blobs(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    inside = np.zeros((size, size), np.float32)
    for _ in range(2 + stream.below(4)):
        inside[_distance(stream, size) < stream.uniform(0.01, 0.06)] = 1
    return inside


def _clouds(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    cells = 3 + stream.below(8)
    coarse = Image.fromarray(stream.bytes(cells * cells).reshape(cells, cells))
    fine = coarse.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(fine, np.float32) / np.float32(255)


def _grain(stream: Stream, size: int) -> Float32[np.ndarray, "size size"]:
    return stream.bytes(size * size).reshape(size, size).astype(np.float32) / np.float32(255)


_KINDS: tuple[Callable[[Stream, int], Float32[np.ndarray, "size size"]], ...] = (
    _solid,
    _gradient,
    _glow,
    _stripes,
    _checks,
    _blobs,
    _clouds,
    _grain,
)
