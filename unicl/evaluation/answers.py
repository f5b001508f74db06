"""What images were taken for, on disk: confusion and thumbnails, for a report."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from unicl.data.atomic import atomic_file
from unicl.data.augment import UndecodableImage
from unicl.data.image_sets import ImageSet
from unicl.data.shards import SampleError
from unicl.errors import UniclError
from unicl.evaluation.page import thumbnail
from unicl.evaluation.protocols import Answers

_SUFFIX = ".answers"
_THUMBNAIL = 168
# A confusion of more classes would be larger than all else, and nobody could look at it.
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class SavedExample:
    """One image, as a thumbnail, and what it was taken for."""

    image: bytes
    """A JPEG file's bytes."""
    truth: str
    """Its class."""
    guesses: tuple[tuple[str, float], ...]
    """The best classes and their probabilities, best first."""
    right: bool
    """Whether its class is the first guess."""


@dataclass(frozen=True)
class SavedAnswers:
    """What a report shows of a zero-shot classification."""

    class_names: tuple[str, ...]
    """Names of the classes."""
    confusion: Int64[np.ndarray, "num_classes num_classes"] | None
    """Images by their class and by the first guess; None where there are too many classes."""
    examples: tuple[SavedExample, ...]
    """Some named right and some named wrong."""


def save_answers(answers: Answers, images: ImageSet, stem: Path) -> None:
    """Write them beside a result."""
    counts = answers.confusion.tolist() if len(answers.class_names) <= _MOST_CLASSES else None
    fields = {
        "class_names": answers.class_names,
        "confusion": counts,
        "examples": [
            {
                "image": image,
                "truth": example.truth,
                "guesses": example.guesses,
                "right": example.right,
            }
            for example in answers.examples
            if (image := _thumbnail(images, example.index)) is not None
        ],
    }
    with atomic_file(_path(stem)) as file:
        file.write(json.dumps(fields).encode())


def load_answers(stem: Path) -> SavedAnswers | None:
    """Read what lies beside a result; None where nothing does.

    Raises:
        UniclError: the file is damaged.
    """
    path = _path(stem)
    if not path.is_file():
        return None
    try:
        return _answers(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UniclError(f"{path} is damaged; delete it, or evaluate anew") from error


def _answers(fields: Mapping[str, Any]) -> SavedAnswers:
    counts = fields["confusion"]
    num_classes = len(fields["class_names"])
    return SavedAnswers(
        tuple(fields["class_names"]),
        None if counts is None else np.array(counts, np.int64).reshape(num_classes, num_classes),
        tuple(
            SavedExample(
                base64.b64decode(example["image"]),
                example["truth"],
                tuple((name, share) for name, share in example["guesses"]),
                example["right"],
            )
            for example in fields["examples"]
        ),
    )


def _path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}{_SUFFIX}")


def _thumbnail(images: ImageSet, index: int) -> str | None:
    try:
        image = thumbnail(images.read(index).image, side=_THUMBNAIL)
    except (SampleError, UndecodableImage):
        return None
    return base64.b64encode(image).decode()
