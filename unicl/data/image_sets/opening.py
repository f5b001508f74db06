"""Open a set of images by what a person would type."""

import logging
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from unicl.data.image_sets.class_folder import (
    is_parted,
    open_class_folder,
    open_loose_files,
)
from unicl.data.image_sets.coco_captions import is_coco_captions, open_coco_captions
from unicl.data.image_sets.digits import open_digits
from unicl.data.image_sets.image_set import CaptionSet, ClassificationSet, ImageSet
from unicl.data.image_sets.karpathy import KARPATHY_SETS, open_karpathy
from unicl.data.image_sets.prepared import open_prepared, prepared_parts
from unicl.data.image_sets.public import PUBLIC_SETS, open_public
from unicl.data.image_sets.webdataset import is_webdataset, open_webdataset
from unicl.errors import UsageError

logger = logging.getLogger("unicl")

KNOWN_SETS = (*PUBLIC_SETS, *KARPATHY_SETS, "digits")
"""The sets that have a name of their own."""


def open_image_set(
    spec: str,
    *,
    split: str = "test",
    root: Path,
    download: bool = False,
    kind: Literal["classes", "captions"] | None = None,
) -> ClassificationSet | CaptionSet:
    """Open one split of a set of images to evaluate on.

    Args:
        spec: A name in `KNOWN_SETS`, or a folder: of one folder of images per class, of
            CLIP_benchmark's WebDataset tars, of prepared shards, or with COCO's files of captions.
            A folder that is itself called by a known name is `./NAME`.
        split: `train`, `val` or `test`. A folder without parts is its own `test`; of a set with
            `val` and no `test` it is `val`, as its split says.
        root: Known sets lie in `root/NAME`.
        download: Fetch a known set that is not there, where its publisher still offers it. What is
            there is neither fetched nor hashed again.
        kind: What is needed, to be refused if the set has something else. Prepared shards can be
            read as both; unset takes classes where the shards were made of classes.

    Raises:
        UsageError: There is no such set or split, its files are not there, or it is of the other
            kind.
        UniclError: It cannot be downloaded, or is damaged.
    """
    opened = _open(spec, split, root, download, kind)
    found = "captions" if isinstance(opened, CaptionSet) else "classes"
    if kind not in (None, found):
        raise UsageError(f"{spec} has {found}, but {kind} are needed; choose another set")
    if opened.split not in (split, ""):
        logger.info("%s has no %s part, its %s is taken", opened.name, split, opened.split)
    return opened


def open_images(spec: str, *, split: str = "test", root: Path, download: bool = False) -> ImageSet:
    """Open images without asking for classes or captions: a set, or any folder of images.

    Class folders are taken as a set where they lie in parts; without, they may as well be albums.

    Args:
        spec: As in `open_image_set`, or a folder with images anywhere below it.
        split: As in `open_image_set`.
        root: As in `open_image_set`.
        download: As in `open_image_set`.

    Raises:
        UsageError: There is no such set or folder, or no image in it.
        UniclError: It cannot be downloaded, or is damaged.
    """
    folder = Path(spec)
    known = spec in KNOWN_SETS or not folder.is_dir()
    if known or prepared_parts(folder) is not None or is_webdataset(folder) or is_parted(folder):
        return open_image_set(spec, split=split, root=root, download=download)
    opened = open_loose_files(folder)
    return replace(opened, name=_own_name(opened.name))


def _open(
    spec: str, split: str, root: Path, download: bool, kind: str | None
) -> ClassificationSet | CaptionSet:
    if spec in PUBLIC_SETS:
        return open_public(spec, split=split, root=root, download=download)
    if spec in KARPATHY_SETS:
        return open_karpathy(spec, split=split, root=root)
    if spec == "digits":
        return open_digits(split=split)
    folder = Path(spec)
    if not spec or not folder.is_dir():
        near = get_close_matches(spec, KNOWN_SETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(KNOWN_SETS)}"
        raise UsageError(f"there is no image set and no folder {spec!r}; {hint}")
    opened: ClassificationSet | CaptionSet
    if prepared_parts(folder) is not None:
        opened = open_prepared(folder, split=split, kind=kind)
    elif is_webdataset(folder):
        opened = open_webdataset(folder, split=split)
    elif is_coco_captions(folder):
        opened = open_coco_captions(folder, split=split)
    else:
        opened = open_class_folder(folder, split=split)
    return replace(opened, name=_own_name(opened.name))


def _own_name(name: str) -> str:
    """Tell a folder that is called like a known set from that set."""
    return f"./{name}" if name in KNOWN_SETS else name
