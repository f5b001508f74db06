"""Does co-attention learn to answer and to speak, and is it for what it was pretrained with?

The scenes of `benchmarks.quiz`: towers learn captions, co-attention matching and hidden words, then
questions and captions. Every stage is gated on its steps.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

import unicl
from adapters.vqa.answers import measure as vqa_accuracy
from adapters.vqa.data import eval_loader, open_questions
from adapters.vqa.pretrained import Reader, reader_of
from adapters.vqa.question_samples import QuestionSamples
from adapters.vqa.watching import answer_all
from benchmarks import quiz
from benchmarks.motion import COLOURS
from benchmarks.record import Bar, Result
from benchmarks.scenes import SHAPES
from cosswin.variants import coswin_nano
from unicl.config import parse_recipe
from unicl.data.augment import open_image
from unicl.data.emoji_scenes import encode
from unicl.data.reader import ImageDecoder
from unicl.engine.metrics import read_metrics
from unicl.evaluation.embeddings import evaluating
from unicl.models import load

_TOWERS = {
    "embed_dim": "64",
    "image_tower.model": "quiz_coswin",
    "image_tower.image_size": str(quiz.SIDE),
    "text_tower.width": "128",
    "text_tower.num_layers": "2",
    "text_tower.num_heads": "4",
    "text_tower.context_length": "24",
    "text_tower.causal": "false",
}
_TRAINING = {
    "data.templates": "none",
    "data.crop_scale": "1,1",
    "data.crop_ratio": "1,1",
    "data.num_workers": "0",
    "optimizer.weight_decay": "0.01",
    "trainer.batch_size": "64",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.log_every": "100",
}
_FUSION = {
    "task": "vqa",
    "vqa.width": "128",
    "vqa.num_layers": "2",
    "vqa.num_heads": "4",
    "vqa.dropout": "0",
    "vqa.max_text_length": "24",
    "optimizer.learning_rate": "2e-4",
    "schedule.warmup_steps": "50",
}


_STEPS = {"towers": 1800, "pretraining": 600, "answers": 1400, "captions": 600}
_HELD_OUT = 500


def measure(*, quick: bool, run: Path | None = None) -> Result:
    """Train every stage, and the answers from nothing, too; about 40 minutes of one thread.

    Args:
        quick: The smallest sizes.
        run: Folder of the runs, which go on where they stopped; unset keeps none.
    """
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        return _measure(run, quick=quick)
    with tempfile.TemporaryDirectory() as name:
        return _measure(Path(name), quick=quick)


def _measure(folder: Path, *, quick: bool) -> Result:
    steps = {name: 2 for name in _STEPS} if quick else _STEPS
    scenes, held_out = (16, 4) if quick else (16_000, _HELD_OUT)
    _write(folder, scenes, held_out)
    towers = train_towers(folder, steps["towers"])
    pretrained = pretrain(folder, towers, steps["pretraining"])
    answers = train_answers(folder, "answers", pretrained, steps["answers"])
    scratch = train_answers(folder, "scratch", None, steps["answers"])
    captions = train_captions(folder, pretrained, steps["captions"])
    matched, words = attributes_in_context(pretrained, held_out)
    right = vqa_by_type(answers, folder)
    blind = vqa_by_type(answers, folder, blind=True)["accuracy"]
    from_nothing = vqa_by_type(scratch, folder)
    named = captions_right(captions, held_out)
    curves = {path.name: _curve(path) for path in (answers, scratch)}
    matching = _last(pretrained)["matching/accuracy"]
    types = {f"type/{kind}": kind for kind in quiz.QUESTION_TYPES}
    gain = right["accuracy"] - from_nothing["accuracy"]
    return Result(
        bars=[
            _share("VQA accuracy, 1,400 steps", right["accuracy"], 0.9),
            *(_share(f"of it, {kind}", right[key], 0.85) for key, kind in types.items()),
            _share("image-text matching, 600 steps, texts at random", matching, 0.9),
            _share("one attribute changed, told from the right one", matched, None),
            _share("hidden words that the image tells", words, 0.75),
            _share("blind: image zeroed", blind, 0.4, "at most"),
            _share("pretrained over scratch at equal steps", gain, 0.1),
            _share("captions that name all colours and shapes", named, 0.8),
        ],
        tables={
            "VQA accuracy by type": [
                {"start": start, **{kind: f"{found[key]:.1%}" for key, kind in types.items()}}
                for start, found in (("pretrained", right), ("from nothing", from_nothing))
            ],
            "VQA accuracy by steps": [
                {"step": step, **{name: f"{curve[step]:.1%}" for name, curve in curves.items()}}
                for step in curves["answers"]
            ],
        },
        facts={"steps": steps, "scenes": scenes, "held_out": held_out},
    )


@register_model
def quiz_coswin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin of three stages: 16 tokens of an image of 64 pixels."""
    sizes = {"depths": (1, 2, 2), "num_heads": (1, 2, 4), "window_size": 4}
    return coswin_nano(pretrained, **{**sizes, **kwargs})


def _write(folder: Path, scenes: int, held_out: int) -> None:
    if not (folder / "questions").exists():
        quiz.write_pairs(folder / "pairs", scenes)
        quiz.write_pairs(folder / "held_out", held_out, part="val")
        quiz.write_questions(folder / "questions", num_train=scenes, num_val=held_out)


