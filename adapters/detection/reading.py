"""From images with boxes to batches: what a loader's worker reads, and how images are padded."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from adapters.detection.sets import DetectionSet
from adapters.detection.transforms import Sample, pad
from adapters.detection.vocabulary import Vocabulary
from unicl.data.augment import upright, upright_size
from unicl.data.order import SampleOrder, mix
from unicl.data.reader import ImageDecoder, Skipped
from unicl.data.shards import RawSample, SampleError

_AUGMENTATION = int.from_bytes(b"augment")


@runtime_checkable
class DetectionTransform(Protocol):
    """What an image goes through with its boxes; `unicl.data.order.mix` makes the seed."""

    def __call__(self, image: Image.Image, boxes: Tensor, labels: Tensor, seed: int) -> Sample:
        """Return image, boxes and labels."""


class JoinedSets:
    """The images of several sets, one set after the other, with one vocabulary for all.

    Args:
        sets: What is joined.
        vocabulary: Made of these sets; unset joins theirs.
    """

    def __init__(self, sets: Sequence[DetectionSet], vocabulary: Vocabulary | None = None) -> None:
        self.sets = tuple(sets)
        self.vocabulary = Vocabulary.join(sets) if vocabulary is None else vocabulary
        self._starts = [0, *accumulate(each.num_images for each in sets)]

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self._starts[-1]

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " 1"]:
        """Number of images, as of a single shard: files need no order of reading."""
        return np.array([self.num_samples], np.int64)

    def digest(self) -> str:
        """Return a digest of all images and boxes, in order."""
        digest = blake2b(digest_size=16)
        for each in self.sets:
            digest.update(each.digest().encode())
        return digest.hexdigest()

    def read(self, index: int) -> RawSample:
        """Return an encoded image.

        Raises:
            SampleError: It is out of reach.
        """
        number, row = self.place(index)
        return self.sets[number].files.read(row)

    def label(self, index: int, text: str, key: str) -> int:
        """Return nothing of use: an image has as many labels as objects."""
        return 0

    def locate(self, index: int) -> tuple[str, int]:
        """Return the file of an image, and its place there."""
        number, row = self.place(index)
        return self.sets[number].files.locate(row)

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of an image's set, and its row there."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


@dataclass(frozen=True)
class DetectionPiece:
    """Consecutive images of a batch, without the bad ones."""

    # One tensor: each is an open file while it travels in shared memory. The small arrays travel
    # inside the message.
    pixels: UInt8[Tensor, " bytes"]
    """Of images [3, height, width], one after the other."""
    sizes: Int64[np.ndarray, "images 2"]
    originals: Int64[np.ndarray, "images 2"]
    boxes: Float32[np.ndarray, "objects 4"]
    labels: Int64[np.ndarray, " objects"]
    counts: Int64[np.ndarray, " images"]
    """Number of each image's objects."""
    judged: Bool[np.ndarray, "images classes"]
    rows: Int64[np.ndarray, " images"]
    keys: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class DetectionBatch:
    """Images with their objects; bad ones are left out: it may be short, or empty."""

    images: UInt8[Tensor, "batch 3 height width"]
    """Padded at right and bottom to sides that are multiples of 32."""
    sizes: Int64[Tensor, "batch 2"]
    """Height and width without the padding."""
    originals: Int64[Tensor, "batch 2"]
    """Height and width before they were resized."""
    boxes: Float32[Tensor, "objects 4"]
    """Of all images, one after the other: x1, y1, x2, y2 in their pixels."""
    labels: Int64[Tensor, " objects"]
    """Numbers of classes in the joined vocabulary."""
    owners: Int64[Tensor, " objects"]
    """Number of each object's image in the batch."""
    judged: Bool[Tensor, "batch classes"]
    """Which classes were looked for in an image."""
    rows: Int64[Tensor, " batch"]
    """Numbers of the images in the set."""
    keys: tuple[str, ...]
    consumed: int
    """Stream position after this batch."""
    skipped: dict[str, int]
    """Number of images left out, by reason."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class DetectionReader:
    """Maps (first position, count) to a piece: a pure function of the positions.

    Args:
        samples: Images with boxes.
        order: Which image comes at which position.
        transform: Resizes, crops, mirrors an image with its boxes.
        seed: Of augmentation.
        max_pixels: Larger images are skipped, judged by their headers.
        pixels: About how many an image has when it is resized.
    """

    samples: JoinedSets
    order: SampleOrder
    transform: DetectionTransform
    seed: int
    max_pixels: int
    pixels: int

    def sample_bytes(self) -> int:
        """About the bytes of a resized image."""
        return 3 * self.pixels

    def prepare(self) -> None:
        """Let Pillow find its formats."""
        Image.init()

    def __getitem__(self, positions: tuple[int, int]) -> DetectionPiece:
        """Read the images at `count` stream positions from the first one on."""
        first, count = positions
        images: list[Tensor] = []
        boxes: list[Tensor] = []
        labels: list[Tensor] = []
        judged, originals, rows, keys, skipped = [], [], [], [], []
        for position, index in enumerate(self.order.indices(first, count).tolist(), first):
            key = ""
            try:
                sample = self.samples.read(index)
                key = sample.key
                placed, original = self._transformed(sample, index, position)
            except SampleError as error:
                skipped.append(Skipped(error.reason, index, key))
                continue
            for parts, part in zip((images, boxes, labels), placed, strict=True):
                parts.append(part)
            originals.append(original)
            judged.append(self._judged(index))
            rows.append(index)
            keys.append(key)
        num_classes = len(self.samples.vocabulary.names)
        return DetectionPiece(
            torch.cat([torch.empty(0, dtype=torch.uint8), *(each.flatten() for each in images)]),
            _pairs([each.shape[1:] for each in images]),
            _pairs(originals),
            torch.cat([torch.empty(0, 4), *boxes]).numpy(),
            torch.cat([torch.empty(0, dtype=torch.int64), *labels]).numpy(),
            np.array([len(each) for each in labels], np.int64),
            np.array(judged, bool).reshape(-1, num_classes),
            np.array(rows, np.int64),
            tuple(keys),
            tuple(skipped),
        )

    def join(
        self, parts: Sequence[DetectionPiece], *, consumed: int, skipped: dict[str, int]
    ) -> DetectionBatch:
        """Make a batch of its pieces; its images are padded to the largest."""
        parts = parts or [self[0, 0]]  # of nothing: arrays of the right shapes
        images = [image for part in parts for image in _images(part)]

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))

        return DetectionBatch(
            # Of none, the towers see one all the same: large enough for batch norms to train.
            pad(images) if images else torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
            joined("sizes"),
            joined("originals"),
            joined("boxes"),
            joined("labels"),
            torch.arange(len(images)).repeat_interleave(joined("counts")),
            joined("judged"),
            joined("rows"),
            tuple(key for part in parts for key in part.keys),
            consumed,
            skipped,
        )

    def _transformed(
        self, sample: RawSample, index: int, position: int
    ) -> tuple[Sample, tuple[int, int]]:
        number, row = self.samples.place(index)
        images = self.samples.sets[number]
        annotations = images.of(row)
        one_by_one = ~annotations.crowd
        boxes = torch.from_numpy(annotations.boxes[one_by_one])
        numbers = self.samples.vocabulary.numbers[number][annotations.labels[one_by_one]]
        labels = torch.from_numpy(numbers).long()
        seed = mix(self.seed, _AUGMENTATION, position)
        found: list[tuple[Sample, tuple[int, int]]] = []

        def see(opened: Image.Image, seed: int) -> Tensor:
            image = open_annotated(opened, tuple(images.sizes[row].tolist()))
            placed = self.transform(image, boxes, labels, seed)
            found.append((placed, (image.height, image.width)))
            return placed[0]

        ImageDecoder(see, self.max_pixels)(sample.image, seed)
        return found[0]

    def _judged(self, index: int) -> Bool[np.ndarray, " classes"]:
        number, row = self.samples.place(index)
        return self.samples.vocabulary.judged(number, self.samples.sets[number].of(row))


def _pairs(sizes: Sequence[Sequence[int]]) -> Int64[np.ndarray, "images 2"]:
    return np.array(sizes, np.int64).reshape(-1, 2)


def _images(piece: DetectionPiece) -> list[UInt8[Tensor, "3 _ _"]]:
    flat = piece.pixels.split((3 * piece.sizes.prod(1)).tolist())
    return [part.view(3, *size) for part, size in zip(flat, piece.sizes.tolist(), strict=True)]


def open_annotated(opened: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Decode an image as its annotations see it: turned by EXIF, or as it lies in the file.

    Args:
        opened: Not yet decoded.
        size: Height and width by the annotations, of which 0 is not known.

    Raises:
        SampleError: It has another size, so that boxes would lie elsewhere.
        UndecodableImage: Pillow cannot decode it.
    """
    width, height = upright_size(opened)
    if 0 in size or size == (height, width):
        return upright(opened)
    if size == (opened.height, opened.width):
        return upright(opened, as_stored=True)
    raise SampleError("size differs from the annotations")
