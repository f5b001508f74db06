import json
from itertools import combinations

import numpy as np
import pytest

from adapters.vqa.answers import (
    build_vocabulary,
    measure,
    normalise_answer,
    soft_score,
    targets,
    vqa_accuracy,
    write_submission,
)
from adapters.vqa.questions import open_question_set
from tests.adapters.vqa.layouts import annotate, ask, own_part
from unicl.errors import UniclError, UsageError


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Yes", "yes"),
        (" two\nbig\tdogs ", "2 big dogs"),
        # Articles and numbers.
        ("The cat on a mat", "cat on mat"),
        ("an", ""),
        ("none", "0"),
        ("Zero to TEN", "0 to 10"),
        ("eleven", "eleven"),
        ("twenty-one", "twenty 1"),
        # A mark vanishes beside a space, and is one elsewhere.
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("red, white,blue", "red whiteblue"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),
        ("(left)", "left"),
        ("what?!", "what"),
        ("it's 5:30", "it's 5:30"),
        ("50%", "50%"),
        # Digits in groups: all marks vanish.
        ("1,000", "1000"),
        ("1,000-ton", "1000ton"),
        ("1,a-b", "1 b"),
        # Periods before digits stay.
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("<=5.", "5"),
        ("u.s.a.", "usa"),
        ("no. 1", "no 1"),
        ("." * 34 + "x", "..x"),
        # Contractions.
        ("dont", "don't"),
        ("Shant", "shan't"),
        ("The T-junction, at ten, yall.", "t junction at 10 y'all"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("twas", "'twas"),
        # Quirks of the published table.
        ("im", "im"),
        ("Id've", "id've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("shed", "shed"),
    ],
)
def test_an_answer_as_the_evaluation_compares_it(text, normalised):
    assert normalise_answer(text) == normalised


def brute_force(answer, people):
    """Compare with each ten choose nine."""
    return np.mean([min(1, nine.count(answer) / 3) for nine in combinations(people, 9)])


@pytest.mark.parametrize("matches", range(10))
def test_accuracy_is_the_mean_over_nine_of_ten(matches):
    people = ["red"] * matches + [f"colour {number}" for number in range(10 - matches)]
    assert vqa_accuracy("red", people) == pytest.approx(brute_force("red", people))
    assert vqa_accuracy("red", people) == pytest.approx(soft_score(matches))


def test_soft_scores():
    assert [soft_score(count) for count in (0, 1, 2, 3, 4, 10)] == [0, 0.3, 0.6, 0.9, 1, 1]