def train_towers(folder: Path, steps: int) -> Path:
    """Train two towers on captions of scenes."""
    keys = {
        **_TOWERS,
        **_TRAINING,
        "data.train": str(folder / "pairs"),
        # Of few captions colours alone tell most apart; of more, shapes must, too.
        "trainer.batch_size": "128",
        "optimizer.learning_rate": "1.5e-3",
        "schedule.warmup_steps": "100",
        "trainer.steps": str(steps),
    }
    return unicl.train(parse_recipe("", keys), folder / "towers").path


def pretrain(folder: Path, towers: Path, steps: int) -> Path:
    """Pretrain co-attention on the same captions."""
    return _train(
        folder / "pretrained",
        {
            "vqa.objective": "pretraining",
            "vqa.head_rate": "5",
            "vqa.negative_pool": "32",
            "vqa.mask_share": "0.25",
            "weights": str(towers),
            "data.train": str(folder / "pairs"),
            "evaluation.data": str(folder / "held_out"),
        },
        steps,
    )


def train_answers(folder: Path, name: str, weights: Path | None, steps: int) -> Path:
    """Train on questions, from the weights of a run, or from nothing at all."""
    data = str(folder / "questions")
    keys = {
        "vqa.fusion_rate": "2",
        "vqa.head_rate": "4",
        "data.train": data,
        "evaluation.data": data,
        "trainer.eval_every": "200",
    }
    start = _TOWERS if weights is None else {"weights": str(weights)}
    return _train(folder / name, {**keys, **start}, steps)


def train_captions(folder: Path, weights: Path, steps: int) -> Path:
    """Train on captions word by word."""
    keys = {
        "vqa.objective": "captions",
        "vqa.head_rate": "5",
        "data.train": str(folder / "pairs"),
        "weights": str(weights),
    }
    return _train(folder / "captions", keys, steps)


def _train(run: Path, keys: Mapping[str, str], steps: int) -> Path:
    whole = {**_TRAINING, **_FUSION, "trainer.steps": str(steps), **keys}
    return unicl.train(parse_recipe("", whole), run).path


def vqa_by_type(run: Path, folder: Path, *, blind: bool = False) -> dict[str, float]:
    """Return VQA's accuracy on held-out scenes, by type; blind: every image is black."""
    reader = reader_of(load(run), "answers")
    questions = open_questions(str(folder / "questions"), "val")

    def transform(image: Any, seed: int) -> Tensor:
        return reader.transform(image, seed) * (0 if blind else 1)

    loader = eval_loader(
        QuestionSamples(questions),
        reader.tokens,
        decode=ImageDecoder(transform, 1 << 20),
        batch_size=256,
        num_workers=0,
        max_skipped_share=0.0,
    )
    said = answer_all(reader.model, loader, questions, reader.config.answers)
    return vqa_accuracy(said, questions)


def attributes_in_context(run: Path, held_out: int) -> tuple[float, float]:
    """Return how often a caption is told from one with a wrong word, and a hidden word guessed.

    The word is the colour or the shape of one object; the wrong one is of none in the scene.
    """
    reader = reader_of(load(run), "pretraining")
    told = guessed = 0
    for index in range(held_out):
        drawn = quiz.draw_quiz(0, "val", index)
        image = _seen(reader, drawn)
        caption, place = drawn.captions[0], index % (2 * len(drawn.objects))
        kind = place % 2
        right = drawn.objects[place // 2][kind]
        taken = {each[kind] for each in drawn.objects}
        words = [word for word in ((*COLOURS,), SHAPES)[kind] if word not in taken]
        wrong = caption.replace(right, words[index % len(words)])
        with evaluating(reader.model):
            own, other = reader.model.match(
                image.expand(2, -1, -1), reader.tokens([caption, wrong])
            )
            told += int(own > other)
            guessed += _guess(reader, image, caption, right) == right
    return told / held_out, guessed / held_out


def _guess(reader: Reader, image: Tensor, caption: str, word: str) -> str:
    tokens = reader.tokens([caption])
    (sought,) = (reader.tokens([word])[0, 1:2]).tolist()
    place = int((tokens[0] == sought).nonzero()[0, 0])
    tokens[0, place] = -1
    logits = reader.model.heads["words"](reader.model.fuse(image, tokens).text[0, place])
    return reader.tokens.decode([int(logits.argmax())])


def captions_right(run: Path, held_out: int) -> float:
    """Return the share of captions that name every object, and none besides."""
    reader = reader_of(load(run), "captions")
    drawn = [quiz.draw_quiz(0, "val", index) for index in range(held_out)]
    right = [
        quiz.names_all(reader.caption(open_image(encode(each.scene.pixels))), each.scene)
        for each in drawn
    ]
    return sum(right) / held_out


def _seen(reader: Reader, drawn: quiz.Quiz) -> Tensor:
    pixels = reader.transform(open_image(encode(drawn.scene.pixels)), 0)
    with torch.no_grad():
        return reader.model.look(pixels[None])


def _curve(run: Path) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {int(row["step"]): row["vqa/accuracy"] for row in rows if "vqa/accuracy" in row}


def _last(run: Path) -> dict[str, float]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "matching/accuracy" in row][-1]


def _share(what: str, measured: float, limit: float | None, better: Any = "at least") -> Bar:
    return Bar(what, 100 * measured, None if limit is None else 100 * limit, "%", better)
