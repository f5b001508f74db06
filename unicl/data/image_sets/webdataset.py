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

from unicl.data.image_sets.class_folder import (
    read_class_names,
    read_lines,
    read_templates,
)
from unicl.data.image_sets.image_set import CaptionSet, ClassificationSet, Metric, choose_split
from unicl.data.image_sets.images import TarImages
from unicl.data.shard_index import (
    MEDIA_EXTENSIONS,
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
    names = read_class_names(folder / "classnames.txt")
    if not names:
        raise UsageError(f"{folder} lacks classnames.txt with a class name per line")
    try:
        labels = [_decode(label, kind) for label in scanned.labels]
    except ValueError as error:
        raise UniclError(f"{folder / split} has a label that is no {kind} one: {error}") from error
    unfit = _unfit(labels, kind, len(names))
    if unfit:
        file = folder / "classnames.txt"
        raise UsageError(f"{file} names {len(names)} classes, but a label is {unfit}")
    targets, metric = _targets(labels, kind, len(names))
    return ClassificationSet(
        **shared,
        class_names=names,
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
        image = next((found[name] for name in MEDIA_EXTENSIONS if name in found), MISSING)
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


def _decode(label: bytes, kind: str) -> np.ndarray:
    if kind == "classification":
        return np.array(int(label), np.int64)
    return np.load(BytesIO(label), allow_pickle=False)


def _unfit(labels: list[np.ndarray], kind: str, num_classes: int) -> str | None:
    """Describe the first label that is not of so many classes."""
    if kind == "classification":
        return next((str(label) for label in labels if not 0 <= label < num_classes), None)
    shapes = (label.shape for label in labels)
    return next((f"of shape {shape}" for shape in shapes if shape != (num_classes,)), None)


def _targets(labels: list[np.ndarray], kind: str, num_classes: int) -> tuple[np.ndarray, Metric]:
    if kind == "classification":
        return np.array(labels, np.int64), "top1"
    return np.array(labels).reshape(-1, num_classes) > 0, "map"
