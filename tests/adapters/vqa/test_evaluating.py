"""Runs of question answering measured on sets: what is written, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from adapters.vqa.answers import measure
from adapters.vqa.caption_metrics import caption_metrics
from adapters.vqa.pretrained import reader_of
from adapters.vqa.questions import open_question_set
from tests.adapters.vqa.roberta import write_roberta
from tests.adapters.vqa.runs import recipe_of
from unicl import Predictor
from unicl.build import train
from unicl.cli import main
from unicl.data.image_sets import open_image_set
from unicl.errors import UniclError, UsageError
from unicl.evaluation.results import read_results
from unicl.evaluator import Options, evaluate
from unicl.models import load
from unicl.reporting import report

ACCURACY = "v2_mscoco_val2014_annotations.json"


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let warnings reach the test."""
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it


def options(out: Path, **changes: object) -> Options:
    return Options(out=out, device="cpu", num_workers=0, batch_size=5, **changes)


def said_in(out: Path) -> list:
    (path,) = out.glob("*.said.json")
    return json.loads(path.read_text())


def answered_one_by_one(runs, questions) -> dict[int, str]:
    predictor = Predictor.load(runs / "answers", device="cpu")
    found = {}
    for number, text, row in zip(
        questions.question_ids.tolist(), questions.questions, questions.rows.tolist(), strict=True
    ):
        path = questions.images.locate(row)[0]
        ((found[number], _),) = predictor.answer(Path(questions.name) / path, text, top_k=1)
    return found


def test_accuracy_is_that_of_answers_one_by_one(runs, tmp_path):
    data = str(runs / "questions")
    (result,) = evaluate(
        str(runs / "answers"), "vqa-accuracy", [data], options(tmp_path, split="val")
    )
    questions = open_question_set(data, split="val", root=Path("data"))
    expected = answered_one_by_one(runs, questions)
    assert result.metrics == pytest.approx(measure(expected, questions))
    assert (result.task, result.headline, result.num_images) == ("vqa", "accuracy", 12)
    assert result.protocol["num_answers"] == len(load_answers(runs))
    assert (result.noun, result.protocol["split"], result.left_out) == ("questions", "val", "")
    said = {each["question_id"]: each["answer"] for each in said_in(tmp_path)}
    assert said == expected
    content = json.loads((runs / "questions" / ACCURACY).read_text())
    assert said.keys() == {each["question_id"] for each in content["annotations"]}


def load_answers(runs):
    return reader_of(load(runs / "answers"), "answers").config.answers


def test_a_part_without_published_answers_is_for_the_server(runs, tmp_path, capsys):
    shutil.copytree(runs / "questions", tmp_path / "questions")
    (tmp_path / "questions" / ACCURACY).unlink()
    own = ("--device", "cpu", "--workers", "0", "--out", str(tmp_path / "out"))
    words = ("eval", str(runs / "answers"), "vqa-accuracy", str(tmp_path / "questions"))
    assert main([*words, "--split", "val", *own]) == 0
    shown = capsys.readouterr()
    assert "has no published answers; they are for the server: " in shown.err
    assert len(said_in(tmp_path / "out")) == 12
    assert read_results(tmp_path / "out") == []
    (path,) = (tmp_path / "out").iterdir()
    assert str(path) in shown.err


def test_questions_about_damaged_images_count_as_wrong(runs, tmp_path):
    shutil.copytree(runs / "questions", tmp_path / "questions")
    damaged = min((tmp_path / "questions/val2014").iterdir())
    damaged.write_bytes(b"no image")
    out, data = tmp_path / "out", str(tmp_path / "questions")
    own = options(out, split="val")
    (result,) = evaluate(str(runs / "answers"), "vqa-accuracy", [data], own)
    assert result.num_images == 12
    assert result.skipped == {"unreadable image": 4}
    questions = open_question_set(data, split="val", root=Path("data"))
    said = {each["question_id"]: each["answer"] for each in said_in(out)}
    assert {number // 1000 for number in said} == {8, 9}
    assert result.metrics == measure(said, questions)
    for path in (tmp_path / "questions/val2014").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UniclError, match=r"no image of .*questions can be read, as told above"):
        evaluate(str(runs / "answers"), "vqa-accuracy", [data], own)


