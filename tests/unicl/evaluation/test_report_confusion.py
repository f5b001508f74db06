import re

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from unicl.evaluation.answers import SavedAnswers
from unicl.evaluation.report.confusion import confusion


def saved(num_classes: int) -> SavedAnswers:
    random = np.random.default_rng(0)
    truths = random.integers(num_classes, size=400)
    guesses = np.where(random.random(400) < 0.5, truths, random.integers(num_classes, size=400))
    counts = confusion_matrix(truths, guesses, labels=range(num_classes))
    return SavedAnswers(tuple(f"<{n}>" for n in range(num_classes)), counts, ())


def test_few_classes_are_a_map_of_all_counts() -> None:
    answers = saved(10)
    assert answers.confusion is not None
    html = confusion(answers)
    rows = re.findall(r'<tr><th scope="row">.*?</tr>', html)
    cells = [[int(cell or 0) for cell in re.findall(r"<td[^>]*>(\d*)</td>", row)] for row in rows]
    assert cells == answers.confusion.tolist()
    assert "&lt;3&gt;" in html
    assert "<3>" not in html


def test_many_classes_are_the_pairs_confused_most() -> None:
    answers = saved(41)
    assert answers.confusion is not None
    html = confusion(answers)
    assert 'class="map"' not in html
    counts = [int(number) for number in re.findall(r"<td>(\d+) of \d+</td>", html)]
    wrong = answers.confusion - np.diag(np.diag(answers.confusion))
    assert counts == sorted(wrong[wrong > 0].tolist(), reverse=True)[:15]


def test_nothing_is_confused() -> None:
    right = SavedAnswers(tuple("abc") * 20, np.eye(60, dtype=np.int64), ())
    assert confusion(right) == ""


@pytest.mark.parametrize("counts", [None, np.zeros((2, 2), np.int64)])
def test_no_counts_no_map(counts: np.ndarray | None) -> None:
    assert confusion(SavedAnswers(("a", "b"), counts, ())) == ""
