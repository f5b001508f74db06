"""Annotations in COCO's JSON: COCO, LVIS, Objects365, and what Roboflow and others export."""

import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from adapters.detection.box_table import NO_BOX, NOT_FOUR_NUMBERS, Arranged, BoxTable
from adapters.detection.detection_set import DetectionSet, Judged, ListedFiles
from adapters.detection.image_places import locate_images
from unicl.data.sources import class_name
from unicl.errors import UniclError, UsageError

_PART_FOLDERS = ("train", "val", "valid", "validation", "test")


def open_coco(path: Path, *, name: str, split: str) -> DetectionSet:
    """Open a JSON file of boxes.

    Images lie beside it, or in a folder named like it, `images`, or like a part of its name
    (`train2017` of `instances_train2017.json`), there or one folder up; LVIS's with COCO's.
    Categories are numbered by their sorted ids. One that is only the super category of all others,
    as number 0 is in Roboflow's exports, is no class.

    In LVIS an image's judged classes are those that it surely lacks, and those of which all objects
    are annotated.

    Raises:
        MissingSetError: None of the images is there.
        UsageError: There is no image, or there are boxes and none can be used.
        UniclError: It is no such file, is damaged, or names an id twice.
    """
    found = _read(path)
    if not found.images:
        raise UsageError(f"{path} names no images")
    categories = _classes(path, found)
    rows = {_image_id(path, image): row for row, image in enumerate(found.images)}
    if len(rows) < len(found.images):
        repeated = _first_repeated([image["id"] for image in found.images])
        raise UniclError(f"{path} has two images with id {repeated!r}; remove one")
    numbers = {category: number for number, category in enumerate(categories)}
    sizes = np.array([_size(image) for image in found.images], np.int32).reshape(-1, 2)
    arranged = found.boxes.table(rows, numbers).arrange(sizes, path)
    folder, names = locate_images(path, [_file_name(path, image) for image in found.images])
    return DetectionSet(
        name=name,
        split=split,
        class_names=tuple(categories.values()),
        category_ids=tuple(categories),
        files=ListedFiles(folder, names),
        image_ids=_image_ids(list(rows)),
        sizes=sizes,
        judged=_judged(found.images, arranged, numbers),
        where=path.absolute(),
        **arranged._asdict(),
    )


