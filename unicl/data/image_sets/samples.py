"""Training straight from the files of a set, without writing shards.

A sample is a file and one of its texts: of MSR-VTT's 20 captions per video, shards would hold 20
copies of the video.
"""

from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Int64

from unicl.data.hash_table import TextHashTable
from unicl.data.image_sets.image_set import CaptionSet, ClassificationSet
from unicl.data.shards import RawSample
from unicl.errors import UsageError


class SetSamples:
    """A sample per file and caption, or per file and the name of its class.

    It is to `unicl.data.loader.Loader` what `unicl.data.shards.ShardSet` is. A label is a hash of
    the text, as there: the captions or names alone decide which samples are positives.

    Raises:
        UsageError: The files have several classes each.
    """

    def __init__(self, images: ClassificationSet | CaptionSet) -> None:
        self.images = images
        if isinstance(images, CaptionSet):
            counts = np.array([len(texts) for texts in images.captions], np.int64)
        elif images.targets.ndim == 1:
            counts = np.ones(images.num_samples, np.int64)
        else:
            raise UsageError(f"training needs one class per sample; {images} has several")
        self._ends = np.cumsum(counts)
        self.num_samples = int(self._ends[-1])

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " 1"]:
        """Number of samples, as of a single shard: files need no order of reading."""
        return np.array([self.num_samples], np.int64)

    def digest(self) -> str:
        """Return a digest of the samples' files and texts, in order; contents and times are not."""
        digest = blake2b(digest_size=16)
        for row in range(self.images.num_samples):
            digest.update(repr((self.images.locate(row), self._texts(row))).encode())
        return digest.hexdigest()

    def table(self) -> TextHashTable:
        """Return the text hash table of all samples."""
        return self._table

    @cached_property
    def _table(self) -> TextHashTable:
        table = TextHashTable()
        for index in range(self.num_samples):
            table.add(self._text(*self._place(index)), "")
        return table

    def label(self, index: int, text: str, key: str) -> int:
        """Return the label of a sample, which its text decides."""
        return self._table.label(text, key)

    def locate(self, index: int) -> tuple[str, int]:
        """Return the file or tar that holds the sample, and its place there."""
        return self.images.locate(self._place(index)[0])

    def read(self, index: int) -> RawSample:
        """Return the encoded file and the text.

        Raises:
            SampleError: The file is out of reach.
        """
        row, turn = self._place(index)
        file = self.images.read(row)
        # As a file of its own is its own shard, a message names the path alone.
        return RawSample(file.key, file.image, self._text(row, turn).encode())

    def texts_of(self, index: int) -> tuple[str, ...]:
        """Return all texts of a sample's file, its own among them."""
        return self._texts(self._place(index)[0])

    def _place(self, index: int) -> tuple[int, int]:
        """Return the file of a sample, and which of its texts it has."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row - 1] if row else 0)

    def _text(self, row: int, turn: int) -> str:
        return self._texts(row)[turn]

    def _texts(self, row: int) -> tuple[str, ...]:
        if isinstance(self.images, CaptionSet):
            return self.images.captions[row]
        return (self.images.class_names[int(self.images.targets[row])],)


class Numbered:
    """Samples whose labels are their numbers, so that what belongs to each can be looked up.

    Args:
        samples: What is read: samples with texts, or a set of images.
        texts: Keep the texts; without them, a sample that has none is read all the same.
    """

    def __init__(self, samples: Any, *, texts: bool = True) -> None:
        self.samples = samples
        self._texts = texts

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.samples.num_samples

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " shards"]:
        """Number of samples that lie together, one number for each place."""
        return self.samples.shard_sizes

    def digest(self) -> str:
        """Return a digest of the samples."""
        return self.samples.digest()

    def read(self, index: int) -> RawSample:
        """Return an encoded image, and its text if that is kept.

        Raises:
            SampleError: It cannot be used.
        """
        sample = self.samples.read(index)
        return sample if self._texts else RawSample(sample.key, sample.image, b"")

    def label(self, index: int, text: str, key: str) -> int:
        """Return the sample's number."""
        return index

    def locate(self, index: int) -> tuple[str, int]:
        """Return where the sample lies."""
        return self.samples.locate(index)
