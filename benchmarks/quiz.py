"""Composed scenes to describe and to ask about: 1 to 3 objects, no colour or shape twice.

A scene, its captions and its questions are a pure function of (seed, part, index). They are written
as shards, in the layout of VQAv2, and in that of COCO's captions in Karpathy's splits.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.motion import COLOURS
from benchmarks.scenes import SHAPES, paint_shapes
from unicl.data.emoji_scenes import Scene, encode, make_generator
from unicl.data.shards import ShardWriter

SIDE = 64
MOST = 3
"""Objects in a scene, at most."""
QUESTION_TYPES = {"colour": "other", "shape": "other", "existence": "yes/no", "count": "number"}
"""What is asked of each scene, and the `answer_type` that VQAv2 has for it."""

_RADII = (9.0, 13.0)
_NUM_ANSWERS = 10
_SAMPLES_PER_SHARD = 256
_OBJECT = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
# The decoder of a tokenizer may leave a space before the comma.
_CAPTION = re.compile(rf"{_OBJECT}(?:(?: ?, {_OBJECT})? and {_OBJECT})?")

_Objects = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer."""

    type: str
    """One of `QUESTION_TYPES`."""
    text: str
    answer: str


@dataclass(frozen=True)
class Quiz:
    """A scene with what may be said and asked about it."""

    scene: Scene
    captions: tuple[str, str]
    """Both name all objects; they differ in the order, unless there is but one object."""
    questions: tuple[Question, ...]
    """One of each type, in random order."""

    @property
    def objects(self) -> tuple[tuple[str, str], ...]:
        """Return the colour and the shape of each object."""
        return _objects(self.scene)


def _objects(scene: Scene) -> tuple[tuple[str, str], ...]:
    return tuple((colour, shape) for colour, shape in map(str.split, scene.names))