class _Boxes:
    """Takes each annotation out of a JSON file while it is parsed.

    The numbers of the 25 million boxes of Objects365 take 2 GiB; as dicts they would take 30.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids = array("q")
        self.image_ids: dict[Any, int] = {}
        self.category_ids: dict[Any, int] = {}
        self.owners = array("i")
        self.labels = array("i")
        self.boxes = array("d")
        self.areas = array("d")
        self.crowd = array("b")
        self.faults = array("B")

    def __call__(self, found: dict[str, Any]) -> dict[str, Any] | None:
        if "image_id" not in found:
            return found
        try:
            self.ids.append(found.get("id", -1))
        except (TypeError, OverflowError) as error:
            raise UniclError(
                f"{self.path} has an annotation with id {found['id']!r}, which is no whole number"
            ) from error
        self.owners.append(_number(self.image_ids, found["image_id"]))
        self.labels.append(_number(self.category_ids, found.get("category_id")))
        x, y, width, height, fault = _box(found)
        self.boxes.extend((x, y, x + width, y + height))
        area = found.get("area")
        self.areas.append(area if isinstance(area, int | float) else np.nan)
        self.crowd.append(bool(found.get("iscrowd")))
        self.faults.append(fault)
        return None

    def require_single(self) -> None:
        """Refuse two annotations of one id."""
        ids = np.sort(np.array(self.ids, np.int64))
        ids = ids[ids >= 0]
        twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
        if len(twice):
            more = f" (and {len(twice) - 1:,} more ids)" if len(twice) > 1 else ""
            raise UniclError(
                f"{self.path} has two annotations with id {twice[0]}{more}; number them anew"
            )

    def table(self, rows: Mapping[Any, int], numbers: Mapping[Any, int]) -> BoxTable:
        """Return the boxes, with images and categories by their numbers."""
        owners = np.array([rows.get(each, -1) for each in self.image_ids], np.int64)
        labels = np.array([numbers.get(each, -1) for each in self.category_ids], np.int64)
        return BoxTable(
            owners=_taken(owners, self.owners),
            labels=_taken(labels, self.labels),
            boxes=np.array(self.boxes, np.float64).reshape(-1, 4),
            crowd=np.array(self.crowd, bool),
            faults=np.array(self.faults, np.uint8),
            areas=np.array(self.areas, np.float64),
        )


@dataclass(frozen=True)
class _CocoFile:
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    boxes: _Boxes


def _number(numbers: dict[Any, int], key: object) -> int:
    try:
        return numbers.setdefault(key, len(numbers))
    except TypeError:  # a list or an object is nobody's id
        return numbers.setdefault(None, len(numbers))


def _box(found: dict[str, Any]) -> tuple[float, float, float, float, int]:
    box = found.get("bbox")
    if not box:
        return 0.0, 0.0, 0.0, 0.0, NO_BOX
    try:
        x, y, width, height = box
        return x + 0.0, y + 0.0, width + 0.0, height + 0.0, 0
    except (TypeError, ValueError, OverflowError):
        return 0.0, 0.0, 0.0, 0.0, NOT_FOUR_NUMBERS


def _taken(values: Int64[np.ndarray, " ids"], numbers: array) -> Int64[np.ndarray, " rows"]:
    return values[np.array(numbers, np.int64)]


def _read(path: Path) -> _CocoFile:
    boxes = _Boxes(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=boxes)
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UniclError(f"{path} is no JSON, or damaged: {error}") from error
    if not isinstance(content, dict):
        raise UniclError(f"{path} is no file of COCO's annotations, which is an object")
    annotations = content.get("annotations", [])
    for key in ("images", "categories", "annotations"):
        items = content.get(key, [] if key == "annotations" else None)
        kind = type(None) if key == "annotations" else dict
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise UniclError(f"{path} is no file of COCO's boxes: {_lacking(items, key)}")
    if len(annotations) > len(boxes.ids):
        raise UniclError(f"{path} has an annotation that is null; remove it")
    if len(annotations) < len(boxes.ids):
        raise UniclError(f"{path} has annotations inside of others; take their image_id out")
    boxes.require_single()
    return _CocoFile(content["images"], content["categories"], boxes)


def _lacking(items: object, key: str) -> str:
    if not isinstance(items, list):
        return f"it has no list of {key}"
    return "its annotations have no image_id" if key == "annotations" else f"bad {key}"


def _classes(path: Path, found: _CocoFile) -> dict[int, str]:
    """Return the names of the classes by the ids of their categories, in their order."""
    ids = [category.get("id") for category in found.categories]
    bad = next((each for each in ids if type(each) is not int), None)
    if bad is not None or None in ids:
        raise UniclError(f"{path} has a category with id {bad!r}, which is no whole number")
    if len(set(ids)) < len(ids):
        raise UniclError(f"{path} has two categories with id {_first_repeated(ids)}; remove one")
    categories = sorted(found.categories, key=lambda category: category["id"])
    for category in categories:
        if _is_above(category, categories) and not _annotated(path, category["id"], found):
            categories.remove(category)
            break
    return {each["id"]: class_name(str(each.get("name") or each["id"])) for each in categories}


def _is_above(category: dict[str, Any], categories: list[dict[str, Any]]) -> bool:
    others = [other for other in categories if other is not category]
    name = category.get("name")
    return bool(others) and all(other.get("supercategory") == name for other in others)


def _annotated(path: Path, category: int, found: _CocoFile) -> bool:
    """Say whether anything is of a category, in this file or in that of another part."""
    if category in found.boxes.category_ids:
        return True
    pattern = re.compile(rb'"category_id"\s*:\s*%d\s*[,}]' % category)
    parts = (path.parent.parent / part / path.name for part in _PART_FOLDERS)
    try:
        return any(pattern.search(part.read_bytes()) for part in parts if part.is_file())
    except OSError as error:
        raise UniclError(f"cannot read {error.filename}: {error.strerror}") from error


def _image_id(path: Path, image: dict[str, Any]) -> int | str:
    found = image.get("id")
    if not isinstance(found, int | str):
        raise UniclError(f"{path} has an image with id {found!r}, which is neither number nor text")
    return found


def _image_ids(ids: list[Any]) -> Int64[np.ndarray, " num_images"]:
    if all(isinstance(each, int) and abs(each) < 2**63 for each in ids):
        return np.array(ids, np.int64)
    return np.arange(1, len(ids) + 1)


def _first_repeated(ids: Sequence[Any]) -> Any:
    seen = set()
    return next(each for each in ids if each in seen or seen.add(each))  # type: ignore[func-returns-value]


def _size(image: dict[str, Any]) -> tuple[int, int]:
    return _side(image.get("height")), _side(image.get("width"))


def _side(found: object) -> int:
    return int(found) if isinstance(found, int | float) and 0 < found < 2**31 else 0


def _file_name(path: Path, image: dict[str, Any]) -> str:
    name = image.get("file_name")
    if name is None and image.get("coco_url"):
        # LVIS mixes images of COCO's parts: .../train2017/000000391895.jpg
        name = "/".join(str(image["coco_url"]).split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise UniclError(f"{path}: image {image['id']!r} has no file_name")
    try:
        os.fsencode(name)
    except ValueError as error:
        raise UniclError(f"{path}: {name!r} of image {image['id']!r} is no file name") from error
    return name


def _judged(
    images: list[dict[str, Any]], arranged: Arranged, numbers: Mapping[int, int]
) -> Judged | None:
    if not any("neg_category_ids" in image for image in images):
        return None
    absent = _pairs(images, "neg_category_ids", numbers)
    partly = _pairs(images, "not_exhaustive_category_ids", numbers)
    owners = np.repeat(np.arange(len(images)), np.diff(arranged.offsets))
    present = np.stack((owners, arranged.labels.astype(np.int64)), axis=1)
    size = max(len(numbers), 1)
    partial = np.isin(present @ [size, 1], partly @ [size, 1])
    pairs = np.concatenate((absent, present[~partial]))
    return Judged.of_pairs(*pairs.T, num_images=len(images), num_classes=size)


def _pairs(
    images: list[dict[str, Any]], key: str, numbers: Mapping[int, int]
) -> Int64[np.ndarray, "pairs 2"]:
    pairs = [
        (row, numbers[category])
        for row, image in enumerate(images)
        for category in image.get(key) or ()
        if category in numbers
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)
