"""A set of videos as a source of shards."""

from pathlib import Path

from adapters.video.decoding import video_type
from adapters.video.sets import open_video_set
from unicl.data.image_sets import CaptionSet, ClassificationSet
from unicl.data.image_sets.source import SetSource
from unicl.errors import UsageError


def open_video_source(spec: str) -> SetSource:
    """Open all parts of a set of videos, to write shards of them.

    Raises:
        UsageError: There is no such set.
    """
    opened = _open_any(spec)
    parts = {opened.split: opened}
    for split in opened.splits:
        parts[split] = opened if split == opened.split else _open(spec, split)
    return SetSource(parts, video_type, "a video")


def _open_any(spec: str) -> ClassificationSet | CaptionSet:
    failed = UsageError(f"there are no videos in {spec}")
    for split in ("train", "test", "val"):
        try:
            return _open(spec, split)
        except UsageError as error:
            failed = error
    raise failed


def _open(spec: str, split: str) -> ClassificationSet | CaptionSet:
    return open_video_set(spec, split=split, root=Path("data"))
