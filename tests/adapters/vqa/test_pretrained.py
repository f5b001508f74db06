"""What a person does with a run of question answering: `Predictor.answer` and `caption`."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.vqa.pretrained import overridden, reader_of, with_reader
from adapters.vqa.tokens import ClipTokens
from tests.adapters.vqa.roberta import write_roberta
from tests.adapters.vqa.runs import recipe_of
from unicl import Predictor
from unicl.build import train
from unicl.config import Recipe
from unicl.errors import UniclError, UsageError
from unicl.models import build_model, load, read_recipe
from unicl.towers.text import tokenize

ASKED = ("what color is the circle?", "how many objects are there?")


@pytest.fixture(scope="module")
def predictors(runs):
    names = ("towers", "pretraining", "answers", "captions")
    return {name: Predictor.load(runs / name, device="cpu") for name in names}


@pytest.fixture(scope="module")
def pictures(runs):
    return sorted((runs / "questions/val2014").iterdir())


def plain_image(predictor, path):
    with Image.open(path) as image:
        return predictor.transform(image.convert("RGB"), 0)[None]


@torch.no_grad()
def plain_answers(predictor, path, question):
    """Return the share of each answer, written out."""
    model, answers = predictor.model, read_recipe(Path(predictor.name)).vqa.answers
    tokens = predictor.tokenize([question])
    states = model.text.encode(tokens[:, : int(tokens.argmax()) + 1])
    image = model.image.tokens(plain_image(predictor, path))
    x, y = model.fusion(image, states)
    shares = model.heads["answers"](model.fusion.pool(x, y, None)).sigmoid()[0]
    return dict(zip(answers, shares.tolist(), strict=True))


@pytest.mark.parametrize("question", ASKED)
def test_answers_are_those_of_the_model(predictors, pictures, question):
    predictor = predictors["answers"]
    expected = plain_answers(predictor, pictures[0], question)
    found = predictor.answer(pictures[0], question, top_k=len(expected))
    assert len(found) == len(expected)
    assert dict(found) == pytest.approx(expected, abs=1e-6)
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] < scores[0] < 1
    assert predictor.answer(pictures[0], question, top_k=1) == found[:1]
    assert predictor.answer(pictures[0], question) == found[:5]
    assert predictor.answer(pictures[0], question, top_k=10_000) == found


def test_an_answer_looks_at_image_and_question(predictors, pictures):
    predictor = predictors["answers"]
    shares = [
        np.array([share for _, share in sorted(predictor.answer(p, q, top_k=99))])
        for p in pictures[:2]
        for q in ASKED
    ]
    for number, one in enumerate(shares):
        for other in shares[:number]:
            assert np.abs(one - other).max() > 1e-6


@torch.no_grad()
def plain_caption(predictor, path):
    """Return the caption of the likeliest words one by one, each text seen as a whole."""
    model, tokens = predictor.model, ClipTokens(24)
    memory = model.fusion.remember(model.image.tokens(plain_image(predictor, path)))
    said = [tokens.start]
    while len(said) <= 6:
        logits = model.heads["words"](model.speak(torch.tensor([said]), memory))[0, -1]
        logits[[token for token in tokens.specials if token != tokens.end]] = -torch.inf
        said.append(int(logits.argmax()))
        if said[-1] == tokens.end:
            break
    return tokens.decode(said)


def test_captions_are_those_of_the_model(runs, pictures):
    loaded = load(runs / "captions")
    reader = reader_of(loaded, "captions")
    ways = overridden(reader.config, {"vqa.num_beams": "1", "vqa.max_words": "6"})
    predictor = Predictor(with_reader(loaded, replace(reader, config=ways)))
    for path in pictures:
        found = predictor.caption(path)
        assert found == plain_caption(predictor, path)
        assert found


def test_a_text_matches_by_the_head_for_it(runs, predictors, pictures):
    predictor = predictors["pretraining"]
    model, reader = predictor.model, reader_of(load(runs / "pretraining"), "pretraining")
    texts = ["a red circle", "a blue square and a green cross"]
    with Image.open(pictures[0]) as image:
        found = reader.match(image.convert("RGB"), texts)
    with torch.no_grad():
        image = model.look(plain_image(predictor, pictures[0]))
        for text, share in zip(texts, found, strict=True):
            pooled = model.fuse(image, predictor.tokenize([text])).pooled
            expected = model.heads["matching"](pooled).softmax(1)[0, 1]
            assert share == pytest.approx(expected.item(), abs=1e-6)


def test_paths_pictures_and_arrays_are_the_same(predictors, pictures):
    with Image.open(pictures[0]) as opened:
        opened.load()
        inputs = [pictures[0], str(pictures[0]), pictures[0].as_uri(), opened, np.asarray(opened)]
        answers = [predictors["answers"].answer(each, ASKED[0]) for each in inputs]
        captions = [predictors["captions"].caption(each) for each in inputs]
    assert answers == answers[:1] * 5
    assert captions == captions[:1] * 5


def test_images_of_all_kinds_are_seen(predictors, tmp_path):
    colour = Image.new("RGB", (50, 40), "red")
    kinds = {mode: colour.convert(mode) for mode in ("CMYK", "RGBA", "L", "P", "1")}
    kinds["one"] = Image.new("RGB", (1, 1))
    kinds["long"] = Image.new("RGB", (900, 2))
    for name, image in kinds.items():
        path = tmp_path / f"{name}.tiff"
        image.save(path)
        assert len(predictors["answers"].answer(path, ASKED[0])) == 5
        assert predictors["captions"].caption(path) == predictors["captions"].caption(image)
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    first = predictors["answers"].answer(frames[0], ASKED[0])
    assert predictors["answers"].answer(tmp_path / "moving.gif", ASKED[0]) == first


def test_half_precision(runs, predictors, pictures):
    half = Predictor.load(runs / "answers", device="cpu", precision="bf16")
    found, exact = (
        dict(p.answer(pictures[0], ASKED[0], top_k=99)) for p in (half, predictors["answers"])
    )
    assert found == pytest.approx(exact, abs=0.02)
    assert found != exact


@pytest.mark.parametrize(
    ("image", "question", "given", "message"),
    [
        ("missing.png", "why?", {}, "there is no image file missing.png"),
        (None, "", {}, "the question is empty; ask something"),
        (None, " \n", {}, "the question is empty"),
        (
            None,
            "why " * 300,
            {},
            r"the question 'why .*' is longer than the 24 tokens that .*answers",
        ),
        (None, "why?", {"top_k": 0}, "top_k must be a positive whole number, got 0"),
        (np.zeros((4, 4, 2), np.uint8), "why?", {}, "image 0: an array must hold bytes of shape"),
    ],
)
def test_mistakes(predictors, pictures, image, question, given, message):
    with pytest.raises(UsageError, match=message) as caught:
        predictors["answers"].answer(pictures[0] if image is None else image, question, **given)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_damaged(predictors, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    for content in (b"", b"no image", pictures[0].read_bytes()[:200]):
        bad.write_bytes(content)
        for ask in (
            lambda p: predictors["answers"].answer(p, "why?"),
            predictors["captions"].caption,
        ):
            with pytest.raises(UniclError, match=r"cannot read .*bad\.png"):
                ask(bad)


def test_a_run_does_what_it_was_trained_for(predictors, pictures):
    for name in ("towers", "pretraining", "captions"):
        with pytest.raises(UsageError, match=rf"{name} does not answer questions; .* train vqa"):
            predictors[name].answer(pictures[0], "why?")
    for name in ("towers", "pretraining", "answers"):
        with pytest.raises(UsageError, match=rf"{name} does not write captions; .* captioning"):
            predictors[name].caption(pictures[0])


@pytest.mark.parametrize("name", ["towers", "pretraining", "captions"])
def test_a_reader_tells_how_it_is_trained(runs, name):
    with pytest.raises(UsageError, match=r"was not trained for answers; train it: unicl train vqa"):
        reader_of(load(runs / name), "answers")


@pytest.mark.parametrize("name", ["pretraining", "answers", "captions"])
def test_it_embeds_as_its_towers_do(runs, predictors, pictures, name):
    """Its own towers, which were trained on: TwoTower's forward with the run's weights."""
    run = read_recipe(runs / name)
    sizes = {key: getattr(run, key) for key in ("embed_dim", "image_tower", "text_tower", "loss")}
    towers = build_model(Recipe(**sizes), start=False)
    weights = {
        k: w for k, w in predictors[name].model.state_dict().items() if k in towers.state_dict()
    }
    towers.load_state_dict(weights)
    texts = ["a red circle", "a dog"]
    with torch.no_grad():
        pixels = torch.cat([plain_image(predictors[name], path) for path in pictures])
        images, words, _ = towers.eval()(pixels, tokenize(texts, run.text_tower.context_length))
    np.testing.assert_allclose(predictors[name].embed_images(pictures), images, atol=1e-6)
    np.testing.assert_allclose(predictors[name].embed_texts(texts), words, atol=1e-6)


def test_threads_may_share_one(predictors, pictures):
    asked = [(path, question) for path in pictures for question in ASKED]
    alone = [predictors["answers"].answer(*each) for each in asked]
    captions = [predictors["captions"].caption(path) for path, _ in asked]
    wrong = []

    def work(places):
        for place in places:
            path, question = asked[place]
            if predictors["answers"].answer(path, question) != alone[place]:
                wrong.append(place)
            if predictors["captions"].caption(path) != captions[place]:
                wrong.append(place)

    orders = (range(len(asked)), reversed(range(len(asked))))
    threads = [threading.Thread(target=work, args=(list(order),)) for order in orders]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_another_way_of_reading(runs):
    config = reader_of(load(runs / "captions"), "captions").config
    changed = overridden(config, {"vqa.num_beams": "5", "vqa.top_p": "0.9"})
    assert (changed.num_beams, changed.top_p, changed.max_words) == (5, 0.9, config.max_words)
    for overrides, message in (
        ({"vqa.width": "32"}, r"vqa\.width has no effect here; there are vqa\.candidates"),
        ({"vqa.num_beam": "3"}, r"did you mean vqa\.num_beams"),
        ({"vqa.num_beams": "0"}, r"vqa\.num_beams must be positive, got 0"),
        ({"trainer.steps": "3"}, r"unknown key trainer\.steps"),
    ):
        with pytest.raises(UsageError, match=message):
            overridden(config, overrides)


def test_roberta_reads_questions_and_embeds_no_texts(runs, pictures, tmp_path):
    folder = write_roberta(tmp_path / "roberta")
    given = {"vqa__text_encoder": f"roberta:{folder}", "vqa__max_text_length": "30"}
    train(recipe_of(runs, "answers", weights=str(runs / "towers"), **given), tmp_path / "run")
    predictor = Predictor.load(tmp_path / "run", device="cpu")
    assert len(predictor.answer(pictures[0], ASKED[0])) == 5
    assert predictor.embed_images(pictures).shape == (3, 16)
    with pytest.raises(UsageError, match="reads texts by RoBERTa and has no text tower to embed"):
        predictor.embed_texts(["a"])
    shutil.rmtree(folder)
    with pytest.raises(UniclError, match="roberta") as caught:
        load(tmp_path / "run")
    assert "\n" not in str(caught.value)
