"""Class folders of images with depth maps.

The depth map of CLASS/NAME.jpg is CLASS/NAME.depth.png, CLASS/NAME_depth.png, or NAME.png in a
folder `depth` that stands where the image's folder `rgb` does: CLASS/rgb/NAME.jpg and
CLASS/depth/NAME.png, or rgb/CLASS/NAME.jpg and depth/CLASS/NAME.png. Above the classes there may be
parts: `train`, `val`, `test`.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePath

from adapters.depth.rgbd import join
from unicl.data.image_sets import ClassificationSet
from unicl.data.image_sets.class_folder import IMAGES, open_class_folder
from unicl.data.image_sets.images import ImageFiles
from unicl.data.shards import RawSample
from unicl.errors import UsageError

_SUFFIXES = (".depth.png", "_depth.png")
_RGB, _DEPTH = "rgb", "depth"
_LOOKS = 1000


@dataclass(frozen=True)
class RgbdFiles:
    """Two files per image: itself and its depth map."""

    images: ImageFiles
    """The images."""
    depths: ImageFiles
    """Their depth maps, in the same order."""

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self.images.num_samples

    def digest(self) -> str:
        """Return a digest of the names, sizes and times of all files.

        Raises:
            UniclError: Files are missing.
        """
        both = self.images.digest() + self.depths.digest()
        return blake2b(both.encode(), digest_size=16).hexdigest()

    def read(self, index: int) -> RawSample:
        """Return both files as one, as `rgbd.join` puts them together.

        Raises:
            SampleError: One is out of reach.
        """
        image, depth = self.images.read(index), self.depths.read(index)
        return RawSample(image.key, join(image.image, depth.image), b"")

    def locate(self, index: int) -> tuple[str, int]:
        """Return the path of the image below the folder, and the index."""
        return self.images.locate(index)


def open_rgbd_folder(folder: Path, *, split: str) -> ClassificationSet:
    """Open a part of a class folder whose images have depth maps.

    An image without one is left out and counted.

    Args:
        folder: Of one of the layouts above.
        split: `train`, `val` or `test`; a folder without parts is its own `test`.

    Raises:
        UsageError: There is no such part, or no image that has a depth map.
    """
    apart = _is_apart(folder)
    opened = open_class_folder(folder / _RGB if apart else folder, split=split)
    files = opened.images
    assert isinstance(files, ImageFiles)
    below = [os.path.relpath(os.path.join(files.folder, name), folder) for name in files.names]
    images = [row for row, name in enumerate(below) if not _is_depth(folder, name)]
    depths = {row: depth for row in images if (depth := _depth_of(folder, below[row]))}
    if not depths:
        raise UsageError(
            f"{folder} has no image with a depth map; expected CLASS/NAME.depth.png or "
            "CLASS/NAME_depth.png beside CLASS/NAME.jpg, or folders rgb and depth of equal names"
        )
    rows = list(depths)
    lacking = len(images) - len(rows)
    return replace(
        opened,
        name=str(folder),
        images=RgbdFiles(
            ImageFiles(folder, [below[row] for row in rows]),
            ImageFiles(folder, list(depths.values())),
        ),
        skipped={**opened.skipped, **({"no depth": lacking} if lacking else {})},
        targets=opened.targets[rows],
    )


def has_depth(folder: Path) -> bool:
    """Say whether images below a folder have depth maps, by the first folder that has images.

    No more than 1,000 folders are looked into.
    """
    if _is_apart(folder):
        return True
    for _, folders, names in islice(os.walk(folder, followlinks=True), _LOOKS):
        folders.sort()
        if {_RGB, _DEPTH} <= set(folders) or any(name.endswith(_SUFFIXES) for name in names):
            return True
        if any(map(IMAGES.includes, names)):
            return False
    return False


def _is_apart(folder: Path) -> bool:
    return (folder / _RGB).is_dir() and (folder / _DEPTH).is_dir()


def _is_depth(folder: Path, name: str) -> bool:
    parts = PurePath(name).parts[:-1]
    # A class may well be called "depth".
    return name.endswith(_SUFFIXES) or any(
        part == _DEPTH and folder.joinpath(*parts[:place], _RGB).is_dir()
        for place, part in enumerate(parts)
    )


def _depth_of(folder: Path, name: str) -> str | None:
    """Return the depth map of an image, both below the folder."""
    return next((path for path in _candidates(name) if (folder / path).is_file()), None)


def _candidates(name: str) -> Iterator[str]:
    path = PurePath(name)
    yield from (str(path.with_suffix("")) + suffix for suffix in _SUFFIXES)
    for place, part in enumerate(path.parts[:-1]):
        if part == _RGB:
            parts: Iterable[str] = (*path.parts[:place], _DEPTH, *path.parts[place + 1 :])
            yield str(PurePath(*parts).with_suffix(".png"))
