"""Captions in COCO's own format: captions_train2014.json beside the images (Chen et al. 2015)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl.data.image_sets.image_set import CaptionSet, choose_split
from unicl.data.image_sets.images import ImageFiles
from unicl.errors import UniclError, UsageError

_PARTS = ("train", "val", "test")


def is_coco_captions(folder: Path) -> bool:
    """Say whether a folder has captions in COCO's format."""
    return bool(_find_parts(folder))


def open_coco_captions(folder: Path, *, split: str) -> CaptionSet:
    """Open a part of a set of captions; see `open_image_set`.

    Its file is captions_PART*.json, in the folder or in `annotations`; the images lie in a folder
    called by the rest of its name (train2014), in `images`, or beside it.

    Raises:
        UsageError: There is no such part, or its images are not there.
        UniclError: The file is damaged.
    """
    parts = _find_parts(folder)
    split = choose_split(str(folder), split, tuple(parts))
    path = parts[split]
    try:
        content = json.loads(path.read_bytes())
        names = {_number(each["id"]): _text(each["file_name"]) for each in content["images"]}
        said = [
            (_number(each["image_id"]), _text(each["caption"]).strip())
            for each in content["annotations"]
        ]
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UniclError(
            f"{path} is no file of COCO's captions ({error}); it needs images with id and "
            "file_name, and annotations with image_id and caption"
        ) from error
    captions, skipped = _by_image(names, said)
    return CaptionSet(
        name=str(folder),
        split=split,
        splits=tuple(parts),
        images=ImageFiles(*_locate(folder, path, [names[number] for number in captions])),
        captions=tuple(map(tuple, captions.values())),
        skipped=skipped,
    )


def _find_parts(folder: Path) -> dict[str, Path]:
    files = [*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json")]
    found: dict[str, Path] = {}
    for part in _PARTS:
        own = [path for path in sorted(files) if path.stem.startswith(f"captions_{part}")]
        if len(own) > 1:
            raise UsageError(f"{folder} has both {own[0]} and {own[1]}; keep one of them there")
        found |= {part: own[0]} if own else {}
    return found


def _by_image(
    names: Mapping[int, str], said: Sequence[tuple[int, str]]
) -> tuple[dict[int, list[str]], dict[str, int]]:
    """Return the captions of each image that has some, and what is left out, counted by reason."""
    captions: dict[int, list[str]] = {number: [] for number in names}
    skipped: Counter[str] = Counter()
    for number, caption in said:
        if number not in captions:
            skipped["caption of an unknown image"] += 1
        elif not caption:
            skipped["empty caption"] += 1
        else:
            captions[number].append(caption)
    kept = {number: texts for number, texts in captions.items() if texts}
    skipped["no caption"] += len(captions) - len(kept)
    return kept, {reason: count for reason, count in skipped.items() if count}


def _locate(folder: Path, path: Path, names: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the folder of the images and their names in it."""
    places = (path.stem.removeprefix("captions_"), "images", ".")
    for place in places:
        if not names or (folder / place / names[0]).is_file():
            return folder / place, list(names)
    raise UsageError(
        f"{path} names {names[0]}, which is not in {folder / places[0]}, nor in "
        f"{folder / places[1]} or {folder}; put the images there"
    )


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