def test_what_the_model_does_not_see_of_a_question_is_told(runs, tmp_path, caplog):
    shutil.copytree(runs / "questions", tmp_path / "questions")
    path = tmp_path / "questions/v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(path.read_text())
    content["questions"][0]["question"] = "is it red or " * 20
    content["questions"][1]["question"] = "reddish " * 3 + "?" * 10
    path.write_text(json.dumps(content))
    own = options(tmp_path / "out", split="val")
    (result,) = evaluate(str(runs / "answers"), "vqa-accuracy", [str(tmp_path / "questions")], own)
    assert "1 questions are longer than 24 tokens; only their beginning is seen" in caplog.text
    assert len(said_in(tmp_path / "out")) == 12
    assert result.skipped == {}


@pytest.mark.parametrize("ways", [{}, {"vqa.num_beams": "1", "vqa.max_words": "3"}])
def test_captions_are_those_one_by_one(runs, tmp_path, ways):
    own = options(tmp_path / "out", root=runs)
    (result,) = evaluate(str(runs / "captions"), "vqa-captions", ["coco"], own, ways)
    images = open_image_set("coco", split="test", root=runs, kind="captions")
    predictor = Predictor.load(runs / "captions", device="cpu")
    if ways:
        train_like = shutil.copytree(runs / "captions", tmp_path / "run")
        text = (train_like / "recipe.toml").read_text()
        text = text.replace("num_beams = 3", "num_beams = 1").replace("words = 30", "words = 3")
        (train_like / "recipe.toml").write_text(text)
        predictor = Predictor.load(train_like, device="cpu")
    places = [Path(images.locate(row)[0]) for row in range(images.num_samples)]
    said = [predictor.caption(runs / "coco" / place) for place in places]
    assert result.metrics == pytest.approx(
        caption_metrics(dict(enumerate(said)), dict(enumerate(images.captions)))
    )
    assert (result.task, result.headline, result.num_images) == ("captioning", "cider", 4)
    # The number that COCO gave the image, as its server wants it.
    numbers = [int(place.stem.removeprefix("COCO_val2014_")) for place in places]
    assert said_in(tmp_path / "out") == [
        {"image_id": number, "caption": caption}
        for number, caption in zip(numbers, said, strict=True)
    ]
    mark = ", ".join(f"{key}={value}" for key, value in sorted(ways.items()))
    assert result.name == (f"coco ({mark})" if ways else "coco")
    assert result.protocol["num_beams"] == int(ways.get("vqa.num_beams", 3))


def test_captions_that_are_drawn_are_drawn_again(runs, tmp_path):
    said = []
    for number in range(2):
        own = options(tmp_path / str(number), root=runs)
        evaluate(str(runs / "captions"), "vqa-captions", ["coco"], own, {"vqa.top_p": "0.95"})
        said.append([each["caption"] for each in said_in(tmp_path / str(number))])
    assert said[0] == said[1]
    assert len(set(said[0])) == 4  # every image has draws of its own


def test_captions_of_damaged_images_are_missing(runs, tmp_path):
    shutil.copytree(runs / "coco", tmp_path / "coco")
    images = open_image_set("coco", split="test", root=tmp_path, kind="captions")
    (tmp_path / "coco" / images.locate(1)[0]).write_bytes(b"no image")
    own = options(tmp_path / "out", root=tmp_path)
    (result,) = evaluate(str(runs / "captions"), "vqa-captions", ["coco"], own)
    assert (result.num_images, sum(result.skipped.values())) == (3, 1)
    assert len(said_in(tmp_path / "out")) == 3
    for path in (tmp_path / "coco/val2014").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UniclError, match="no image of coco can be read, as told above"):
        evaluate(str(runs / "captions"), "vqa-captions", ["coco"], own)


def plain_ranks(scores, right):
    """Return the rank of each row's best right item; ties are lost."""
    ranks = []
    for row, marks in zip(scores.tolist(), right.tolist(), strict=True):
        best = max(s for s, mark in zip(row, marks, strict=True) if mark)
        ranks.append(1 + sum(s >= best for s, mark in zip(row, marks, strict=True) if not mark))
    return ranks


