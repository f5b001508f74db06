"""Flickr30k and COCO in the splits of Karpathy and Fei-Fei, for retrieval (Florence 3.5)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicl.data.image_sets.image_set import CaptionSet, MissingSetError, choose_split
from unicl.data.image_sets.images import ImageFiles
from unicl.errors import UniclError

# Of a few images of COCO there are six or seven captions; the papers take the first five.
_CAPTIONS = 5
_SPLITS_ORIGIN = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


@dataclass(frozen=True)
class _KarpathySet:
    splits_file: str
    folder: str
    """Of the images, where the splits' file names none for each image."""
    origin: str
    parts: dict[str, tuple[str, ...]]
    """What the splits' file calls the images of each of our splits."""


KARPATHY_SETS = {
    "flickr30k": _KarpathySet(
        "dataset_flickr30k.json",
        "flickr30k-images",
        "https://shannon.cs.illinois.edu/DenotationGraph/",
        {"train": ("train",), "val": ("val",), "test": ("test",)},
    ),
    "coco": _KarpathySet(
        "dataset_coco.json",
        "val2014",
        "http://images.cocodataset.org/zips/ (train2014.zip, val2014.zip)",
        # The images of COCO's validation set that Karpathy keeps for neither are trained on.
        {"train": ("train", "restval"), "val": ("val",), "test": ("test",)},
    ),
}


def open_karpathy(name: str, *, split: str, root: Path) -> CaptionSet:
    """Open a split of Flickr30k (test: 1,000 images) or COCO (5,000); see `open_image_set`.

    Each image has its first five captions.
    """
    karpathy = KARPATHY_SETS[name]
    split = choose_split(name, split, tuple(karpathy.parts))
    folder = root / name
    path = folder / karpathy.splits_file
    try:
        images = json.loads(path.read_bytes())["images"]
        chosen = [image for image in images if image["split"] in karpathy.parts[split]]
        names = [
            f"{image.get('filepath', karpathy.folder)}/{image['filename']}" for image in chosen
        ]
        captions = tuple(_captions(image) for image in chosen)
    except FileNotFoundError as error:
        raise MissingSetError(
            f"{name} needs {path.name} in {folder}; it can be had by hand only: {_SPLITS_ORIGIN}"
        ) from error
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UniclError(f"{path} is damaged; unpack it again from {_SPLITS_ORIGIN}") from error
    missing = sorted({each.rpartition("/")[0] for each in names})
    missing = [each for each in missing if not (folder / each).is_dir()]
    if missing:
        raise MissingSetError(
            f"{name} needs {', '.join(missing)} in {folder}; its images can be had by hand only: "
            f"{karpathy.origin}"
        )
    return CaptionSet(
        name=name,
        split=split,
        splits=tuple(karpathy.parts),
        images=ImageFiles(folder, names),
        captions=captions,
    )


def _captions(image: dict[str, Any]) -> tuple[str, ...]:
    return tuple(sentence["raw"].strip() for sentence in image["sentences"][:_CAPTIONS])
