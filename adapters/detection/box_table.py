"""Boxes as a file of annotations has them, one a row, before they are checked."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt8

from adapters.detection.detection_set import offsets_of
from unicl.errors import UsageError

NO_BOX, NOT_FOUR_NUMBERS, UNREAD_IMAGE = 1, 2, 3
_FAULTS = {
    NO_BOX: "no box",
    NOT_FOUR_NUMBERS: "box is not four numbers",
    UNREAD_IMAGE: "image cannot be read",
}


class Arranged(NamedTuple):
    """Boxes that can be used, image by image, named as in `DetectionSet`."""

    boxes: Float32[np.ndarray, "num_boxes 4"]
    labels: Int32[np.ndarray, " num_boxes"]
    crowd: Bool[np.ndarray, " num_boxes"]
    areas: Float32[np.ndarray, " num_boxes"] | None
    offsets: Int64[np.ndarray, " num_images_and_one"]
    skipped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BoxTable:
    """Boxes in the order of their file."""

    owners: Int64[np.ndarray, " rows"]
    """Number of the image; -1 where there is no such image."""
    labels: Int64[np.ndarray, " rows"]
    """Number of the class; -1 where there is no such category."""
    boxes: Float64[np.ndarray, "rows 4"]
    """x1, y1, x2, y2 in pixels."""
    crowd: Bool[np.ndarray, " rows"]
    """Which boxes are of many objects at once."""
    faults: UInt8[np.ndarray, " rows"] | None = None
    """0, or what is wrong with the row."""
    areas: Float64[np.ndarray, " rows"] | None = None
    """In square pixels; NaN takes the box's."""

    def arrange(self, sizes: Int32[np.ndarray, "num_images 2"], where: object) -> Arranged:
        """Cut the boxes at the borders of their images, and leave out what is no box then.

        Args:
            sizes: Height and width of the images; 0 where they are not known.
            where: What messages call the annotations.

        Raises:
            UsageError: There are boxes, and none of them can be used.
        """
        boxes = self.boxes.copy()
        limits = np.where(sizes > 0, sizes, np.inf)[self.owners][:, ::-1]  # height, width
        # A box of NaN compares with nothing, and is left out for it.
        with np.errstate(invalid="ignore"):
            empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
            for corner in (boxes[:, :2], boxes[:, 2:]):
                np.clip(corner, 0, limits, out=corner)
            outside = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        reasons = {
            **({} if self.faults is None else {_FAULTS[k]: self.faults == k for k in _FAULTS}),
            "unknown image": self.owners < 0,
            "unknown category": self.labels < 0,
            "box is not finite": ~np.isfinite(self.boxes).all(1),
            "box without area": empty,
            "box out of the image": outside,
        }
        kept = np.ones(len(boxes), bool)
        skipped = {}
        for reason, found in reasons.items():
            if count := int((kept & found).sum()):
                skipped[reason] = count
            kept &= ~found
        if len(kept) and not kept.any():
            counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
            raise UsageError(f"none of the {len(kept)} boxes of {where} can be used ({counts})")
        rows = np.flatnonzero(kept)
        rows = rows[np.argsort(self.owners[rows], kind="stable")]
        boxes = boxes[rows]
        areas = None
        if self.areas is not None:
            own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            given = self.areas[rows]
            areas = np.where(np.isfinite(given), given, own).astype(np.float32)
        return Arranged(
            boxes=boxes.astype(np.float32),
            labels=self.labels[rows].astype(np.int32),
            crowd=self.crowd[rows],
            areas=areas,
            offsets=offsets_of(np.bincount(self.owners[rows], minlength=len(sizes))),
            skipped=skipped,
        )
