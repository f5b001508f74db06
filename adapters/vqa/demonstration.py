"""What a pair of towers is worth to question answering: questions about scenes of emoji."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicl.adapting import curves, train_both
from unicl.data.emoji_scenes import EMOJI, Scene, encode, make_generator, paint_emoji
from unicl.data.shards import ShardWriter
from unicl.evaluation.report import Comparison, Shown
from unicl.predictor import Predictor

_SIDE, _SIZES = 96, (32, 44)
_NUM_TRAIN, _NUM_VALID, _SHOWN = 4000, 200, 4
# Nothing is right or left of what stands straight above it.
_LEAST_APART = 12
_SCENES_PER_SHARD = 500
_KEYS = {
    "task": "vqa",
    "image_tower.image_size": str(_SIDE),
    "vqa.width": "128",
    "vqa.num_layers": "2",
    "vqa.num_heads": "4",
    "vqa.dropout": "0",
    "vqa.max_text_length": "24",
    "optimizer.learning_rate": "3e-4",
    "optimizer.weight_decay": "0.01",
    "trainer.batch_size": "64",
}
# Negatives at random: random towers could not choose any.
_PRETRAINING = {
    "vqa.objective": "pretraining",
    "vqa.head_rate": "5",
    "vqa.mask_share": "0.25",
    "vqa.negatives": "random",
}
_ANSWERS = {"vqa.fusion_rate": "2", "vqa.head_rate": "4", "vqa.min_answer_count": "1"}


@dataclass(frozen=True)
class _Riddle:
    """A scene of two emoji, and questions about it with their answers by kind."""

    scene: Scene
    caption: str
    asked: tuple[tuple[str, str, str], ...]
    """Kind, question and answer."""


def demonstrate(towers: Path, folder: Path, *, steps: int) -> Comparison:
    """Train on questions with a run's towers and with random ones, about scenes that it draws.

    Args:
        towers: The run.
        folder: Everything is written below it.
        steps: Of matching and hidden words, and as many of questions, 64 each, from each start.
    """
    data = folder / "data"
    if not (data / "val_annotations.json").exists():
        _write_captions(data / "captions")
        _write(data, "train", _NUM_TRAIN, first=1)
        _write(data, "val", _NUM_VALID, first=_NUM_TRAIN + 1)
    learned = train_both(
        {**_KEYS, **_PRETRAINING, "data.train": str(data / "captions")},
        towers,
        folder / "matching",
        steps=steps,
    )
    keys = {**_KEYS, **_ANSWERS, "data.train": str(data), "evaluation.data": str(data)}
    runs = train_both(keys, towers, folder, steps=steps, starts=learned)
    models = [Predictor.load(run) for run in runs.values()]
    shown = [_show(models, _draw("val", index), index % 3) for index in range(_SHOWN)]
    return Comparison(
        title="Question answering",
        words="METER's co-attention answers what is on the left or right, on which side something "
        f"is, and whether it is there, of {len(EMOJI)} kinds of emoji: {steps:,} steps of 64 "
        f"captions, for matching and hidden words, and {steps:,} of 64 questions; measured on "
        f"questions about {_NUM_VALID} other scenes.",
        metric="vqa/accuracy",
        called="VQA's accuracy",
        curves=curves(runs),
        shown=shown,
    )


def _draw(part: str, index: int) -> _Riddle:
    rng = make_generator(0, f"riddle {part}", index)
    names = [str(name) for name in rng.choice(EMOJI, 3, replace=False)]
    *there, absent = names
    while True:
        scene = paint_emoji(rng, there, side=_SIDE, sizes=_SIZES)
        middles = (scene.boxes[:, 0] + scene.boxes[:, 2]) / 2
        if abs(middles[0] - middles[1]) >= _LEAST_APART:
            break
    left, right = (there[place] for place in np.argsort(middles))
    side, named = ("left", left) if rng.random() < 0.5 else ("right", right)
    claimed = there[int(rng.integers(2))] if rng.random() < 0.5 else absent
    return _Riddle(
        scene,
        f"{left} on the left and {right} on the right",
        (
            ("name", f"what is on the {side}?", named),
            ("side", f"on which side do you see the {named}?", side),
            ("existence", f"can you see the {claimed}?", "yes" if claimed in there else "no"),
        ),
    )


def _write_captions(folder: Path) -> None:
    with ShardWriter(folder, samples_per_shard=_SCENES_PER_SHARD) as writer:
        for index in range(_NUM_TRAIN):
            riddle = _draw("train", index)
            writer.write(f"{index:06d}", encode(riddle.scene.pixels), "png", riddle.caption)


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
                    "answer_type": "yes/no" if kind == "existence" else "other",
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
