"""A set of images with boxes around their objects, as arrays."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from unicl.data.image_sets.images import ImageFiles, Images
from unicl.data.shards import RawSample
from unicl.errors import UsageError


class Annotations(NamedTuple):
    """The objects of one image."""

    boxes: Float32[np.ndarray, "objects 4"]
    """x1, y1, x2, y2 in pixels of the image as its file has it."""
    labels: Int32[np.ndarray, " objects"]
    """Numbers of their classes."""
    crowd: Bool[np.ndarray, " objects"]
    """Which boxes are of many objects at once: not trained on, ignored by the metrics."""
    judged: Int32[np.ndarray, " judged"] | None
    """Classes that were looked for in this image; None means all."""


class Judged(NamedTuple):
    """Which classes were looked for in which images, of a set where not all were in all."""

    numbers: Int32[np.ndarray, " judged"]
    """Numbers of classes, image by image."""
    offsets: Int64[np.ndarray, " num_images_and_one"]
    """Those of image i are `numbers[offsets[i]:offsets[i + 1]]`."""

    @staticmethod
    def of_pairs(
        owners: Int64[np.ndarray, " pairs"],
        numbers: Int64[np.ndarray, " pairs"],
        *,
        num_images: int,
        num_classes: int,
    ) -> "Judged":
        """Make it of pairs of image and class in any order, perhaps named several times."""
        owners, found = np.divmod(np.unique(owners * num_classes + numbers), num_classes)
        counts = np.bincount(owners, minlength=num_images)
        return Judged(found.astype(np.int32), offsets_of(counts))


@dataclass(frozen=True, kw_only=True)
class DetectionSet:
    """One split of a set of images with boxes.

    It can be pickled, and is cheap to fork.

    Raises:
        UsageError: There are no images.
    """

    name: str
    """What it is called: a known name, or the path that was opened."""
    split: str
    """Which part of it this is; empty for the whole of a set without parts."""
    class_names: tuple[str, ...]
    """One name per class, fit for a prompt."""
    category_ids: tuple[int, ...]
    """What the annotations call the classes, in the same order."""
    files: Images
    """The encoded images."""
    image_ids: Int64[np.ndarray, " num_images"]
    """What the annotations call the images; numbers from 1 on where they have no numbers."""
    sizes: Int32[np.ndarray, "num_images 2"]
    """Height and width by the annotations, 0 where they have none."""
    boxes: Float32[np.ndarray, "num_boxes 4"]
    """x1, y1, x2, y2 in pixels, image by image."""
    labels: Int32[np.ndarray, " num_boxes"]
    """Numbers of the classes."""
    crowd: Bool[np.ndarray, " num_boxes"]
    """Which boxes are of many objects at once."""
    offsets: Int64[np.ndarray, " num_images_and_one"]
    """Boxes of image i are `offsets[i]:offsets[i + 1]`."""
    areas: Float32[np.ndarray, " num_boxes"] | None = None
    """Square pixels by the annotations, mostly those of a mask, by which the metrics tell small
    objects from large ones; None takes the boxes'."""
    judged: Judged | None = None
    """Which classes were looked for in which image (LVIS, OpenImages); None means all in all."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Annotations that were left out, counted by reason."""
    where: Path
    """The file or folder of the annotations."""

    def __post_init__(self) -> None:
        if not self.num_images:
            raise UsageError(f"{self} holds no images")

    def __str__(self) -> str:
        return f"{self.name} ({self.split})" if self.split else self.name

    @property
    def num_images(self) -> int:
        """Number of images, those without objects included."""
        return len(self.image_ids)

    def of(self, index: int) -> Annotations:
        """Return the objects of an image; the arrays are views."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        judged = None
        if self.judged is not None:
            start, end = self.judged.offsets[index : index + 2]
            judged = self.judged.numbers[start:end]
        return Annotations(self.boxes[here], self.labels[here], self.crowd[here], judged)

    def at(self, rows: Sequence[int] | Int64[np.ndarray, " rows"]) -> "DetectionSet":
        """Return some of the images, with their objects."""
        rows = np.asarray(rows, np.int64)
        chosen, offsets = _ranges(self.offsets, rows)
        judged = None
        if self.judged is not None:
            places, starts = _ranges(self.judged.offsets, rows)
            judged = Judged(self.judged.numbers[places], starts)
        return replace(
            self,
            files=ChosenImages(self.files, rows),
            image_ids=self.image_ids[rows],
            sizes=self.sizes[rows],
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            crowd=self.crowd[chosen],
            areas=None if self.areas is None else self.areas[chosen],
            offsets=offsets,
            judged=judged,
        )

    def truth(self) -> dict[str, Any]:
        """Return the annotations in COCO's format, with the original ids of images and categories.

        Annotations are numbered anew from 1 on: COCOeval takes a match with number 0 for none.
        """
        owners = np.repeat(self.image_ids, np.diff(self.offsets))
        corners = self.boxes.astype(np.float64)
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
        areas = boxes[:, 2] * boxes[:, 3] if self.areas is None else self.areas
        categories = np.array(self.category_ids, np.int64)[self.labels]
        columns = (owners, categories, boxes, areas, self.crowd.astype(np.int64))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        names = zip(self.category_ids, self.class_names, strict=True)
        places = zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True)
        return {
            "images": [
                {
                    "id": image_id,
                    "height": height,
                    "width": width,
                    "file_name": self.files.locate(index)[0],
                }
                for index, (image_id, (height, width)) in enumerate(places)
            ],
            "annotations": [
                {"id": number, **dict(zip(keys, row, strict=True))}
                for number, row in enumerate(rows, start=1)
            ],
            "categories": [{"id": number, "name": name} for number, name in names],
        }

    def digest(self) -> str:
        """Return hexadecimal digits that change when images, boxes or classes may have changed.

        Of the images it takes paths, sizes and times of change; that one is missing is no error.
        """
        digest = blake2b(self.files.digest().encode(), digest_size=16)
        digest.update(repr((self.class_names, self.category_ids)).encode())
        arrays = [self.image_ids, self.sizes, self.boxes, self.labels, self.crowd, self.offsets]
        arrays += [] if self.areas is None else [self.areas]
        arrays += [] if self.judged is None else [*self.judged]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class ListedFiles(ImageFiles):
    """One file per image of a list that may name files which are not there."""

    def digest(self) -> str:
        """Return a digest of the folder, and of the files' names, sizes and times, in order."""
        folder = os.fsencode(os.path.abspath(self.folder))
        digest = blake2b(folder, digest_size=16)
        for name in self._names:
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:
                digest.update(b"%s\0missing\0" % name)
            else:
                digest.update(b"%s\0%d %d\0" % (name, status.st_size, status.st_mtime_ns))
        return digest.hexdigest()


