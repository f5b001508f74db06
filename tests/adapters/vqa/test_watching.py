"""What a run is measured by while it learns, against its parts one by one and `unicl eval`."""

import pytest
import torch

from adapters.vqa import watching
from adapters.vqa.building import build, complete
from adapters.vqa.watching import AnswerAccuracy, CaptionQuality, PretrainingAccuracy
from tests.adapters.vqa.runs import recipe_of
from tests.unicl.ranks import on_ranks
from unicl.distributed import ALONE, Ranks
from unicl.evaluator import Options, evaluate
from unicl.models import load

DATA = {"pretraining": "pairs", "answers": "questions", "captions": "pairs"}


def evaluator_of(runs, objective, ranks=ALONE, **given):
    """Build what measures, and load the model that was trained."""
    given.setdefault("evaluation__data", str(runs / DATA[objective]))
    recipe = complete(recipe_of(runs, objective, evaluation__batch_size="5", **given))
    (evaluator,) = build(recipe, ranks, start=True).evaluators
    return evaluator, load(runs / objective).model


def test_answers_are_measured_as_by_eval(runs, tmp_path, monkeypatch):
    evaluator, model = evaluator_of(runs, "answers")
    assert isinstance(evaluator, AnswerAccuracy)
    own = Options(out=tmp_path, split="val", device="cpu", num_workers=0)
    data = [str(runs / "questions")]
    (result,) = evaluate(str(runs / "answers"), "vqa-accuracy", data, own)
    expected = {f"vqa/{name}": share for name, share in result.metrics.items()}
    assert evaluator(model) == expected
    monkeypatch.setattr(watching, "_FEW_TYPES", 3)  # the scenes have four
    few = {name: share for name, share in expected.items() if not name.startswith("vqa/type/")}
    assert evaluator(model) == few != expected


def test_captions_are_measured_as_by_eval(runs, tmp_path):
    evaluator, model = evaluator_of(runs, "captions")
    assert isinstance(evaluator, CaptionQuality)
    own = Options(out=tmp_path, device="cpu", num_workers=0)
    (result,) = evaluate(str(runs / "captions"), "vqa-captions", [str(runs / "pairs")], own)
    expected = {f"captions/{name}": value for name, value in result.metrics.items()}
    assert evaluator(model) == pytest.approx(expected)


def test_pretraining_is_measured_as_by_hand(runs):
    evaluator, model = evaluator_of(runs, "pretraining")
    assert isinstance(evaluator, PretrainingAccuracy)
    right = pairs = guessed = hidden = 0
    for batch in evaluator.loader.epoch():
        rows = evaluator.task.inputs(batch).towers["pairs"]
        for place in range(len(batch)):
            row = {name: part[place : place + 1] for name, part in rows.items()}
            with torch.no_grad():
                image = model.look(row["images"])
                right += (model.match(image, row["tokens"]) > 0).item()
                right += (model.match(image, row["others"]) < 0).item()
                states = model.fuse(image, row["hidden"]).text[0]
                sought = row["targets"][0, : len(states)]
                found = model.heads["words"](states).argmax(1)
            pairs += 1
            guessed += ((found == sought) & (sought >= 0)).sum().item()
            hidden += (sought >= 0).sum().item()
    assert pairs == 12
    assert hidden >= pairs
    assert evaluator(model) == {
        "matching/accuracy": right / (2 * pairs),
        "words/accuracy": guessed / hidden,
    }


def test_pretraining_is_measured_alike_whatever_negatives_it_has(runs):
    random, model = evaluator_of(runs, "pretraining", vqa__negative_pool="3")
    hard, _ = evaluator_of(runs, "pretraining", weights=str(runs / "towers"))
    assert random(model) == hard(model)
    assert random(model) == random(model)


def test_minival_is_measured_where_trainval_is_trained_on(runs):
    given = {"vqa__split": "trainval", "evaluation__data": str(runs / "questions")}
    assert evaluator_of(runs, "answers", **given)[0].questions.split == "minival"
    assert evaluator_of(runs, "answers")[0].questions.split == "val"


def check_ranks(runs, expected):
    """Compare with one process: 12 questions, pairs and captions in batches of 5 on two ranks."""
    ranks = Ranks(torch.distributed.group.WORLD)
    for objective, metrics in expected.items():
        evaluator, model = evaluator_of(runs, objective, ranks)
        assert evaluator(model) == pytest.approx(metrics)


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_does(runs):
    expected = {}
    for objective in DATA:
        evaluator, model = evaluator_of(runs, objective)
        expected[objective] = evaluator(model)
    on_ranks(2, check_ranks, runs, expected)
