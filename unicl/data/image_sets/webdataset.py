"""CLIP_benchmark's layout of WebDataset tars: FOLDER/SPLIT/0.tar ..., SPLIT/nshards.txt.

In FOLDER lie `classnames.txt` and `zeroshot_classification_templates.txt`, and `dataset_type.txt`
if it holds captions (`retrieval`) or several classes per image (`multilabel`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from unicl.data.image_sets.class_folder import read_lines, read_templates
from unicl.data.image_sets.image_set import CaptionSet, ClassificationSet, Metric, choose_split
from unicl.data.image_sets.images import TarImages
from unicl.data.shard_index import (
    IMAGE_EXTENSIONS,
    MISSING,
    Members,
    Shard,
    ShardIndex,
    tar_samples,
)
from unicl.data.shards import ShardSet
from unicl.errors import UniclError, UsageError

_COUNT_FILE = "nshards.txt"
# The member that holds a sample's label, by the type of the data set.
_LABELS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


def is_webdataset(folder: Path) -> bool:
    """Say whether a folder is of CLIP_benchmark's layout."""
    return bool(_splits(folder))


def open_webdataset(folder: Path, *, split: str) -> ClassificationSet | CaptionSet:
    """Open a split of a folder of tars; see `opening.open_image_set`.

    The headers of all tars are read once, the images when they are needed.
    """
    splits = _splits(folder)
    split = choose_split(str(folder), split, splits)
    kind = " ".join(read_lines(folder / "dataset_type.txt") or ["classification"]).lower()
    if kind not in _LABELS:
        raise UsageError(f"{folder / 'dataset_type.txt'} says {kind!r}, not {' or '.join(_LABELS)}")
    scanned = _scan(folder / split, _LABELS[kind])
    shared: dict[str, Any] = {
        "name": str(folder),
        "split": split,
        "splits": splits,
        "images": TarImages(scanned.tars, np.array(scanned.rows, np.int64)),
        "skipped": dict(scanned.skipped),
    }
    if kind == "retrieval":
        return CaptionSet(**shared, captions=tuple(_captions(label) for label in scanned.labels))
    names = read_lines(folder / "classnames.txt")
    if not names:
        raise UsageError(f"{folder} lacks classnames.txt with a class name per line")
    try:
        targets, metric = _targets(scanned.labels, kind, len(names))
    except ValueError as error:
        raise UniclError(f"{folder / split} is not of {len(names)} classes: {error}") from error
    return ClassificationSet(
        **shared,
        class_names=tuple(names),
        templates=read_templates(folder / "zeroshot_classification_templates.txt"),
        targets=targets,
        metric=metric,
    )


def _splits(folder: Path) -> tuple[str, ...]:
    found = {path.parent.name for path in folder.glob(f"*/{_COUNT_FILE}")}
    return tuple(sorted(found, key=lambda name: (_ORDER.get(name, len(_ORDER)), name)))


_ORDER = {"train": 0, "val": 1, "test": 2}


class _IndexedTars(ShardSet):
    """Tars without an index on disk: theirs are in memory."""

    def __init__(self, folder: Path, shards: list[Shard], indices: list[ShardIndex]) -> None:
        super().__init__(folder, shards, {})
        self._built = indices

    def _load_index(self, shard: int) -> ShardIndex:
        return self._built[shard]


@dataclass(frozen=True)
class _Scanned:
    tars: ShardSet
    rows: list[int]
    """The samples that have an image and a label."""
    labels: list[bytes]
    """Their labels."""
    skipped: Counter[str]


def _scan(folder: Path, extension: str) -> _Scanned:
    """Read the headers of all tars, and the labels."""
    shards, indices = [], []
    labels: list[bytes] = []
    rows: list[int] = []
    skipped: Counter[str] = Counter()
    num_samples = 0
    for number in range(_num_tars(folder)):
        path = folder / f"{number}.tar"
        samples, places = _samples(path, extension)
        for row, (sample, label) in enumerate(zip(samples, _read(path, places), strict=True)):
            if sample.image == MISSING or not label.strip():
                skipped["no image" if sample.image == MISSING else "no label"] += 1
            else:
                rows.append(num_samples + row)
                labels.append(label)
        num_samples += len(samples)
        shards.append(Shard(path.name, len(samples), path.stat().st_size))
        indices.append(ShardIndex.of(samples))
    return _Scanned(_IndexedTars(folder, shards, indices), rows, labels, skipped)


def _samples(path: Path, extension: str) -> tuple[list[Members], list[tuple[int, int]]]:
    """List a tar's samples, and where the label of each lies."""
    samples, places = [], []
    for sample in tar_samples(path):
        if sample is None:
            raise UniclError(f"{path} is cut short; download it again")
        key, found = sample
        image = next((found[name] for name in IMAGE_EXTENSIONS if name in found), MISSING)
        samples.append(Members(key, image, MISSING))
        places.append(found.get(extension, MISSING))
    return samples, places


def _read(path: Path, places: list[tuple[int, int]]) -> Iterator[bytes]:
    """Go through parts of a file; what is missing is empty."""
    with open(path, "rb") as file:
        for place in places:
            if place == MISSING:
                yield b""
                continue
            start, size = place
            file.seek(start)
            yield file.read(size)


def _num_tars(folder: Path) -> int:
    path = folder / _COUNT_FILE
    lines = read_lines(path) or [""]
    if not lines[0].isdecimal():
        raise UniclError(f"{path} holds no number of tars; download it again")
    return int(lines[0])


def _captions(text: bytes) -> tuple[str, ...]:
    lines = (line.strip() for line in text.decode("utf-8", "replace").splitlines())
    return tuple(line for line in lines if line)


def _targets(labels: list[bytes], kind: str, num_classes: int) -> tuple[np.ndarray, Metric]:
    if kind == "classification":
        numbers = np.array([int(label) for label in labels], np.int64)
        wrong = numbers[(numbers < 0) | (numbers >= num_classes)]
        if len(wrong):
            raise ValueError(f"a label is {wrong[0]}")
        return numbers, "top1"
    rows = [np.load(BytesIO(label), allow_pickle=False) for label in labels]
    wrong_shape = next((row.shape for row in rows if row.shape != (num_classes,)), None)
    if wrong_shape is not None:
        raise ValueError(f"a label is of shape {wrong_shape}")
    return np.array(rows).reshape(-1, num_classes) > 0, "map"