@pytest.mark.parametrize(
    ("answer", "people", "accuracy"),
    [
        # Both sides are normalised where people differ.
        ("2", ["two"] * 3 + ["3"] * 7, 0.9),
        ("The dog.", ["a dog"] * 2 + ["cat"] * 8, 0.6),
        ("1,000", ["1000"] + ["many"] * 9, 0.3),
        ("yall", ["y'all"] * 5 + ["is"] * 5, 1.0),
        # Two answers that are as frequent are both right.
        ("left", ["left"] * 5 + ["right"] * 5, 1.0),
        ("right", ["left"] * 5 + ["right"] * 5, 1.0),
        # Where they do not differ, not even in capitals, nothing is.
        ("yes", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("2", ["two"] * 10, 0.0),
        ("two\n", [" two"] * 10, 1.0),
        ("2", ["two"] * 9 + ["Two"], 1.0),
        # An article by itself is nothing.
        ("", ["a"] * 4 + ["b"] * 6, 1.0),
    ],
)
def test_accuracy(answer, people, accuracy):
    assert vqa_accuracy(answer, people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("people", "accuracy"),
    [(["x"], 1), (["y"], 0), (["x", "x"], 1), (["x", "y"], 0.5), (["x", "x", "x"], 1)],
)
def test_accuracy_by_fewer_people(people, accuracy):
    assert vqa_accuracy("x", people) == accuracy


def test_accuracy_by_nobody():
    with pytest.raises(UsageError, match="of which there are none"):
        vqa_accuracy("x", ())


def answered(folder, *entries):
    """Open a set of one question for each entry: answers, and perhaps the main one and types."""
    entries = [entry if isinstance(entry, dict) else {"answers": entry} for entry in entries]
    ids = range(1, len(entries) + 1)
    annotations = [annotate(n, 1, **entry) for n, entry in zip(ids, entries, strict=True)]
    own_part(folder, [ask(n, 1) for n in ids], annotations, images=(1,))
    return open_question_set(str(folder), split="val", root=folder)


def test_the_vocabulary_is_of_the_commonest_main_answers(tmp_path):
    mains = ["no"] * 3 + ["Two", "2", "two."] + ["a, b"] * 2 + ["b"] + ["cat"] * 4 + ["dog"]
    one = answered(tmp_path / "a", *({"answers": ["other"], "main": main} for main in mains))
    two = answered(tmp_path / "b", {"answers": ["other"], "main": "the dog"})
    assert build_vocabulary([one, two], min_count=3) == ("cat", "2", "b", "no")
    assert build_vocabulary([two, one], min_count=2) == ("cat", "2", "b", "no", "dog")
    assert build_vocabulary(iter([one]), min_count=4) == ("cat",)
    with pytest.raises(UsageError, match="no answer is the main one of 9 questions"):
        build_vocabulary([one, two])


def test_the_vocabulary_passes_over_sets_without_answers(tmp_path):
    own_part(tmp_path, [ask(number, 1) for number in range(20)], images=(1,))
    silent = open_question_set(str(tmp_path), split="val", root=tmp_path)
    with pytest.raises(UsageError, match="take a set with annotations"):
        build_vocabulary([silent])


def test_targets_count_normalised_answers():
    people = ["two"] * 2 + ["2"] + ["a dog", "dog", "Dog.", "the dog!"] + ["rare"] * 2 + ["no"]
    numbers, scores = targets(people, {"no": 5, "dog": 3, "2": 1, "yes": 0})
    assert numbers.dtype == np.int64
    assert scores.dtype == np.float32
    assert numbers.tolist() == [1, 3, 5]
    np.testing.assert_allclose(scores, [0.9, 1, 0.3], rtol=1e-6)
    numbers, scores = targets(["rare"], {"no": 0})
    assert numbers.shape == scores.shape == (0,)


def test_measure(tmp_path):
    ten = ["1"] * 2 + ["many"] * 8
    questions = answered(
        tmp_path,
        {"answers": ["yes"] * 10, "kind": "yes/no", "begins": "is"},
        {"answers": ["yes"] * 5 + ["no"] * 5, "kind": "yes/no", "begins": "is"},
        {"answers": ten, "kind": "number", "begins": "how many"},
        {"answers": ten, "kind": "", "begins": ""},
    )
    found = measure({1: "no", 2: "No", 3: "one", 99: "many"}, questions)
    assert found == pytest.approx(
        {
            "accuracy": (0 + 1 + 0.6 + 0) / 4,
            "accuracy/yes/no": 0.5,
            "accuracy/number": 0.6,
            "type/is": 0.5,
            "type/how many": 0.6,
        }
    )
    assert next(iter(found)) == "accuracy"
    assert measure({}, questions)["accuracy"] == 0
    assert measure({4: "many"}, questions)["accuracy"] == 0.25


def test_measure_needs_answers(tmp_path):
    own_part(tmp_path, [ask(1, 1)], part="test")
    questions = open_question_set(str(tmp_path), split="test", root=tmp_path)
    with pytest.raises(UsageError, match=r"\(test\) has no published answers to measure by"):
        measure({1: "yes"}, questions)


def test_a_submission_is_a_list_of_ids_and_answers(tmp_path):
    path = tmp_path / "answers.json"
    write_submission(path, np.array([262144000, 3], np.int64), ["yes", "se\u00f1or"])
    assert json.loads(path.read_text()) == [
        {"question_id": 262144000, "answer": "yes"},
        {"question_id": 3, "answer": "se\u00f1or"},
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["answers.json"]
    with pytest.raises(ValueError, match="shorter"):
        write_submission(path, [1, 2], ["yes"])
    with pytest.raises(UniclError, match="cannot write"):
        write_submission(tmp_path / "absent/answers.json", [1], ["yes"])