def plain_figures(scores, images, unique, *, wide):
    """Return figures of images that look for texts and of captions that look for images."""
    right = torch.tensor([[text in images.captions[row] for text in unique] for row in range(wide)])
    asked = [unique.index(text) for row in range(wide) for text in images.captions[row]]
    found = {"i2t": plain_ranks(scores, right), "t2i": plain_ranks(scores.T, right.T)}
    found["t2i"] = [found["t2i"][number] for number in asked]
    figures = {}
    for side, ranks in found.items():
        ranks = torch.tensor(ranks).double()
        figures |= {f"{side}_r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
        figures[f"{side}_mean_rank"] = ranks.mean().item()
        figures[f"{side}_median_rank"] = ranks.quantile(0.5).item()
    return figures


def test_all_candidates_are_ranked_as_by_hand(runs, tmp_path):
    own = options(tmp_path / "out", root=runs)
    ways = {"vqa.candidates": "1000"}
    (result,) = evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own, ways)
    images = open_image_set("coco", split="test", root=runs, kind="captions")
    count = images.num_samples
    unique = list(dict.fromkeys(text for texts in images.captions for text in texts))
    predictor = Predictor.load(runs / "pretraining", device="cpu")
    model = predictor.model.double()
    with torch.no_grad():
        scores = torch.zeros(count, len(unique), dtype=torch.float64)
        for row in range(count):
            with Image.open(runs / "coco" / images.locate(row)[0]) as image:
                pixels = predictor.transform(image.convert("RGB"), 0)[None]
            seen = model.look(pixels).expand(len(unique), -1, -1)
            pooled = model.fuse(seen, predictor.tokenize(unique)).pooled
            logits = model.heads["matching"](pooled)
            towers = model.encode_text(predictor.tokenize(unique)) @ model.encode_image(pixels)[0]
            scores[row] = logits[:, 1] - logits[:, 0] + model.scale() * towers
    expected = plain_figures(scores, images, unique, wide=count)
    after = {name: v for name, v in result.metrics.items() if not name.startswith("towers_")}
    assert after == pytest.approx(expected)


def test_the_towers_figures_are_those_of_retrieval(runs, tmp_path):
    own = options(tmp_path / "out", root=runs)
    for ways, towers in (({}, "pretraining"), ({"vqa.towers": str(runs / "towers")}, "towers")):
        (result,) = evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own, ways)
        (plain,) = evaluate(str(runs / towers), "retrieval", ["coco"], own)
        before = {name: result.metrics[f"towers_{name}"] for name in plain.metrics}
        assert before == plain.metrics
        assert result.protocol["towers"] == str(runs / towers)
        assert result.protocol["num_texts"] == plain.protocol["num_texts"] == 8
        assert (result.task, result.headline) == ("retrieval_reranked", plain.headline)


def test_one_candidate_changes_nothing(runs, tmp_path):
    own = options(tmp_path / "out", root=runs)
    ways = {"vqa.candidates": "1"}
    (result,) = evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own, ways)
    assert result.name == "coco (vqa.candidates=1)"
    for name, share in result.metrics.items():
        if not name.startswith("towers_"):
            assert share == result.metrics[f"towers_{name}"], name


def test_reranking_leaves_damaged_images_out(runs, tmp_path):
    shutil.copytree(runs / "coco", tmp_path / "coco")
    images = open_image_set("coco", split="test", root=tmp_path, kind="captions")
    (tmp_path / "coco" / images.locate(0)[0]).write_bytes(b"no image")
    own = options(tmp_path / "out", root=tmp_path)
    (result,) = evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own)
    assert (result.num_images, sum(result.skipped.values())) == (3, 1)
    assert result.protocol["num_texts"] == 6
    content = json.loads((tmp_path / "coco/dataset_coco.json").read_text())
    first = next(each for each in content["images"] if each["split"] == "test")
    content["images"].remove(first)
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps(content))
    (without,) = evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own)
    assert without.skipped == {}
    assert without.metrics == result.metrics


def test_a_run_with_roberta_takes_candidates_of_others(runs, tmp_path):
    folder = write_roberta(tmp_path / "roberta")
    recipe = recipe_of(runs, "pretraining", vqa__text_encoder=f"roberta:{folder}")
    train(recipe, tmp_path / "run")
    own = options(tmp_path / "out", root=runs)
    with pytest.raises(UsageError, match="no text tower"):
        evaluate(str(tmp_path / "run"), "vqa-rerank", ["coco"], own)
    ways = {"vqa.towers": str(runs / "towers")}
    (result,) = evaluate(str(tmp_path / "run"), "vqa-rerank", ["coco"], own, ways)
    assert result.num_images == 4


