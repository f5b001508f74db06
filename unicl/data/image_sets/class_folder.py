"""A folder of one folder of images per class, perhaps in parts: FOLDER[/PART]/CLASS/IMAGE.

The parts are `train`, `val` and `test`. In FOLDER may lie `classnames.txt`, a better name per line
for the folders of classes in their order, and `templates.txt`, a prompt per line.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import make_dataset

from unicl.data.image_sets.clip_classes import DEFAULT_TEMPLATES
from unicl.data.image_sets.image_set import (
    ClassificationSet,
    ImageSet,
    choose_split,
    require_whole,
)
from unicl.data.image_sets.images import ImageFiles
from unicl.data.shard_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from unicl.data.sources import class_name, visible_folder
from unicl.errors import UsageError

_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Medium:
    """What the files of a folder are."""

    noun: str
    """What messages call one of them."""
    extensions: tuple[str, ...]
    """Of the files; others are passed over."""
    templates: tuple[str, ...]
    """The prompt ensemble where a folder has none of its own."""
    expected: str
    """Where they may lie in a set, for messages."""

    def includes(self, path: str) -> bool:
        """Say whether a path is called like such a file, and not hidden."""
        name = os.path.basename(path)
        return name.lower().endswith(self.suffixes) and not name.startswith(".")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The extensions with their dots."""
        return tuple(f".{extension}" for extension in self.extensions)


IMAGES = Medium(
    "image",
    IMAGE_EXTENSIONS,
    DEFAULT_TEMPLATES,
    "CLASS/IMAGE.jpg in it (or in train, val, test), CLIP_benchmark's test/nshards.txt, or "
    "dataset.json of prepared shards",
)


def open_class_folder(folder: Path, *, split: str, medium: Medium = IMAGES) -> ClassificationSet:
    """Open a part of a folder of class folders; see `opening.open_image_set`.

    The classes are those of all parts together, so that their numbers agree. One without images is
    a class, too: `classnames.txt` names it, and torchvision's ImageFolder numbers it.
    """
    parts = _parts(folder)
    if parts:
        split = choose_split(str(folder), split, tuple(parts))
    else:
        require_whole(str(folder), split)
    part = parts.get(split, folder)
    names = sorted({path.name for each in parts.values() or [folder] for path in _folders(each)})
    if not names:
        raise UsageError(f"{folder} is no {medium.noun} set; expected {medium.expected}")
    present = {name: number for number, name in enumerate(names) if (part / name).is_dir()}
    # torchvision refuses a part without any class.
    listed = make_dataset(part, present, None, medium.includes, allow_empty=True) if present else []
    if not listed:
        name = f"{folder} ({split})" if parts else folder
        raise UsageError(f"{name} holds no {medium.noun}s; expected {', '.join(medium.suffixes)}")
    # A fingerprint looks at each file once more, but not every command needs one, and the second
    # look is answered from memory: it takes a tenth of a second for 50,000 files.
    found = [(path, number) for path, number in listed if os.path.exists(path)]
    targets = np.array([number for _, number in found], np.int64)
    others = [path for path in parts.values() if path != part]
    absent = [names[number] for number in sorted({*range(len(names))}.difference(targets.tolist()))]
    # In one part a class may well have no image: such a class is looked for in the others.
    empty = [name for name in absent if not any(_holds(path / name, medium) for path in others)]
    return ClassificationSet(
        name=str(folder),
        split=split if parts else "",
        splits=tuple(parts),
        images=ImageFiles(part, [path.removeprefix(f"{part}{os.sep}") for path, _ in found]),
        skipped=_broken_links(len(listed) - len(found)),
        class_names=_class_names(folder, names),
        empty_classes=tuple(empty),
        templates=read_templates(folder / "templates.txt", medium.templates),
        targets=targets,
        metric="top1",
    )


