"""The composed quizzes: captions and answers are true of the scenes, and files as others' are."""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.motion import COLOURS
from benchmarks.quiz import (
    Question,
    Quiz,
    draw_quiz,
    names_all,
    parse_caption,
    write_captions,
    write_pairs,
    write_questions,
)
from benchmarks.scenes import SHAPES, Scene
from unicl.data.image_sets import open_image_set
from unicl.data.shards import ShardSet


@pytest.fixture(scope="module")
def quizzes() -> list[Quiz]:
    return [draw_quiz(0, "train", index) for index in range(600)]


def scene_of(*names: str) -> Scene:
    return Scene(np.zeros((1, 1, 3), np.uint8), names, np.zeros((len(names), 4)))


def true_answer(question: str, names: tuple[str, ...]) -> str:
    """Read the question word by word and look at the scene's names; raise where none fits."""
    words = question.removesuffix("?").split()
    if words[:2] == ["how", "many"]:
        return str(len(names))
    if words[:3] == ["is", "there", "a"]:
        return "yes" if " ".join(words[3:]) in names else "no"
    if words[1] == "color":
        (name,) = (name for name in names if name.endswith(words[-1]))
        return name.split()[0]
    assert words[1] == "shape"
    assert words[-1] == "object"
    (name,) = (name for name in names if name.startswith(words[-2]))
    return name.split()[1]


def asked(quiz: Quiz, kind: str) -> Question:
    (question,) = (question for question in quiz.questions if question.type == kind)
    return question


def test_a_quiz_is_a_pure_function_of_its_arguments():
    quiz, again = draw_quiz(3, "train", 7), draw_quiz(3, "train", 7)
    np.testing.assert_array_equal(quiz.scene.pixels, again.scene.pixels)
    np.testing.assert_array_equal(quiz.scene.boxes, again.scene.boxes)
    assert quiz.scene.names == again.scene.names
    assert (quiz.captions, quiz.questions) == (again.captions, again.questions)
    others = [draw_quiz(*key) for key in ((4, "train", 7), (3, "val", 7), (3, "train", 8))]
    assert len({one.scene.pixels.tobytes() for one in (quiz, *others)}) == 4


def test_scenes_show_up_to_three_objects_that_share_nothing(quizzes):
    for quiz in quizzes:
        colours, shapes = zip(*quiz.objects, strict=True)
        assert len(set(colours)) == len(set(shapes)) == len(quiz.objects)
        assert quiz.scene.names == tuple(" ".join(each) for each in quiz.objects)
        assert quiz.scene.pixels.shape == (64, 64, 3)
        assert (quiz.scene.boxes >= 0).all()
        assert (quiz.scene.boxes <= 64).all()
        sides = quiz.scene.boxes[:, 2:] - quiz.scene.boxes[:, :2]
        assert 18 <= sides.min() <= sides.max() <= 26
    counts = Counter(len(quiz.objects) for quiz in quizzes)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 150
    assert len({each for quiz in quizzes for each in quiz.objects}) == len(COLOURS) * len(SHAPES)


def test_the_colour_in_the_middle_of_a_box_is_the_named_one(quizzes):
    paints = np.array(list(COLOURS.values()))
    for quiz in quizzes[:100]:
        for (colour, _), box in zip(quiz.objects, quiz.scene.boxes, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            nearest = np.abs(paints - quiz.scene.pixels[y, x]).sum(1).argmin()
            assert list(COLOURS)[nearest] == colour


def test_answers_are_true(quizzes):
    orders = {tuple(question.type for question in quiz.questions) for quiz in quizzes}
    assert {tuple(sorted(order)) for order in orders} == {("colour", "count", "existence", "shape")}
    for quiz in quizzes:
        for question in quiz.questions:
            assert question.answer == true_answer(question.text, quiz.scene.names)
    assert len(orders) == 24


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("colour", set(COLOURS)),
        ("shape", set(SHAPES)),
        ("existence", {"yes", "no"}),
        ("count", set("123")),
    ],
)
def test_no_answer_is_the_likely_one(quizzes, kind, answers):
    found = Counter(asked(quiz, kind).answer for quiz in quizzes)
    assert set(found) == answers
    assert max(found.values()) < 1.25 * len(quizzes) / len(answers)


def test_what_is_not_there_is_there_in_part(quizzes):
    both = 0
    absent = [quiz for quiz in quizzes if asked(quiz, "existence").answer == "no"]
    for quiz in absent:
        words = asked(quiz, "existence").text.removesuffix("?").split()[3:]
        present = [any(word in name.split() for name in quiz.scene.names) for word in words]
        assert any(present)
        both += all(present)
    several = sum(len(quiz.objects) > 1 for quiz in absent)
    assert 0.4 < both / several < 0.6


