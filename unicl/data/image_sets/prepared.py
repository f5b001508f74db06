"""Prepared shards (`unicl prepare`) as a set to evaluate on, by their texts or as captions."""

from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np

from unicl.data.hash_table import TextHashTable, normalise
from unicl.data.image_sets.image_set import (
    CaptionSet,
    ClassificationSet,
    choose_split,
    require_whole,
)
from unicl.data.image_sets.images import TarImages
from unicl.data.prompts import TEMPLATES
from unicl.data.shard_index import DATASET_FILE
from unicl.data.shards import SampleError, ShardSet
from unicl.errors import UsageError

# As recipes have it unless they say otherwise: what is evaluated here was mostly trained so.
_SHORT_TEXT_WORDS = 2


def prepared_parts(folder: Path) -> dict[str, Path] | None:
    """Return the folders of shards by split; a set without splits has one, called "".

    None if the folder holds no prepared shards.
    """
    if (folder / DATASET_FILE).is_file():
        return {"": folder}
    found = sorted(path.parent for path in folder.glob(f"*/{DATASET_FILE}"))
    return {path.name: path for path in found} or None


def open_prepared(folder: Path, *, split: str, kind: str | None) -> ClassificationSet | CaptionSet:
    """Open a part of a folder of prepared shards; see `opening.open_image_set`.

    As `classes`, the unique texts of all parts are the classes, in alphabetical order. As
    `captions`, images of equal content are one image with several captions.
    """
    parts = prepared_parts(folder) or {}
    if "" in parts:
        require_whole(str(folder), split)
        split = ""
    else:
        split = choose_split(str(folder), split, tuple(parts))
    shards = ShardSet.open(parts[split], strict=True)
    if kind is None:
        kind = "classes" if "classes" in shards.info else "captions"
    return (_classes if kind == "classes" else _caption_set)(folder, split, parts, shards)


def _classes(
    folder: Path, split: str, parts: dict[str, Path], shards: ShardSet
) -> ClassificationSet:
    texts = sorted({text for path in parts.values() for text in TextHashTable.load(path).texts})
    numbers = {text: number for number, text in enumerate(texts)}
    rows, targets = [], []
    skipped: Counter[str] = Counter()
    for row in range(shards.num_samples):
        try:
            number = numbers.get(normalise(_decode(shards.read_text(row))))
        except SampleError as error:
            skipped[error.reason] += 1
            continue
        if number is None:
            raise UsageError(f"a text of {folder} is not in its hash table; prepare it again")
        rows.append(row)
        targets.append(number)
    return ClassificationSet(
        name=str(folder),
        split=split,
        splits=tuple(part for part in parts if part),
        images=TarImages(shards, np.array(rows, np.int64)),
        skipped=dict(skipped),
        class_names=tuple(texts),
        templates=TEMPLATES["simple"],
        short_text_words=_SHORT_TEXT_WORDS,
        targets=np.array(targets, np.int64),
        metric="top1",
    )


def _caption_set(folder: Path, split: str, parts: dict[str, Path], shards: ShardSet) -> CaptionSet:
    captions: dict[bytes, list[str]] = {}
    rows = []
    skipped: Counter[str] = Counter()
    for row in range(shards.num_samples):
        try:
            sample = shards.read(row)
            text = normalise(_decode(sample.text))
            if not sample.image:
                raise SampleError("no image")
        except SampleError as error:
            skipped[error.reason] += 1
            continue
        content = blake2b(sample.image, digest_size=16).digest()
        if content not in captions:
            captions[content] = []
            rows.append(row)
        captions[content].append(text)
    return CaptionSet(
        name=str(folder),
        split=split,
        splits=tuple(part for part in parts if part),
        images=TarImages(shards, np.array(rows, np.int64)),
        skipped=dict(skipped),
        captions=tuple(tuple(texts) for texts in captions.values()),
    )


def _decode(text: bytes | None) -> str:
    if text is None or not text.strip():
        raise SampleError("no text")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("text is not UTF-8") from error