def draw_quiz(seed: int, part: str, index: int) -> Quiz:
    """Compose a scene, two captions and a question of each type; each part has its own scenes."""
    rng = make_generator(seed, f"quiz {part}", index)
    count = int(rng.integers(1, MOST, endpoint=True))
    colours, shapes = (rng.permutation(words)[:count] for words in (list(COLOURS), SHAPES))
    names = [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    scene = paint_shapes(rng, names, side=SIDE, radii=_RADII)
    objects = _objects(scene)
    order = [objects[place] for place in rng.permutation(count)]
    captions = (_describe(order), _describe(order[1:] + order[:1]))
    return Quiz(scene, captions, _ask(rng, objects))


def _describe(objects: _Objects) -> str:
    """Return "a red circle, a blue square and a green cross"."""
    *others, last = (f"a {colour} {shape}" for colour, shape in objects)
    return f"{', '.join(others)} and {last}" if others else last


def _ask(rng: np.random.Generator, objects: _Objects) -> tuple[Question, ...]:
    """Ask a question of each type.

    No question tells its answer: all colours, all shapes, yes and no, and 1, 2 and 3 are as likely
    as each other whatever the text.
    """
    colour, asked_shape = _choose(rng, objects)
    asked_colour, shape = _choose(rng, objects)
    there = rng.random() < 0.5
    claim = " ".join(_choose(rng, objects) if there else _choose_absent(rng, objects))
    questions = (
        Question("colour", f"what color is the {asked_shape}?", colour),
        Question("shape", f"what shape is the {asked_colour} object?", shape),
        Question("existence", f"is there a {claim}?", "yes" if there else "no"),
        Question("count", "how many objects are there?", str(len(objects))),
    )
    return tuple(questions[place] for place in rng.permutation(len(questions)))


def _choose(rng: np.random.Generator, objects: _Objects) -> tuple[str, str]:
    return objects[int(rng.integers(len(objects)))]


def _choose_absent(rng: np.random.Generator, objects: _Objects) -> tuple[str, str]:
    """Choose an object that is not there, though its colour is, or its shape, or both."""
    colours, shapes = zip(*objects, strict=True)
    mixed = [pair for pair in product(colours, shapes) if pair not in objects]
    changed = [
        (colour, shape)
        for colour, shape in product(COLOURS, SHAPES)
        if (colour in colours) != (shape in shapes)
    ]
    # Who knows which colours and shapes there are, but not together, takes the mixed for present.
    return _choose(rng, mixed if mixed and rng.random() < 0.5 else changed)


def parse_caption(text: str) -> frozenset[tuple[str, str]] | None:
    """Return the colours and shapes a caption names; None if it is none or repeats an object."""
    if not _CAPTION.fullmatch(text):
        return None
    objects = re.findall(_OBJECT, text)
    return frozenset(objects) if len(set(objects)) == len(objects) else None


def names_all(text: str, scene: Scene) -> bool:
    """Say whether a caption names the objects of the scene and no others, in whatever order."""
    return parse_caption(text) == frozenset(_objects(scene))


def write_pairs(folder: Path, num_scenes: int, *, seed: int = 0, part: str = "train") -> Path:
    """Write shards of images, each with its first caption."""
    with ShardWriter(folder, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        for index in range(num_scenes):
            quiz = draw_quiz(seed, part, index)
            writer.write(f"{index:06d}", encode(quiz.scene.pixels), "png", quiz.captions[0])
    return folder


def write_questions(folder: Path, *, num_train: int, num_val: int, seed: int = 0) -> Path:
    """Write questions, annotations and images of both parts as VQAv2 has them.

    The numbers of images go on from `train` to `val`; those of questions contain the image's.
    """
    first = 1
    for part, count in (("train", num_train), ("val", num_val)):
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            quiz = draw_quiz(seed, part, index)
            _write_image(folder, f"{part}2014", first + index, quiz.scene)
            for place, question in enumerate(quiz.questions):
                ids = {"image_id": first + index, "question_id": 1000 * (first + index) + place}
                questions.append({**ids, "question": question.text})
                annotations.append({**ids, **_annotation(question)})
        about = {"data_type": "mscoco", "data_subtype": f"{part}2014"}
        _write_json(
            folder / f"v2_OpenEnded_mscoco_{part}2014_questions.json",
            {**about, "task_type": "Open-Ended", "questions": questions},
        )
        _write_json(
            folder / f"v2_mscoco_{part}2014_annotations.json",
            {**about, "annotations": annotations},
        )
        first += count
    return folder


def _annotation(question: Question) -> dict[str, Any]:
    return {
        "question_type": question.type,
        "answer_type": QUESTION_TYPES[question.type],
        "multiple_choice_answer": question.answer,
        # VQAv2 asked ten people; ours agree.
        "answers": [
            {"answer": question.answer, "answer_confidence": "yes", "answer_id": number}
            for number in range(1, _NUM_ANSWERS + 1)
        ],
    }


def write_captions(
    folder: Path, *, num_train: int, num_val: int, num_test: int, seed: int = 0
) -> Path:
    """Write images and captions as `open_karpathy` reads COCO; it wants the folder called `coco`.

    The scenes of `train` and `val` are those of `write_questions` with this seed.
    """
    images: list[dict[str, Any]] = []
    for part, count in (("train", num_train), ("val", num_val), ("test", num_test)):
        # COCO's own test images have no captions: Karpathy's are taken from its `val`.
        subset = "train2014" if part == "train" else "val2014"
        for index in range(count):
            quiz = draw_quiz(seed, part, index)
            images.append(
                {
                    "filepath": subset,
                    "filename": _write_image(folder, subset, len(images) + 1, quiz.scene),
                    "split": part,
                    "sentences": [{"raw": caption} for caption in quiz.captions],
                }
            )
    _write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": images})
    return folder


def _write_image(folder: Path, subset: str, number: int, scene: Scene) -> str:
    """Write an image where COCO has the one of this number; return the file's name."""
    name = f"COCO_{subset}_{number:012d}.png"
    (folder / subset).mkdir(parents=True, exist_ok=True)
    (folder / subset / name).write_bytes(encode(scene.pixels))
    return name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
