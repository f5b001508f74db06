"""Training straight from the files of a set of videos, without writing shards.

A video has as many samples as it has captions: MSR-VTT's 20 would be 20 copies of it in a tar.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from adapters.video.sets import open_video_set
from unicl.data.hash_table import TextHashTable
from unicl.data.image_sets import CaptionSet, ClassificationSet
from unicl.data.shards import RawSample
from unicl.errors import UsageError

logger = logging.getLogger("unicl")


def open_video_samples(spec: str, *, split: str, root: Path) -> "VideoSamples":
    """Open a split of a set of videos to train on; see `sets.open_video_set`.

    What the set lacks is told at once.

    Raises:
        UsageError: There is no such set or split, or its videos have several classes each.
        UniclError: The annotations are damaged.
    """
    videos = open_video_set(spec, split=split, root=root)
    if videos.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in videos.skipped.items())
        logger.warning("%s has %d of its videos (%s)", videos, videos.num_samples, reasons)
    return VideoSamples(videos)


class VideoSamples:
    """A sample per video and caption, or per video and the name of its class.

    It is to `unicl.data.loader.Loader` what `unicl.data.shards.ShardSet` is. A label is a hash of
    the text, as there: the captions or names alone decide which samples are positives.

    Raises:
        UsageError: The videos have several classes each.
    """

    def __init__(self, videos: ClassificationSet | CaptionSet) -> None:
        self.videos = videos
        if isinstance(videos, CaptionSet):
            counts = np.array([len(texts) for texts in videos.captions], np.int64)
        elif videos.targets.ndim == 1:
            counts = np.ones(videos.num_samples, np.int64)
        else:
            raise UsageError(f"training needs one class per video; {videos} has several")
        self._ends = np.cumsum(counts)
        self.num_samples = int(self._ends[-1])

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " 1"]:
        """Number of samples, as of a single shard: files need no order of reading."""
        return np.array([self.num_samples], np.int64)

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
        """Return the file or tar that holds the video, and its place there."""
        return self.videos.locate(self._place(index)[0])

    def read(self, index: int) -> RawSample:
        """Return the encoded video and the text.

        Raises:
            SampleError: The video is out of reach.
        """
        row, turn = self._place(index)
        video = self.videos.read(row)
        # As a file of its own is its own shard, a message names the path alone.
        return RawSample(video.key, video.image, self._text(row, turn).encode())

    def _place(self, index: int) -> tuple[int, int]:
        """Return the video of a sample, and which of its texts it has."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row - 1] if row else 0)

    def _text(self, row: int, turn: int) -> str:
        if isinstance(self.videos, CaptionSet):
            return self.videos.captions[row][turn]
        return self.videos.class_names[int(self.videos.targets[row])]