def test_captions_name_all_objects_in_both_orders(quizzes):
    for quiz in quizzes:
        first, second = quiz.captions
        assert (first == second) == (len(quiz.objects) == 1)
        for caption in quiz.captions:
            assert parse_caption(caption) == set(quiz.objects)
            assert names_all(caption, quiz.scene)
    # The order of painting, in which later objects hide earlier ones, is not that of the caption.
    pairs = [quiz for quiz in quizzes if len(quiz.objects) == 2]
    in_order = [quiz.captions[0].startswith(f"a {quiz.scene.names[0]}") for quiz in pairs]
    assert 0.35 < np.mean(in_order) < 0.65


def test_captions_are_parsed():
    assert parse_caption("a red circle") == {("red", "circle")}
    assert parse_caption("a red circle and a blue square") == {
        ("red", "circle"),
        ("blue", "square"),
    }
    three = {("red", "circle"), ("blue", "square"), ("green", "cross")}
    assert parse_caption("a red circle, a blue square and a green cross") == three
    assert parse_caption("a red circle , a blue square and a green cross") == three


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "a red circle and",
        "a pink circle",
        "a red bar",
        "a circle red",
        "a red circle, a blue square",
        "a red circle and a blue square and a green cross",
        "a red circle and a red circle",
        "a red circle\n",
        "there is a red circle",
    ],
)
def test_what_is_no_caption_is_not_parsed(text):
    assert parse_caption(text) is None
    assert not names_all(text, scene_of("red circle"))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a blue square",
        "a red square and a blue circle",
        "a red circle and a green square",
        "a red circle, a blue square and a green cross",
    ],
)
def test_wrong_missing_and_further_objects_are_noticed(text):
    assert names_all("a blue square and a red circle", scene_of("red circle", "blue square"))
    assert not names_all(text, scene_of("red circle", "blue square"))


def test_shards_of_pairs(tmp_path):
    shards = ShardSet.open(write_pairs(tmp_path, 270, seed=2, part="val"))
    assert shards.num_samples == 270
    for index in (0, 269):
        quiz, sample = draw_quiz(2, "val", index), shards.read(index)
        assert sample.key == f"{index:06d}"
        assert sample.text.decode() == quiz.captions[0]
        with Image.open(BytesIO(sample.image)) as image:
            np.testing.assert_array_equal(np.asarray(image), quiz.scene.pixels)


def check_questions(folder: Path, part: str, quizzes: dict[int, Quiz]) -> set[int]:
    """Compare a part's files with the quizzes by image; return the numbers of the questions."""
    asking = json.loads((folder / f"v2_OpenEnded_mscoco_{part}2014_questions.json").read_bytes())
    answering = json.loads((folder / f"v2_mscoco_{part}2014_annotations.json").read_bytes())
    answers = {entry["question_id"]: entry for entry in answering["annotations"]}
    kinds = {"colour": "other", "shape": "other", "existence": "yes/no", "count": "number"}
    assert len(answers) == len(asking["questions"]) == 4 * len(quizzes)
    found: dict[int, list[Question]] = {image: [] for image in quizzes}
    for entry in asking["questions"]:
        answer = answers[entry["question_id"]]
        assert answer["image_id"] == entry["image_id"]
        kind, word = answer["question_type"], answer["multiple_choice_answer"]
        found[entry["image_id"]].append(Question(kind, entry["question"], word))
        assert answer["answer_type"] == kinds[kind]
        assert answer["answers"] == [
            {"answer": word, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)
        ]
    for number, quiz in quizzes.items():
        assert tuple(found[number]) == quiz.questions
        with Image.open(folder / f"{part}2014/COCO_{part}2014_{number:012d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), quiz.scene.pixels)
    assert len(list((folder / f"{part}2014").iterdir())) == len(quizzes)
    return set(answers)


def test_questions_are_laid_out_as_vqa_does(tmp_path):
    folder = write_questions(tmp_path / "vqa", num_train=5, num_val=3, seed=1)
    train = {1 + index: draw_quiz(1, "train", index) for index in range(5)}
    val = {6 + index: draw_quiz(1, "val", index) for index in range(3)}
    numbers = [check_questions(folder, part, of) for part, of in (("train", train), ("val", val))]
    assert not numbers[0] & numbers[1]
    assert len(list(folder.iterdir())) == 6


def test_captions_are_laid_out_as_karpathy_does(tmp_path):
    counts = {"train": 5, "val": 4, "test": 3}
    folder = tmp_path / "coco"
    write_captions(folder, **{f"num_{part}": count for part, count in counts.items()}, seed=1)
    for part, count in counts.items():
        opened = open_image_set("coco", split=part, root=tmp_path)
        quizzes = [draw_quiz(1, part, index) for index in range(count)]
        assert opened.captions == tuple(quiz.captions for quiz in quizzes)
        for index, quiz in enumerate(quizzes):
            with Image.open(BytesIO(opened.images.read(index).image)) as image:
                np.testing.assert_array_equal(np.asarray(image), quiz.scene.pixels)
    assert len(list(folder.glob("*2014/*.png"))) == sum(counts.values())
