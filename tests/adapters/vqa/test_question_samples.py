import logging

import numpy as np
import pytest
import torch

from adapters.vqa.answers import targets
from adapters.vqa.question_samples import TOO_LONG, AnswerTargets, QuestionSamples, trainable
from adapters.vqa.questions import open_question_set
from adapters.vqa.tokens import ClipTokens
from tests.adapters.vqa.layouts import annotate, ask, own_part
from unicl.data.reader import SampleSet
from unicl.data.shards import SampleError
from unicl.errors import UsageError

VOCABULARY = ("red", "blue", "2", "dark red", "never")
ANSWERS = (
    ("red",) * 6 + ("dark red",) * 4,
    ("Blue.",) * 2 + ("two", "2") + ("unknown",) * 6,
    ("unknown",) * 10,
    ("the red",) * 10,
)
TEXTS = ("What colour?", "How many are there?", "Why?", "What colour is the large thing there?")


@pytest.fixture
def questions(tmp_path):
    # The third is about the image of the first.
    images = (1, 2, 1, 2)
    pairs = enumerate(zip(images, TEXTS, strict=True))
    asked = [ask(n + 10, image, text) for n, (image, text) in pairs]
    annotated = [annotate(n + 10, images[n], answers) for n, answers in enumerate(ANSWERS)]
    own_part(tmp_path, asked, annotated)
    return open_question_set(str(tmp_path), split="val", root=tmp_path)


def row_of(questions, text):
    return questions.questions.index(text)


def test_a_sample_is_an_image_and_a_question_with_its_row(questions):
    samples = QuestionSamples(questions)
    assert isinstance(samples, SampleSet)
    assert samples.num_samples == 4
    assert samples.shard_sizes.tolist() == [4]
    for index in range(4):
        sample = samples.read(index)
        assert sample.text.decode() == questions.questions[index]
        image = questions.images.read(int(questions.rows[index]))
        assert (sample.key, sample.image) == (image.key, image.image)
        assert samples.label(index, "", "") == index
        assert samples.locate(index) == questions.images.locate(int(questions.rows[index]))
    keys = {text: samples.read(row_of(questions, text)).key for text in TEXTS}
    assert keys[TEXTS[0]] == keys[TEXTS[2]] != keys[TEXTS[1]]
    assert samples.digest() == questions.digest()


def test_chosen_rows_keep_their_numbers(questions):
    samples = QuestionSamples(questions, np.array([3, 1]))
    assert samples.num_samples == 2
    assert [samples.label(index, "", "") for index in range(2)] == [3, 1]
    for index, row in enumerate((3, 1)):
        assert samples.read(index).text.decode() == questions.questions[row]
        assert samples.locate(index) == QuestionSamples(questions).locate(row)


def test_a_question_that_is_too_long_is_left_out(questions):
    # "how many are there ?" with start and end.
    samples = QuestionSamples(questions, tokens=ClipTokens(7))
    row = row_of(questions, TEXTS[3])
    with pytest.raises(SampleError, match=TOO_LONG):
        samples.read(row)
    assert samples.read(row_of(questions, TEXTS[1])).text.decode() == TEXTS[1]
    with pytest.raises(SampleError, match=TOO_LONG):
        QuestionSamples(questions, tokens=ClipTokens(6)).read(row_of(questions, TEXTS[1]))
    assert QuestionSamples(questions).read(row).text.decode() == TEXTS[3]


def test_targets_are_those_of_each_question(questions):
    known = AnswerTargets(questions, VOCABULARY)
    numbers = {answer: number for number, answer in enumerate(VOCABULARY)}
    dense = np.zeros((4, len(VOCABULARY)), np.float32)
    for row, people in enumerate(questions.answers):
        places, scores = targets(people, numbers)
        dense[row, places] = scores
    rows = torch.tensor([2, 0, 3, 1, 0])
    found = known.of(rows)
    np.testing.assert_array_equal(found, dense[rows])
    assert known.of(rows[:0]).shape == (0, 5)
    # Written out, once.
    by_text = {text: known.of(torch.tensor([row_of(questions, text)]))[0] for text in TEXTS}
    torch.testing.assert_close(by_text[TEXTS[0]], torch.tensor([1.0, 0, 0, 1, 0]))
    torch.testing.assert_close(by_text[TEXTS[1]], torch.tensor([0, 0.6, 0.6, 0, 0]))
    assert not by_text[TEXTS[2]].any()
    torch.testing.assert_close(by_text[TEXTS[3]], torch.tensor([1.0, 0, 0, 0, 0]))
    assert known.counts.tolist() == (dense > 0).sum(1).tolist()


def test_what_has_no_known_answer_is_left_out_and_told(questions, caplog):
    known = AnswerTargets(questions, VOCABULARY)
    with caplog.at_level(logging.WARNING, logger="unicl"):
        samples = trainable(questions, known, ClipTokens(6))
    unknown = row_of(questions, TEXTS[2])
    labels = [samples.label(index, "", "") for index in range(samples.num_samples)]
    assert labels == [row for row in range(4) if row != unknown]
    assert "left out 1 of 4 questions, whose answers are not in the vocabulary" in caplog.text
    with pytest.raises(SampleError, match=TOO_LONG):
        samples.read(labels.index(row_of(questions, TEXTS[3])))


def test_where_all_are_known_nothing_is_told(questions, caplog):
    known = AnswerTargets(questions, (*VOCABULARY, "unknown"))
    with caplog.at_level(logging.WARNING, logger="unicl"):
        assert trainable(questions, known, ClipTokens(24)).num_samples == 4
    assert not caplog.records


@pytest.mark.parametrize("vocabulary", [("never",), ()])
def test_nothing_to_learn_is_refused(questions, vocabulary):
    known = AnswerTargets(questions, vocabulary)
    with pytest.raises(UsageError, match=r"no question of .*\(val\) has an answer that is in"):
        trainable(questions, known, ClipTokens(24))
