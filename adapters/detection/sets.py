"""Sets of images with boxes, opened by what a person would type (Florence 2.4, 3.6)."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from adapters.detection.coco import open_coco
from adapters.detection.detection_set import Annotations, DetectionSet, Judged
from adapters.detection.open_images import find_tables, open_open_images
from adapters.detection.vocabulary import Vocabulary
from adapters.detection.yolo import find_yaml, open_yolo
from unicl.data.image_sets import MissingSetError
from unicl.data.image_sets.image_set import choose_split
from unicl.data.sources import visible_folder
from unicl.errors import UsageError

__all__ = ["KNOWN_SETS", "Annotations", "DetectionSet", "Judged", "KnownSet", "open_detection_set"]

logger = logging.getLogger("unicl")

_SPLITS = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
# Of a folder's part, in this order; ODinW's are without the super category.
_OWN_NAMES = ("annotations_without_background.json", "_annotations.coco.json")
# What lies beside the boxes in COCO's folder, and excerpts in ODinW's.
_OTHER_FILES = re.compile(r"captions|keypoints|image_info|stuff|panoptic|fewshot|results")
_EXPECTED = (
    "train, valid and test with _annotations.coco.json (Roboflow), annotations/instances_*.json "
    "(COCO), data.yaml (YOLO), or the JSON file itself"
)


@dataclass(frozen=True)
class KnownSet:
    """What is known of a set that has a name of its own."""

    title: str
    """As its publisher calls it."""
    origin: str
    """Where a person fetches it."""
    num_images: int
    """Of all parts with boxes."""
    num_classes: int
    """Number of classes."""


_ROBOFLOW = "https://public.roboflow.com, as COCO JSON"
KNOWN_SETS = {
    "aquarium": KnownSet("Aquarium", _ROBOFLOW, 638, 7),
    "bccd": KnownSet("BCCD", _ROBOFLOW, 364, 3),
    "chess_pieces": KnownSet("Chess Pieces", _ROBOFLOW, 292, 12),
    "mask_wearing": KnownSet("Mask Wearing", _ROBOFLOW, 149, 2),
    "oxford_pets": KnownSet("Oxford Pets", _ROBOFLOW, 3680, 37),
    "packages": KnownSet("Packages", _ROBOFLOW, 26, 1),
    "pistols": KnownSet("Pistols", _ROBOFLOW, 2986, 1),
    "pklot": KnownSet("PKLot", _ROBOFLOW, 12416, 2),
    "pothole": KnownSet("Pothole", _ROBOFLOW, 665, 1),
    "thermal": KnownSet("Thermal", _ROBOFLOW, 203, 2),
    "wildfire_smoke": KnownSet("Wildfire Smoke", _ROBOFLOW, 737, 1),
    "coco": KnownSet("COCO 2017", "https://cocodataset.org", 123_287, 80),
    "lvis": KnownSet("LVIS v1", "https://www.lvisdataset.org", 119_979, 1203),
    "objects365": KnownSet("Objects365 v2", "https://www.objects365.org", 1_822_292, 365),
    "open_images": KnownSet(
        "OpenImages v4 to v7", "https://storage.googleapis.com/openimages", 1_910_098, 600
    ),
}
"""The sets that have a name of their own, which is that of their folder; of the first eleven the
figures are Florence's (3.6)."""


def open_detection_set(spec: str, *, split: str, root: Path) -> DetectionSet:
    """Open one split of a set of images with boxes.

    Args:
        spec: A name in `KNOWN_SETS`; a JSON file in COCO's format; or a folder: of one folder per
            part, as Roboflow and ODinW have them, COCO's, LVIS's, Objects365's, YOLO's with
            data.yaml, or OpenImages' with its tables. A folder that is itself called by a known
            name is `./NAME`.
        split: `train`, `val` or `test`. Of a set with `val` and no `test` it is `val`. A JSON file,
            or a folder that has a single one, has no parts and is taken as a whole.
        root: Known sets lie in `root/NAME`, or in the one folder in it that is a set.

    Raises:
        UsageError: There is no such set, split or image, or none of its boxes can be used.
        UniclError: It is damaged.
    """
    path = _path(spec, root)
    opened = _open(path, name=spec, split=split)
    if spec not in KNOWN_SETS:
        own = f"./{path.name}" if str(path) in KNOWN_SETS else str(path)
        opened = replace(opened, name=own)
    if opened.split not in (split, ""):
        logger.info("%s has no %s part, its %s is taken", opened.name, split, opened.split)
    if opened.skipped:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in opened.skipped.items())
        logger.warning("%s: annotations are left out (%s)", opened, reasons)
    return _with_names_once(opened)


