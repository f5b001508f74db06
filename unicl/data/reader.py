"""From stream positions to decoded, augmented, tokenized samples: what a worker process does.

A piece of a batch is a pure function of its positions. What cannot be used is named and left out.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unicl.data.augment import UndecodableImage, open_image
from unicl.data.order import SampleOrder, mix
from unicl.data.prompts import PromptSampler
from unicl.data.shards import RawSample, SampleError

_AUGMENTATION = int.from_bytes(b"augment")
_CACHED_TEXTS = 32_768

Transform = Callable[[Image.Image, int], Tensor]
Tokenize = Callable[[Sequence[str]], Tensor]


@runtime_checkable
class SampleSet(Protocol):
    """Samples that can be read in any order; `unicl.data.shards.ShardSet` is one."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> RawSample:
        """Return a sample; raises `SampleError` where it cannot be used."""

    def label(self, index: int, text: str, key: str) -> int:
        """Return the label of a sample."""

    def locate(self, index: int) -> tuple[str, int]:
        """Return the name of what holds a sample, and its place in it."""


@runtime_checkable
class Decode(Protocol):
    """From the encoded file of a sample to what a tower takes, and a seed decides how."""

    def __call__(self, encoded: bytes, seed: int) -> Tensor:
        """Return a uint8 tensor; raises `SampleError` for what cannot be used."""

    def empty(self) -> Tensor:
        """Return a uint8 tensor [0, *shape of a decoded sample]."""


def samples_at_once(decode: Decode, num_images: int) -> int:
    """Return how many samples hold about so many images: as many of images, fewer of clips."""
    *frames, _, _ = decode.empty().shape[1:]
    return max(1, num_images // max(1, math.prod(frames) // 3))


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes images.

    Args:
        transform: Makes a uint8 tensor of an opened image, given an integer seed.
        max_pixels: Larger images are skipped, judged by their headers.
    """

    transform: Transform
    max_pixels: int

    def __call__(self, encoded: bytes, seed: int) -> Tensor:
        """Decode one image.

        Raises:
            SampleError: It cannot be decoded, or is too large.
        """
        with _pillow_limits(self.max_pixels):
            try:
                return self.transform(open_image(encoded), seed)
            except (UndecodableImage, OSError, SyntaxError) as error:
                bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
                bomb = isinstance(error.__cause__, bombs)
                raise SampleError("image too large" if bomb else "undecodable image") from error

    def empty(self) -> Tensor:
        """Return no images, of the shape that images have."""
        return self.transform(Image.new("RGB", (8, 8)), 0)[None][:0]


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used."""

    reason: str
    index: int
    """Its place in the data set."""
    key: str
    """Empty when even the key is out of reach."""


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of a batch without the bad ones; with no good ones, tensors are empty."""

    images: Tensor
    # Small arrays travel to the trainer inside the message, not in shared memory of their own.
    tokens: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Batch:
    """Samples that are trained on together; bad ones are left out: it may be short, or empty."""

    images: UInt8[Tensor, "batch *shape"]
    """Images [batch, 3, height, width], or clips."""
    tokens: Int64[Tensor, "batch context"]
    labels: Int64[Tensor, " batch"]
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    """The descriptions, before any template."""
    consumed: int
    """Stream position after this batch, where the next one starts on all ranks."""
    skipped: dict[str, int]
    """Number of samples left out, by reason."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on another device."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.keys,
            self.texts,
            self.consumed,
            self.skipped,
        )


@dataclass(frozen=True)
class Reader(Dataset):
    """Maps (first position, count) to a piece; holds nothing that changes its result.

    Args:
        decode: Makes a uint8 tensor of an encoded image or clip, given an integer seed.
        tokenize: Makes token ids of texts; must depend on nothing but the texts.
    """

    samples: SampleSet
    order: SampleOrder
    decode: Decode
    tokenize: Tokenize
    prompts: PromptSampler
    seed: int
    token_cache: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, positions: tuple[int, int]) -> Piece:
        """Read the samples at `count` stream positions from the first one on."""
        first, count = positions
        images, prompted, labels, keys, texts, skipped = [], [], [], [], [], []
        for position, index in enumerate(self.order.indices(first, count).tolist(), first):
            key = ""
            try:
                sample = self.samples.read(index)
                key = sample.key
                text = _text(sample)
                images.append(self._image(sample, position))
            except SampleError as error:
                skipped.append(Skipped(error.reason, index, key))
                continue
            labels.append(self.samples.label(index, text, key))
            keys.append(key)
            texts.append(text)
            prompted.append(self.prompts(text, position))
        return Piece(
            torch.stack(images) if images else torch.empty(0, dtype=torch.uint8),
            self._tokens(prompted),
            np.array(labels, dtype=np.int64),
            tuple(keys),
            tuple(texts),
            tuple(skipped),
        )

    @functools.cached_property
    def empty_piece(self) -> Piece:
        """No samples, in tensors of the shapes that samples have."""
        tokens = self.tokenize([""]).numpy()
        return Piece(self.decode.empty(), tokens[:0], np.empty(0, np.int64), (), (), ())

    def sample_bytes(self) -> int:
        """Bytes of a decoded image or clip."""
        return math.prod(self.empty_piece.images.shape[1:])

    def prepare(self) -> None:
        """Let Pillow find its formats, and the tokenizer its vocabulary."""
        Image.init()
        self.tokenize([""])

    def join(self, parts: Sequence[Piece], *, consumed: int, skipped: dict[str, int]) -> Batch:
        """Make a batch of its pieces."""
        good = [part for part in parts if part.keys] or [self.empty_piece]
        return Batch(
            torch.cat([part.images for part in good]),
            torch.from_numpy(np.concatenate([part.tokens for part in good])),
            torch.from_numpy(np.concatenate([part.labels for part in good])),
            tuple(key for part in good for key in part.keys),
            tuple(text for part in good for text in part.texts),
            consumed,
            skipped,
        )

    def _image(self, sample: RawSample, position: int) -> Tensor:
        if not sample.image:
            raise SampleError("no image")
        return self.decode(sample.image, mix(self.seed, _AUGMENTATION, position))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """Tokenize texts; most names and captions come again, so rows are kept for a while."""
        if not texts:
            return np.empty((0, 0), np.int64)
        if len(self.token_cache) > _CACHED_TEXTS:
            self.token_cache.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self.token_cache]
        if new:
            self.token_cache.update(zip(new, self.tokenize(new).numpy(), strict=True))
        return np.stack([self.token_cache[text] for text in texts])


def _text(sample: RawSample) -> str:
    if sample.text is None:
        raise SampleError("no text")
    try:
        return sample.text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError("text is not UTF-8") from error


@contextmanager
def _pillow_limits(max_image_pixels: int) -> Iterator[None]:
    """Make Pillow refuse larger images by their headers, and keep its warnings to itself."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
