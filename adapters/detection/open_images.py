"""OpenImages as its publisher has it: tables of classes, boxes and judged classes."""

import csv
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from adapters.detection.box_table import UNREAD_IMAGE, BoxTable
from adapters.detection.detection_set import DetectionSet, Judged, ListedFiles
from adapters.detection.image_places import fullest
from adapters.detection.image_sizes import read_sizes
from unicl.data.image_sets import MissingSetError
from unicl.data.image_sets.image_set import choose_split
from unicl.data.sources import class_name
from unicl.errors import UniclError

_PARTS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}
_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")


def find_tables(folder: Path) -> Path | None:
    """Return the table of the classes' names, if a folder has OpenImages' tables."""
    found = _glob(folder, "*class-descriptions-boxable.csv")
    return found[0] if found else None


def open_open_images(folder: Path, *, name: str, split: str) -> DetectionSet:
    """Open a part of OpenImages: `class-descriptions-boxable.csv`, `*-annotations-bbox.csv`.

    Tables lie in the folder, in `annotations` or `csv`, or in the part's folder; images are
    `PART/ID.jpg` or `images/PART/ID.jpg`. A group is a crowd. An image's judged classes are those
    of `PART-annotations-human-imagelabels-boxable.csv` that a person verified, there or not there,
    and those of its boxes; without that table all are. Categories and images have numbers from 1
    on, in the order of the tables. The sizes are read out of the images.

    Raises:
        MissingSetError: A table or all images are missing.
        UsageError: There is no such part, or there are boxes and none can be used.
        UniclError: A table is damaged.
    """
    descriptions = find_tables(folder)
    if descriptions is None:
        raise MissingSetError(f"{folder} lacks class-descriptions-boxable.csv of OpenImages")
    tables = {part: _box_table(folder, part) for part in _PARTS}
    split = choose_split(name, split, tuple(part for part, path in tables.items() if path))
    path = tables[split]
    assert path is not None
    classes = _class_names(descriptions)
    numbers = {label: number for number, label in enumerate(classes)}
    rows = _Boxes(numbers)
    for line, row in _rows(path, _BOX_COLUMNS):
        rows.add(path, line, row)
    labels = _label_table(folder, split)
    verified = _verified(labels, rows, numbers) if labels else None
    names = [f"{image}.jpg" for image in rows.images]
    place = _images(folder, split, names)
    sizes = read_sizes([place / each for each in names])
    arranged = rows.table(sizes).arrange(sizes, path)
    judged = None
    if verified is not None:
        owners = np.repeat(np.arange(len(names)), np.diff(arranged.offsets))
        judged = Judged.of_pairs(
            np.concatenate((verified[:, 0], owners)),
            np.concatenate((verified[:, 1], arranged.labels.astype(np.int64))),
            num_images=len(names),
            num_classes=len(classes),
        )
    return DetectionSet(
        name=name,
        split=split,
        class_names=tuple(classes.values()),
        category_ids=tuple(range(1, len(classes) + 1)),
        files=ListedFiles(place, names),
        image_ids=np.arange(1, len(names) + 1),
        sizes=sizes,
        judged=judged,
        where=path.absolute(),
        **arranged._asdict(),
    )


@dataclass
class _Boxes:
    """The boxes of a table, without an object for each: train has 14.6 million."""

    numbers: dict[str, int]
    images: dict[str, int] = field(default_factory=dict)
    owners: array = field(default_factory=lambda: array("i"))
    labels: array = field(default_factory=lambda: array("i"))
    boxes: array = field(default_factory=lambda: array("d"))
    crowd: array = field(default_factory=lambda: array("b"))

    def add(self, path: Path, line: int, row: dict[str, str]) -> None:
        try:
            sides = [float(row[key]) for key in ("XMin", "YMin", "XMax", "YMax")]
        except (TypeError, ValueError) as error:
            raise UniclError(f"{path}, line {line} has a side that is no number") from error
        self.boxes.extend(sides)
        self.owners.append(self.images.setdefault(row["ImageID"], len(self.images)))
        self.labels.append(self.numbers.get(row["LabelName"], -1))
        self.crowd.append(row.get("IsGroupOf") == "1")

    def table(self, sizes: np.ndarray) -> BoxTable:
        owners = np.array(self.owners, np.int64)
        shares = np.array(self.boxes, np.float64).reshape(-1, 4)
        unread = (sizes == 0).any(1)[owners]
        return BoxTable(
            owners=owners,
            labels=np.array(self.labels, np.int64),
            boxes=shares * np.tile(sizes[:, ::-1], 2)[owners],
            crowd=np.array(self.crowd, bool),
            faults=np.where(unread, UNREAD_IMAGE, 0).astype(np.uint8),
        )


def _verified(path: Path, boxes: _Boxes, numbers: dict[str, int]) -> Int64[np.ndarray, "pairs 2"]:
    """Return the images and the classes of which a person said that they are not there.

    Those that are there have boxes, or else are named more closely: a limousine has no box as car.
    """
    pairs = array("q")
    for _, row in _rows(path, ("ImageID", "LabelName", "Confidence")):
        denied = row["Confidence"].strip() in ("0", "0.0")
        number = numbers.get(row["LabelName"]) if denied else None
        if number is not None:
            # An image of which all classes were denied has no box, and is still an image.
            pairs.append(boxes.images.setdefault(row["ImageID"], len(boxes.images)))
            pairs.append(number)
    return np.array(pairs, np.int64).reshape(-1, 2)


def _class_names(path: Path) -> dict[str, str]:
    """Return the names of the classes by their labels, such as /m/0dzct."""
    # Of version 7 the table has a header, of those before none.
    rows = [row for _, row in _lines(path) if row and row[0] != "LabelName"]
    if not rows or any(len(row) != 2 for row in rows):
        raise UniclError(f"{path} is no table of classes: a row is LABEL,NAME")
    return {label: class_name(name) for label, name in rows}


def _box_table(folder: Path, part: str) -> Path | None:
    return _table(folder, part, "*annotations-bbox.csv")


def _label_table(folder: Path, part: str) -> Path | None:
    return _table(folder, part, "*annotations-human-imagelabels-boxable.csv")


def _table(folder: Path, part: str, pattern: str) -> Path | None:
    found = (
        path
        for own in _PARTS[part]
        for path in (*_glob(folder, pattern), *_glob(folder / own, pattern))
        # Of version 6 the first is called oidv6-train-annotations-bbox.csv.
        if own in path.name.split("-")
    )
    return next(found, None)


def _glob(folder: Path, pattern: str) -> list[Path]:
    places = (folder, folder / "annotations", folder / "csv")
    return [path for place in places for path in sorted(place.glob(pattern))]


def _images(folder: Path, part: str, names: list[str]) -> Path:
    places = [
        each
        for own in _PARTS[part]
        for each in (folder / own, folder / "images" / own, folder / own / "images")
    ]
    count, place = fullest(places, names)
    if not count:
        shown = names[0] if names else "ID.jpg"
        raise MissingSetError(
            f"none of the images is there, such as {shown}; put them into {place}"
        )
    return place


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    lines = _lines(path)
    header = next(lines, (1, []))[1]
    missing = [column for column in columns if column not in header]
    if missing:
        raise UniclError(f"{path} has no column {', '.join(missing)}")
    for number, row in lines:
        if len(row) != len(header):
            raise UniclError(f"{path}, line {number} has {len(row)} cells, not {len(header)}")
        yield number, dict(zip(header, row, strict=True))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.reader(file), start=1)
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UniclError(f"{path} is no table of CSV, or damaged: {error}") from error