def _with_names_once(images: DetectionSet) -> DetectionSet:
    """Make one class of those that have one name: nothing could tell them apart."""
    vocabulary = Vocabulary.join([images])
    (numbers,) = vocabulary.numbers
    kept = np.unique(numbers, return_index=True)[1]
    if len(kept) == len(numbers):
        return images
    other = next(number for number in range(len(numbers)) if number not in kept)
    logger.warning(
        "%s has several classes called %r, which are taken for one: the category ids %d and %d",
        images,
        images.class_names[other],
        images.category_ids[kept[numbers[other]]],
        images.category_ids[other],
    )
    judged = images.judged
    return replace(
        images,
        class_names=tuple(images.class_names[number] for number in kept),
        category_ids=tuple(images.category_ids[number] for number in kept),
        labels=numbers[images.labels].astype(np.int32),
        judged=judged and Judged(numbers[judged.numbers].astype(np.int32), judged.offsets),
    )


def _path(spec: str, root: Path) -> Path:
    known = KNOWN_SETS.get(spec)
    if known is not None:
        if not (root / spec).is_dir():
            raise MissingSetError(
                f"{spec} needs its images and boxes in {root / spec}; fetch {known.title} by hand "
                f"from {known.origin}"
            )
        return root / spec
    if spec and Path(spec).exists():
        return Path(spec)
    near = get_close_matches(spec, KNOWN_SETS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(KNOWN_SETS)}"
    raise UsageError(f"there is no set of boxes and no file or folder {spec!r}; {hint}")


def _open(path: Path, *, name: str, split: str) -> DetectionSet:
    if path.is_file():
        if path.suffix.lower() in (".yaml", ".yml"):
            return open_yolo(path, name=name, split=split)
        return open_coco(path, name=name, split="")
    opener = _opener(path, name)
    if opener is None:
        found = {each: opened for each in _folders(path) if (opened := _inner_opener(each, name))}
        if len(found) > 1:
            raise UsageError(
                f"{path} has several sets: {', '.join(each.name for each in found)}; give one of "
                "them by its path"
            )
        if not found:
            raise UsageError(f"{path} is no set of boxes; expected {_EXPECTED}")
        (opener,) = found.values()
    return opener(split)


def _inner_opener(folder: Path, name: str) -> Callable[[str], DetectionSet] | None:
    """Look into a folder, and into the one folder in it, as ODinW's are packed."""
    opener = _opener(folder, name)
    inner = _folders(folder)
    return _opener(inner[0], name) if opener is None and len(inner) == 1 else opener


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if visible_folder(each))
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def _opener(folder: Path, name: str) -> Callable[[str], DetectionSet] | None:
    """Return what opens a split of a folder, by the files in it; None if it is no set."""
    if find_tables(folder) is not None:
        return lambda split: open_open_images(folder, name=name, split=split)
    parts = {split: path for split in _SPLITS if (path := _part_file(folder, split))}
    if parts:

        def open_part(split: str) -> DetectionSet:
            chosen = choose_split(name, split, tuple(parts))
            return open_coco(parts[chosen], name=name, split=chosen)

        return open_part
    described = find_yaml(folder)
    if described is not None:
        return lambda split: open_yolo(described, name=name, split=split)
    alone = _choose(folder, [*folder.glob("*.json")])
    if alone is not None:
        return lambda split: open_coco(alone, name=name, split="")
    return None


def _part_file(folder: Path, split: str) -> Path | None:
    """Return the JSON of a split, in the split's folder, in `annotations`, or in the folder."""
    words = _SPLITS[split]
    for word in words:
        if (found := _choose(folder / word, [*(folder / word).glob("*.json")])) is not None:
            return found
    for place in (folder / "annotations", folder):
        # train2017 is of train; trainval is of none.
        named = re.compile(rf"(^|[_.\-])({'|'.join(words)})\d*([_.\-]|$)")
        paths = [path for path in place.glob("*.json") if named.search(path.stem)]
        if (found := _choose(place, paths)) is not None:
            return found
    return None


def _choose(folder: Path, paths: list[Path]) -> Path | None:
    """Choose the file of the boxes among the JSON files of one split."""
    paths = sorted(path for path in paths if not _OTHER_FILES.search(path.name))
    for name in _OWN_NAMES:
        found = [path for path in paths if path.name.endswith(name)]
        if len(found) == 1:
            return found[0]
    # Of COCO's instances of 2014 and 2017, the new ones.
    newest = [path for path in paths if path.name.startswith("instances_")]
    paths = newest[-1:] or paths
    if len(paths) > 1:
        raise UsageError(
            f"{folder} has {len(paths)} files of boxes, such as {paths[0].name} and "
            f"{paths[1].name}; give one of them by its path"
        )
    return paths[0] if paths else None
