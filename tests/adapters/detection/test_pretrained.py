"""What a person does with a run of detection, above all `Predictor.detect`."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.detection.pretrained import overridden
from unicl import Predictor
from unicl.errors import UniclError, UsageError
from unicl.models import load

ASKED = ["red circle", "purple unicorn", "red cross"]


@pytest.fixture(scope="module")
def predictors(runs):
    names = ("texts", "numbers", "none", "towers")
    found = {name: Predictor.load(runs / name, device="cpu") for name in names}
    for name in names[:3]:  # what has hardly learnt anything is sure of nothing
        skill = found[name].skills["detect"]
        object.__setattr__(
            skill, "config", overridden(skill.config, {"detection.score_threshold": "0"})
        )
    return found


@pytest.fixture
def picture(runs):
    return runs / "scenes/test/000000.png"


def check(found, names, size=(96, 96)):
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert {each.name for each in found} <= set(names)
    for each in found:
        left, top, right, bottom = each.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("kind", ["texts", "numbers", "none"])
def test_the_classes_of_the_training_are_found(predictors, picture, kind):
    predictor = predictors[kind]
    own = predictor.skills["detect"].config.class_names or ("object",)
    (found,) = predictor.detect([picture], threshold=0.0)
    assert 0 < len(found) <= 100
    check(found, own)


def test_any_name_is_found_by_text(predictors, picture):
    for kind in ("texts", "none"):
        (found,) = predictors[kind].detect([picture], ASKED, threshold=0.0)
        check(found, ASKED)
        assert len({each.name for each in found}) > 1


def test_paths_pictures_and_arrays_are_the_same(predictors, picture):
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        inputs = [picture, str(picture), opened, pixels]
        found = predictors["texts"].detect(inputs, ASKED, threshold=0.0)
    assert all(each == found[0] for each in found)
    assert predictors["texts"].detect(pixels[None], ASKED, threshold=0.0) == found[:1]


def test_images_of_several_sizes(predictors):
    sizes = [(40, 30), (30, 90), (300, 20), (1, 1), (64, 64)]
    images = [Image.new("RGB", size, "red") for size in sizes]
    for image, found in zip(
        images, predictors["texts"].detect(images, ASKED, threshold=0.0), strict=True
    ):
        check(found, ASKED, image.size)


def test_classes_by_number_are_asked_for_by_name(predictors, picture):
    predictor = predictors["numbers"]
    (whole,) = predictor.detect([picture], threshold=0.0)
    wanted = whole[0].name
    (found,) = predictor.detect([picture], [wanted.upper().replace(" ", "_")], threshold=0.0)
    # Those that another class was surer of are there, too: nobody asked for that one.
    assert {each.name for each in found} == {wanted}
    assert {each for each in whole if each.name == wanted} <= set(found)
    with pytest.raises(
        UsageError, match=r"knows its own 20 classes only, and 'zebra' is none; .*, \.\.\."
    ):
        predictor.detect([picture], [wanted, "zebra"])
    with pytest.raises(UsageError, match="by number and has no text tower"):
        predictor.embed_texts(["a"])


def test_what_is_not_sure_is_left_out(predictors, picture):
    predictor = predictors["texts"]
    (whole,) = predictor.detect([picture], threshold=0.0)
    middle = whole[len(whole) // 2].score
    (found,) = predictor.detect([picture], threshold=middle)
    assert found == [each for each in whole if each.score >= middle]
    assert predictor.detect([picture], threshold=1.0) == [[]]


@pytest.mark.parametrize("kind", ["texts", "numbers", "none"])
def test_half_precision(runs, predictors, picture, kind):
    half = Predictor.load(runs / kind, device="cpu", precision="bf16")
    skill = half.skills["detect"]
    object.__setattr__(skill, "config", predictors[kind].skills["detect"].config)
    names = None if kind == "numbers" else ASKED
    (found,) = half.detect([picture], names, threshold=0.0)
    (exact,) = predictors[kind].detect([picture], names, threshold=0.0)
    check(found, ASKED if names else half.skills["detect"].config.class_names)
    assert found[0].score == pytest.approx(exact[0].score, abs=0.05)


def test_what_is_no_detector(predictors, picture):
    with pytest.raises(UsageError, match="towers is no detector; train one on it: unicl train"):
        predictors["towers"].detect([picture])


@pytest.mark.parametrize(
    ("images", "names", "given", "message"),
    [
        (["missing.png"], None, {}, "no image file missing.png"),
        ([], None, {}, "images"),
        ([np.zeros((5, 5, 3), np.uint8)], ["a", "a"], {}, "'a'"),
        ([np.zeros((5, 5, 3), np.uint8)], [], {}, "names"),
        ([np.zeros((5, 5, 3), np.uint8)], "dog", {}, "names"),
        (
            [np.zeros((5, 5, 3), np.uint8)],
            None,
            {"threshold": 1.5},
            r"threshold must be a number in \[0, 1\]",
        ),
        ([np.zeros((5, 5, 3), np.uint8)], None, {"threshold": float("nan")}, "threshold"),
    ],
)
def test_mistakes(predictors, images, names, given, message):
    with pytest.raises(UsageError, match=message):
        predictors["texts"].detect(images, names, **given)


def test_an_image_that_is_damaged(predictors, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UniclError, match=r"cannot read .*bad\.png"):
        predictors["texts"].detect([tmp_path / "bad.png"])


def test_a_detector_embeds_as_its_towers(runs, predictors, picture):
    for name in ("none", "towers"):
        assert predictors[name].embed_images([picture]).shape == (1, 16)
    ours, theirs = (predictors[name].embed_images([picture]) for name in ("none", "towers"))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(
        predictors["none"].embed_texts(["a dog"]),
        predictors["towers"].embed_texts(["a dog"]),
        atol=1e-6,
    )


def test_names_are_embedded_once(runs, monkeypatch, picture):
    predictor = Predictor.load(runs / "texts", device="cpu")
    seen = []
    encode = predictor.model.encode_text
    monkeypatch.setattr(
        predictor.model,
        "encode_text",
        lambda tokens: seen.append(len(tokens)) or encode(tokens),
    )
    for _ in range(3):
        predictor.detect([picture, picture], ASKED)
    assert seen == [3]


def test_many_names_are_embedded_in_parts(runs):
    detect = load(runs / "texts").skills["detect"]
    names = [f"thing {number}" for number in range(300)]
    embeddings = detect.finder(names).names
    assert embeddings.shape == (300, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(300))
    torch.testing.assert_close(
        detect.finder(names[270:]).names, embeddings[270:], atol=1e-5, rtol=1e-4
    )


def test_names_do_not_keep_a_model_alive(runs, picture):
    predictor = Predictor.load(runs / "texts", device="cpu")
    predictor.detect([picture], ASKED)
    model = weakref.ref(predictor.model)
    del predictor
    gc.collect()
    assert model() is None


def test_another_way_of_looking(runs):
    config = load(runs / "texts").skills["detect"].config
    changed = overridden(config, {"detection.test_sizes": "64,80", "detection.max_detections": "3"})
    assert changed.test_sizes == (64, 80)
    assert changed.max_detections == 3
    for overrides, message in (
        (
            {"detection.width": "32"},
            "detection.width has no effect here; there are detection.max_det",
        ),
        ({"detection.test_size": "3"}, "did you mean detection.test_sizes"),
        ({"trainer.steps": "3"}, "unknown key trainer.steps"),
    ):
        with pytest.raises(UsageError, match=message):
            overridden(config, overrides)