def test_results_are_read_back_and_reported(runs, tmp_path, caplog):
    own = options(tmp_path / "out", root=runs)
    val = options(tmp_path / "out", split="val")
    results = [
        *evaluate(str(runs / "answers"), "vqa-accuracy", [str(runs / "questions")], val),
        *evaluate(str(runs / "captions"), "vqa-captions", ["coco"], own),
        *evaluate(str(runs / "pretraining"), "vqa-rerank", ["coco"], own),
    ]
    read = {each.task: each for each in read_results(tmp_path / "out")}
    assert read.keys() == {"vqa", "captioning", "retrieval_reranked"}
    for each in results:
        assert read[each.task].metrics == each.metrics
        assert read[each.task].protocol == each.protocol
    assert "is no result" not in caplog.text
    report([tmp_path / "out"], tmp_path / "report.html", csv=tmp_path / "all.csv")
    page = (tmp_path / "report.html").read_text()
    for words in ("Answering questions", "Saying what is there", "Searching, and looking again"):
        assert words in page
    for each in results:
        for name in each.shown:
            assert f"{each.metrics[name]:.1%}" in page
    assert "by the towers alone" in page
    table = (tmp_path / "all.csv").read_text()
    assert all(each.task in table for each in results)


@pytest.mark.parametrize(
    ("run", "task", "changes", "overrides", "words"),
    [
        ("answers", "accuracy", {}, {"vqa.num_beams": "2"}, "num_beams .* vqa-accuracy; it takes"),
        ("captions", "captions", {}, {"vqa.candidates": "2"}, "has no effect on vqa-captions"),
        ("captions", "captions", {}, {"vqa.width": "2"}, "vqa.width has no effect on vqa-captions"),
        ("captions", "captions", {}, {"vqa.num_beams": "x"}, "vqa.num_beams"),
        ("captions", "captions", {}, {"vqa.num_beams": "0"}, "vqa.num_beams must be positive"),
        ("pretraining", "rerank", {}, {"vqa.top_p": "0.5"}, "there are vqa.candidates, vqa.towers"),
        ("pretraining", "rerank", {}, {"vqa.towers": "nowhere"}, "nowhere"),
        ("captions", "accuracy", {}, {}, "was not trained for answers; train it: unicl train vqa "),
        ("towers", "accuracy", {}, {}, "was not trained for answers; train it: unicl train vqa "),
        ("answers", "captions", {}, {}, "was not trained for captions; .* train captioning"),
        ("answers", "rerank", {}, {}, "was not trained for pretraining; .* train vqa_pretraining"),
        ("answers", "accuracy", {"templates": "clip"}, {}, "--templates has no effect on vqa-acc"),
        ("answers", "accuracy", {"download": True}, {}, "--download fetches no sets of questions"),
        ("answers", "accuracy", {"split": "dev"}, {}, "has no split 'dev'; it has train, val"),
    ],
)
def test_what_has_no_effect_is_refused(runs, tmp_path, run, task, changes, overrides, words):
    own = options(tmp_path, **{"root": runs, "split": "val", **changes})
    data = str(runs / "questions") if task == "accuracy" else "coco"
    with pytest.raises(UniclError, match=words) as caught:
        evaluate(str(runs / run), f"vqa-{task}", [data], own, overrides)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        ("accuracy", "nowhere", "there is no folder 'nowhere' of questions"),
        ("accuracy", "all", "the sets of vqa-accuracy have no name here; give folders"),
        ("accuracy", "vqav2", "vqav2"),
        ("accuracy", "{runs}/pairs", "has no questions; expected JSON files"),
        ("captions", "{runs}/questions", "captions are needed"),
        ("captions", "nowhere", "there is no image set and no folder 'nowhere'"),
    ],
)
def test_sets_that_are_not_there(runs, tmp_path, task, data, words):
    run = {"accuracy": "answers", "captions": "captions"}[task]
    own = options(tmp_path, root=tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(str(runs / run), f"vqa-{task}", [data.format(runs=runs)], own)
    assert "\n" not in str(caught.value)
