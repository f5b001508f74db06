"""What a pair of towers is worth to question answering: questions about emoji."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicl.adapting import curves, train_both
from unicl.data.emoji_scenes import EMOJI, Scene, encode, make_generator, paint_emoji
from unicl.evaluation.report import Comparison, Shown
from unicl.predictor import Predictor

_SIDE, _SIZES = 48, (28, 40)
_NUM_TRAIN, _NUM_VALID, _SHOWN = 4000, 200, 6
_KEYS = {
    "task": "vqa",
    "vqa.width": "128",
    "vqa.num_layers": "2",
    "vqa.num_heads": "4",
    "vqa.dropout": "0",
    "vqa.max_text_length": "24",
    "vqa.fusion_rate": "2",
    "vqa.head_rate": "4",
    "vqa.min_answer_count": "1",
    "optimizer.learning_rate": "3e-4",
    "optimizer.weight_decay": "0.01",
    "trainer.batch_size": "64",
}


@dataclass(frozen=True)
class _Riddle:
    """A picture of an emoji, and questions about it with their answers by kind."""

    scene: Scene
    asked: tuple[tuple[str, str, str], ...]
    """Kind, question and answer."""


def demonstrate(towers: Path, folder: Path, *, steps: int) -> Comparison:
    """Train on questions with a run's towers and with random ones, about pictures that it draws.

    Args:
        towers: The run.
        folder: Everything is written below it.
        steps: Of 64 questions, from each start.
    """
    data = folder / "data"
    if not (data / "val_annotations.json").exists():
        _write(data, "train", _NUM_TRAIN, first=1)
        _write(data, "val", _NUM_VALID, first=_NUM_TRAIN + 1)
    keys = {**_KEYS, "data.train": str(data), "evaluation.data": str(data)}
    runs = train_both(keys, towers, folder, steps=steps)
    models = [Predictor.load(run) for run in runs.values()]
    shown = [_show(models, _draw("val", index), index % 3) for index in range(_SHOWN)]
    return Comparison(
        title="Question answering",
        words=f"METER's co-attention answers what something is of {len(EMOJI)} kinds of emoji, "
        f"which of two it is, and whether it is this one: {steps:,} steps of 64 questions; "
        f"measured on questions about {_NUM_VALID} other pictures.",
        metric="vqa/accuracy",
        called="VQA's accuracy",
        curves=curves(runs),
        shown=shown,
    )


def _draw(part: str, index: int) -> _Riddle:
    rng = make_generator(0, f"riddle {part}", index)
    name, other = (str(each) for each in rng.choice(EMOJI, 2, replace=False))
    scene = paint_emoji(rng, [name], side=_SIDE, sizes=_SIZES)
    pair = (name, other) if rng.random() < 0.5 else (other, name)
    claimed = name if rng.random() < 0.5 else other
    return _Riddle(
        scene,
        (
            ("name", "what is this?", name),
            ("choice", f"is this the {pair[0]} or the {pair[1]}?", name),
            ("claim", f"is this the {claimed}?", "yes" if claimed == name else "no"),
        ),
    )


def _write(folder: Path, part: str, count: int, *, first: int) -> None:
    """Write scenes and questions as VQAv2's files have them; the annotations come last."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        riddle, image = _draw(part, index), first + index
        (folder / part / f"{image:012d}.png").write_bytes(encode(riddle.scene.pixels))
        for number, (kind, question, answer) in enumerate(riddle.asked):
            ids = {"image_id": image, "question_id": 10 * image + number}
            questions.append({**ids, "question": question})
            people = [{"answer": answer, "answer_id": n} for n in range(1, 11)]
            annotations.append(
                {
                    **ids,
                    "question_type": kind,
                    "answer_type": "yes/no" if kind == "claim" else "other",
                    "multiple_choice_answer": answer,
                    "answers": people,
                }
            )
    for name, rows in (("questions", questions), ("annotations", annotations)):
        (folder / f"{part}_{name}.json").write_text(json.dumps({name: rows}), encoding="utf-8")


def _show(models: Sequence[Predictor], riddle: _Riddle, number: int) -> Shown:
    _, question, answer = riddle.asked[number]
    found: list[tuple[None, str, bool]] = []
    for model in models:
        ((said, _),) = model.answer(riddle.scene.pixels, question, top_k=1)
        found.append((None, said, said == answer))
    return Shown(text=question, image=encode(riddle.scene.pixels), found=found)