@dataclass(frozen=True)
class ChosenImages:
    """Some images of many."""

    images: Images
    """All images."""
    rows: Int64[np.ndarray, " num_images"]
    """Which of them."""

    @property
    def num_samples(self) -> int:
        """Number of images chosen."""
        return len(self.rows)

    def digest(self) -> str:
        """Return a digest of all images, and of the choice."""
        own = self.images.digest().encode() + self.rows.tobytes()
        return blake2b(own, digest_size=16).hexdigest()

    def read(self, index: int) -> RawSample:
        """Return an image."""
        return self.images.read(self._row(index))

    def locate(self, index: int) -> tuple[str, int]:
        """Return where an image lies, and its place there."""
        return self.images.locate(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"image {index} of {len(self.rows)}")
        return int(self.rows[index])


def _ranges(
    offsets: Int64[np.ndarray, " num_images_and_one"], rows: Int64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " items"], Int64[np.ndarray, " rows_and_one"]]:
    """Return the places of the items of some images, and where each of those images' start."""
    counts = offsets[rows + 1] - offsets[rows]
    starts = offsets_of(counts)
    places = np.arange(starts[-1]) + np.repeat(offsets[rows] - starts[:-1], counts)
    return places, starts


def offsets_of(counts: Int64[np.ndarray, " images"]) -> Int64[np.ndarray, " images_and_one"]:
    """Return where the items of each image start, and where those of the last end."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