def is_parted(folder: Path, medium: Medium = IMAGES) -> bool:
    """Say whether a folder holds nothing but parts of class folders, and no image beside them."""
    parts = list(_parts(folder).values())
    loose = any(medium.includes(path.name) for each in (folder, *parts) for path in each.iterdir())
    return not loose and any(_folders(part) for part in parts)


def open_loose_files(folder: Path, medium: Medium = IMAGES) -> ImageSet:
    """Open all images of a folder and of those below it, whatever they are called.

    Videos between them are counted as skipped, as are images between videos: a folder is embedded
    as one of both.

    Raises:
        UsageError: There is no image.
    """
    paths = list(folder.rglob("*"))
    listed = [path for path in paths if medium.includes(str(path))]
    found = sorted(path.relative_to(folder) for path in listed if path.exists())
    if not listed:
        raise UsageError(f"{folder} has no {medium.noun}; expected {', '.join(medium.suffixes)}")
    names = [str(path) for path in found]
    return ImageSet(
        name=str(folder),
        split="",
        splits=(),
        images=ImageFiles(folder, names),
        skipped={**_broken_links(len(listed) - len(found)), **_others(paths, medium)},
    )


def _others(paths: Iterable[Path], medium: Medium) -> dict[str, int]:
    either = replace(medium, extensions=(*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
    count = sum(either.includes(str(path)) and not medium.includes(str(path)) for path in paths)
    return {f"no {medium.noun}": count} if count else {}


def _broken_links(count: int) -> dict[str, int]:
    return {"broken link": count} if count else {}


def _holds(folder: Path, medium: Medium) -> bool:
    below = os.walk(folder, followlinks=True)
    return any(medium.includes(name) for _, _, names in below for name in names)


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the parts by split; none if there is any other folder beside them."""
    found = {path.name for path in _folders(folder)}
    # A class may well be called "train".
    if not found or not found <= set(_PARTS):
        return {}
    return {name: folder / name for name in _PARTS if name in found}


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if visible_folder(path)]
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def _class_names(folder: Path, names: list[str]) -> tuple[str, ...]:
    path = folder / "classnames.txt"
    given = read_class_names(path)
    if given is None:
        return tuple(class_name(name) for name in names)
    if len(given) != len(names):
        raise UsageError(f"{path} has {len(given)} names for {len(names)} folders of classes")
    return given


def read_class_names(path: Path) -> tuple[str, ...] | None:
    """Read names of classes, one a line; None if there is no such file.

    Raises:
        UsageError: A line without a name stands before one with a name.
    """
    lines = read_lines(path)
    if lines is None:
        return None
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:  # left out, it would give every later class the name of the one before
        raise UsageError(
            f"{path} has no name in line {lines.index('') + 1}; write one, or remove it"
        )
    return tuple(lines)


def read_templates(path: Path, default: tuple[str, ...] = DEFAULT_TEMPLATES) -> tuple[str, ...]:
    """Read prompt templates, one a line, with `{}` or CLIP_benchmark's `{c}` for the class.

    Without such a file it is the default.

    Raises:
        UsageError: A template has no single place for the class, or there are none.
    """
    lines = read_lines(path)
    if lines is None:
        return default
    templates = tuple(line.replace("{c}", "{}") for line in lines if line)
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(f"{path}: {template!r} must have {{}} once, for the class name")
    if not templates:
        raise UsageError(f"{path} has no templates; remove it or write one a line")
    return templates


def read_lines(path: Path) -> list[str] | None:
    """Read the lines of a file, stripped; None if there is no such file.

    Raises:
        UsageError: It is not UTF-8 text, or cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8; save it as one") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def images_below(folder: Path) -> list[Path]:
    """Return the paths of all images anywhere below a folder, relative to it.

    Raises:
        UsageError: There is none.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = sorted(path for path in paths if IMAGES.includes(str(path)))
    if not found:
        raise UsageError(f"{folder} has no image; expected {', '.join(IMAGES.suffixes)}")
    return found
