"""Video files, and whether a path holds any; without torch and PyAV."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from adapters.video.annotations import find_annotations
from unicl.data.shard_index import (
    IMAGE_EXTENSIONS,
    MEDIA_EXTENSIONS,
    VIDEO_EXTENSIONS,
    tar_samples,
)
from unicl.errors import UniclError, UsageError

KNOWN_VIDEO_SETS = ("kinetics400", "kinetics600", "kinetics700", "msrvtt")
"""The sets that have a name of their own, which is that of their folder."""

FILE_EXTENSIONS = tuple(name for name in VIDEO_EXTENSIONS if name != "ts")
"""Of the files that a folder is searched for: one called .ts is mostly a program in TypeScript."""

_LOOKS = 1000

_SIGNATURES = {
    b"\x00\x00\x01\xba": "mpg",
    b"FLV\x01": "flv",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "wmv",
    b"OggS": "ogv",
}
# The first box of QuickTime files from before there were brands.
_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_BRANDS = {b"qt": "mov", b"M4V": "m4v", b"3gp": "3gp"}
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_TS_PACKET = 188


def holds_videos(spec: str) -> bool:
    """Say whether what a person typed is a set of videos, or a folder of them.

    Of a folder without annotations, the first folder below it that has videos or images decides by
    what it has more of, of tars the first; no more than 1,000 folders are looked into.
    """
    path = Path(spec)
    if spec in KNOWN_VIDEO_SETS:
        return True
    if path.is_file():
        return _extension(path.name) in FILE_EXTENSIONS or find_annotations(path) is not None
    if not spec or not path.is_dir():
        return False
    return find_annotations(path) is not None or _mostly_videos(path)


def video_type(encoded: bytes) -> str | None:
    """Return the extension that a video's content asks for, such as "mp4"; None for no video.

    Animated images (GIF, WebP, AVIF) are images here.
    """
    brand = encoded[8:12]
    if encoded[4:8] == b"ftyp":
        return None if brand in _IMAGE_BRANDS else _BRANDS.get(brand.rstrip()[:3], "mp4")
    if encoded[4:8] in _QUICKTIME:
        return "mov"
    if encoded[:4] == b"RIFF":
        return "avi" if brand == b"AVI " else None
    if encoded[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in encoded[:64] else "mkv"
    if encoded[: 4 * _TS_PACKET : _TS_PACKET] == b"G" * 4:
        return "ts"
    return next((name for start, name in _SIGNATURES.items() if encoded.startswith(start)), None)


def find_videos(folder: Path) -> dict[str, list[str]]:
    """Find all videos below a folder: their paths in it, by their names before the suffix."""
    found = defaultdict(list)
    for place, names in _walk(folder):
        inner = os.path.relpath(place, folder)
        for name in names:
            if _extension(name) in FILE_EXTENSIONS and not name.startswith("."):
                path = os.path.normpath(os.path.join(inner, name))
                found[os.path.splitext(name)[0]].append(path)
    return dict(found)


def _mostly_videos(folder: Path) -> bool:
    for place, names in islice(_walk(folder), _LOOKS):
        names = [name for name in names if not name.startswith(".")]
        extensions = [_extension(name) for name in names]
        videos = sum(extension in FILE_EXTENSIONS for extension in extensions)
        images = sum(extension in IMAGE_EXTENSIONS for extension in extensions)
        if videos or images:
            return videos > images
        if "tar" in extensions:
            found = _first_media(Path(place, names[extensions.index("tar")]))
            return bool(found) and found.isdisjoint(IMAGE_EXTENSIONS)
    return False


def refuse_pictures(tar: Path) -> None:
    """Refuse clips that have pictures beside them in their tar, by its first sample.

    Raises:
        UsageError: It has both, of which the picture would be taken.
    """
    found = _first_media(tar)
    if found.intersection(IMAGE_EXTENSIONS) and found.intersection(VIDEO_EXTENSIONS):
        raise UsageError(
            f"{tar} has pictures beside its clips ({' and '.join(sorted(found))}), and pictures "
            "are taken first; take them out and prepare the folder again"
        )


def _first_media(tar: Path) -> set[str]:
    with suppress(UniclError):  # who opens it will say what is wrong with it
        if (sample := next(tar_samples(tar), None)) is not None:
            return set(sample[1]).intersection(MEDIA_EXTENSIONS)
    return set()


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Go through a folder and those below it in a fixed order, into each once, links or not."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield place, sorted(names)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()
