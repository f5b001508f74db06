"""Folders in YOLO's format: data.yaml, and a text file of boxes per image."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int32

from adapters.detection.box_table import NOT_FOUR_NUMBERS, UNREAD_IMAGE, BoxTable
from adapters.detection.detection_set import DetectionSet, ListedFiles
from adapters.detection.image_sizes import read_sizes
from unicl.data.image_sets.image_set import choose_split
from unicl.data.shard_index import IMAGE_EXTENSIONS
from unicl.data.sources import class_name
from unicl.errors import UniclError, UsageError

_PARTS = ("train", "val", "test")


def find_yaml(folder: Path) -> Path | None:
    """Return the file that describes a folder in YOLO's format, if it has one."""
    named = [folder / name for name in ("data.yaml", "data.yml", "dataset.yaml")]
    others = sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))
    return next((path for path in (*named, *others) if path.is_file() and _is_yolo(path)), None)


def open_yolo(path: Path, *, name: str, split: str) -> DetectionSet:
    """Open a part of what a data.yaml describes.

    A part is a folder of images, a list of images, or several of both. The boxes of
    `.../images/a.jpg` are in `.../labels/a.txt`, or beside it: `class cx cy width height` in shares
    of the image's sides, or `class x y x y x y ...`, a polygon, of which the box is taken. An image
    without such a file has no objects. Image ids are numbers from 1 on, category ids YOLO's
    numbers. The sizes are read out of the images.

    Raises:
        UsageError: There is no such part, it has no images, or there are boxes and none can be
            used.
        UniclError: A file is damaged.
    """
    content = _read_yaml(path)
    names = _class_names(path, content)
    named = {**content, "val": content.get("val") or content.get("valid")}
    parts = {part: named[part] for part in _PARTS if named.get(part)}
    split = choose_split(name, split, tuple(parts))
    start = _start(path, content)
    images = _images(path, start, parts[split])
    folder = Path(os.path.commonpath([image.parent for image in images]))
    sizes = read_sizes(images)
    table = _boxes(images, sizes, {number: row for row, number in enumerate(names)})
    arranged = table.arrange(sizes, f"{name} ({split})")
    return DetectionSet(
        name=name,
        split=split,
        class_names=tuple(names.values()),
        category_ids=tuple(names),
        files=ListedFiles(folder, [str(image.relative_to(folder)) for image in images]),
        image_ids=np.arange(1, len(images) + 1),
        sizes=sizes,
        where=path.absolute(),
        **arranged._asdict(),
    )


def _is_yolo(path: Path) -> bool:
    try:
        content = yaml.safe_load(path.read_text("utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        # A data.yaml that is damaged shall be named when it is opened.
        return path.name.startswith("data")
    return isinstance(content, dict) and "names" in content


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UniclError(f"{path} is no YAML, or damaged: {reason}") from error
    if not isinstance(content, dict):
        raise UniclError(f"{path} describes no images in YOLO's format: it has no names")
    return content


def _class_names(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Return the names of the classes by their numbers, in order."""
    found = content.get("names")
    if isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict) or not found or not all(type(each) is int for each in found):
        raise UniclError(
            f"{path} names no classes; write names: [dog, ball], or a name for each number"
        )
    declared = content.get("nc")
    if declared not in (None, len(found)):
        raise UniclError(f"{path} has nc: {declared}, but {len(found)} names; correct one of them")
    return {number: class_name(str(found[number])) for number in sorted(found)}


def _start(path: Path, content: dict[str, Any]) -> Path:
    start = path.parent / str(content.get("path") or "")
    # The folder may have been moved, or stand for another machine's.
    return start if start.is_dir() else path.parent


def _images(path: Path, start: Path, part: object) -> list[Path]:
    found: list[Path] = []
    for each in part if isinstance(part, list) else [part]:
        place = _part(start, str(each))
        if place is None:
            raise UsageError(f"{path} names images in {each}, which is not below {start}")
        found += _listed(place) if place.is_file() else _below(place)
    if not found:
        raise UsageError(f"{path} has no images in {part}; put them there")
    return list(dict.fromkeys(found))


def _part(start: Path, named: str) -> Path | None:
    # Roboflow writes ../train/images, seen from a folder that its export does not have.
    outer = re.sub(r"^(\.\./)+", "", named)
    places = (start / named, start / outer)
    found = next((place for place in places if place.exists()), None)
    if found is not None and found.is_dir() and (found / "images").is_dir():
        return found / "images"
    return found


def _below(folder: Path) -> list[Path]:
    places = (
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
    )
    return sorted(places)


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UniclError(f"{path} is no list of images: it is no text in UTF-8") from error
    # An absolute path stays as it is.
    return [path.parent / line.strip() for line in lines if line.strip()]


def _boxes(
    images: list[Path], sizes: Int32[np.ndarray, "num_images 2"], numbers: dict[int, int]
) -> BoxTable:
    owners: list[int] = []
    labels: list[int] = []
    boxes: list[tuple[float, ...]] = []
    faults: list[int] = []
    for row, image in enumerate(images):
        for line in _lines(image):
            number, box, fault = _box(line)
            owners.append(row)
            labels.append(-1 if number is None else numbers.get(number, -1))
            boxes.append(box)
            faults.append(fault)
    owner = np.array(owners, np.int64)
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    # Without the image's size, shares of it are no box.
    unread = (sizes == 0).any(1)[owner]
    return BoxTable(
        owners=owner,
        labels=np.array(labels, np.int64),
        boxes=corners * np.tile(sizes[:, ::-1], 2)[owner],
        crowd=np.zeros(len(owner), bool),
        faults=np.where(unread, UNREAD_IMAGE, np.array(faults, np.uint8)).astype(np.uint8),
    )


def _lines(image: Path) -> list[str]:
    for path in _label_files(image):
        try:
            return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UniclError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise UniclError(f"{path} has no boxes: it is no text in UTF-8") from error
    return []


def _label_files(image: Path) -> tuple[Path, ...]:
    beside = image.with_suffix(".txt")
    inner, folder, outer = str(beside).rpartition(f"{os.sep}images{os.sep}")
    return (Path(inner, "labels", outer), beside) if folder else (beside,)


def _box(line: str) -> tuple[int | None, tuple[float, ...], int]:
    """Return the class, x1, y1, x2, y2 in shares of the image's sides, and the fault."""
    none = (0.0, 0.0, 0.0, 0.0)
    try:
        number, *values = [float(each) for each in line.split()]
    except ValueError:
        return None, none, NOT_FOUR_NUMBERS
    label = int(number) if number.is_integer() else None
    if len(values) == 4:
        x, y, width, height = values
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), 0
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[::2], values[1::2]
        return label, (min(xs), min(ys), max(xs), max(ys)), 0
    return label, none, NOT_FOUR_NUMBERS
