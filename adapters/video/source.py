"""A set of videos as a source of shards: each video with its captions or its class's name."""

import re
from collections.abc import Generator
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.video.decoding import video_type
from adapters.video.samples import VideoSamples
from adapters.video.sets import open_video_set
from unicl.data.image_sets import CaptionSet, ClassificationSet
from unicl.data.shard_index import VIDEO_EXTENSIONS
from unicl.data.shards import SampleError
from unicl.data.sources import Entry, SkippedEntry
from unicl.errors import UsageError

# A tar has room for 100 bytes, and a dot would end the key.
_KEY_LENGTH = 80


class VideoSource:
    """What `unicl.data.prepare.prepare` writes shards of.

    A video with several captions is written once for each; training straight from the set's files
    (`unicl train`) needs no copies.

    Args:
        spec: A set of videos, as `adapters.video.sets.open_video_set` takes it.

    Raises:
        UsageError: There is no such set.
    """

    def __init__(self, spec: str) -> None:
        self.name = spec

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the set's parts; an empty one of a set without parts."""
        return tuple(self._parts)

    @property
    def info(self) -> dict[str, Any]:
        """What `dataset.json` shall say."""
        return {"source": self.name}

    def num_entries(self, split: str) -> int:
        """Return the number of videos, or of their captions."""
        return VideoSamples(self._parts[split]).num_samples

    def entries(self, split: str) -> Generator[Entry | SkippedEntry, None, None]:
        """Go through the videos; those that the set lacks come first."""
        part = self._parts[split]
        for reason, count in part.skipped.items():
            for _ in range(count):
                yield SkippedEntry(reason, str(part))
        samples = VideoSamples(part)
        for index in range(samples.num_samples):
            where, _ = samples.locate(index)
            try:
                sample = samples.read(index)
            except SampleError as error:
                yield SkippedEntry(error.reason, where)
                continue
            extension = video_type(sample.image)
            if extension not in VIDEO_EXTENSIONS:
                yield SkippedEntry("not a video", where)
                continue
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(sample.key).stem)[:_KEY_LENGTH]
            text = (sample.text or b"").decode()
            yield Entry(f"{index:08d}-{stem}", sample.image, extension, text)

    @cached_property
    def _parts(self) -> dict[str, ClassificationSet | CaptionSet]:
        opened = self._open_any()
        if not opened.splits:
            return {"": opened}
        return {
            split: opened if split == opened.split else self._open(split) for split in opened.splits
        }

    def _open_any(self) -> ClassificationSet | CaptionSet:
        failed = UsageError(f"there are no videos in {self.name}")
        for split in ("train", "test", "val"):
            try:
                return self._open(split)
            except UsageError as error:
                failed = error
        raise failed

    def _open(self, split: str) -> ClassificationSet | CaptionSet:
        return open_video_set(self.name, split=split, root=Path("data"))
