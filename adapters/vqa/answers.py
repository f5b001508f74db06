"""Answers to questions as VQA's evaluation compares them, and the ones that a model chooses from.

The rules and their quirks are those of the evaluation tools of VQA (Antol et al. 2015; Goyal et al.
2017), of which the server that scores VQAv2's test parts runs a copy.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
from jaxtyping import Float32, Int64

from adapters.vqa.questions import QuestionSet
from unicl.data.atomic import atomic_file
from unicl.errors import UsageError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
# The published pattern also tries to look behind, for a digit, but is misspelt and never does: the
# dot of "5." goes, too.
_PERIOD = re.compile(r"\.(?!\d)")
# The published call gives a flag where the count belongs: re.UNICODE, which is 32.
_MOST_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}

# The forms of VQA's table, which lists each with one of its apostrophes left out, and so repairs
# "couldnt've" and "couldn'tve" but not "couldntve". Its forms of "I" are not here: they are upper
# case, and what is looked up is lower case.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, letter in enumerate(form)
    if letter == "'"
}
# The table has this one the wrong way round.
_REPAIRED["somebody'd"] = "somebodyd"

_ENOUGH = 3
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


def normalise_answer(text: str) -> str:
    """Return an answer as VQA's evaluation compares it.

    Without punctuation, articles and capitals, with digits for the words of numbers up to ten, and
    with the apostrophes of contractions: `The T-junction, at ten, yall.` becomes
    `t junction at 10 y'all`.
    """
    text = _on_one_line(text)
    kept = text
    grouped = _GROUPED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            vanishes = grouped or f"{mark} " in text or f" {mark}" in text
            kept = kept.replace(mark, "" if vanishes else " ")
    kept = _PERIOD.sub("", kept, count=_MOST_PERIODS)
    words = (_DIGITS.get(word, word) for word in kept.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


# VQAv2's 6.6 million answers are mostly the same few: looking up takes a tenth of the time.
_normalised = lru_cache(maxsize=1 << 18)(normalise_answer)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of an answer, from 0 to 1, by what people answered.

    It is right if three others say the same. Each person is left out once, and the mean is taken,
    so that people themselves can be scored alike. As in VQA's evaluation, where all people say
    letter by letter the same, only that counts, and nothing is normalised.

    VQA asks ten people. Where fewer than four were asked all others must agree; a single answer
    must be met.

    Raises:
        UsageError: There are no answers of people.
    """
    if not people:
        raise UsageError("an answer is scored by people's answers, of which there are none")
    answer, people = _on_one_line(answer), [_on_one_line(each) for each in people]
    if len(set(people)) > 1:
        answer, people = _normalised(answer), [_normalised(each) for each in people]
    matches, others = people.count(answer), len(people) - 1
    if not others:
        return float(matches)
    enough = min(_ENOUGH, others)
    # Without one of the `matches` people, and without one of the rest.
    left = matches * min(matches - 1, enough) + (len(people) - matches) * min(matches, enough)
    return left / (enough * len(people))


def soft_score(count: int) -> float:
    """Return what an answer is worth that so many of ten people gave: its `vqa_accuracy`."""
    return _SOFT_SCORES[min(count, len(_SOFT_SCORES) - 1)]


def build_vocabulary(sets: Iterable[QuestionSet], *, min_count: int = 9) -> tuple[str, ...]:
    """Return the answers that a model chooses from, the commonest first.

    They are the normalised main answers to at least `min_count` questions, of which VQAv2's train
    and val together have 3,129 with 9. One may be empty: `a` is, normalised.

    Raises:
        UsageError: There is none.
    """
    counts: Counter[str] = Counter()
    for each in sets:
        if each.annotated:
            counts.update(map(_normalised, each.main_answers))
    common = [(-count, answer) for answer, count in counts.items() if count >= min_count]
    if not common:
        raise UsageError(
            f"no answer is the main one of {min_count} questions; lower "
            "vqa.min_answer_count, or take a set with annotations"
        )
    return tuple(answer for _, answer in sorted(common))


def targets(
    answers: Sequence[str], numbers: Mapping[str, int]
) -> tuple[Int64[np.ndarray, " known"], Float32[np.ndarray, " known"]]:
    """Return what a model should answer to a question.

    Args:
        answers: Of people.
        numbers: The vocabulary's answers, each with its number.

    Returns:
        Numbers of the answers given that are in the vocabulary, in rising order, and their soft
        scores.
    """
    counts = Counter(map(_normalised, answers))
    known = sorted((numbers[each], soft_score(n)) for each, n in counts.items() if each in numbers)
    return (
        np.array([number for number, _ in known], np.int64),
        np.array([score for _, score in known], np.float32),
    )


def measure(predicted: Mapping[int, str], questions: QuestionSet) -> dict[str, float]:
    """Return VQA's accuracy, from 0 to 1: of all questions, and of those of each type.

    Args:
        predicted: Answers by the questions' ids. A question without one is answered wrongly.
        questions: What was asked.

    Returns:
        `accuracy`, `accuracy/ANSWER_TYPE` for each type of answer, and `type/QUESTION_TYPE` for
        each type of question.

    Raises:
        UsageError: The set has no answers of people.
    """
    if not questions.annotated:
        raise UsageError(
            f"{questions} has no published answers to measure by; write a submission for the "
            "server, or measure on another split"
        )
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for number, people, answer_type, question_type in zip(
        questions.question_ids.tolist(),
        questions.answers,
        questions.answer_types,
        questions.question_types,
        strict=True,
    ):
        score = vqa_accuracy(predicted[number], people) if number in predicted else 0.0
        for key in ("accuracy", f"accuracy/{answer_type}", f"type/{question_type}"):
            scores[key].append(score)
    return {key: fmean(scores[key]) for key in sorted(scores) if not key.endswith("/")}


def write_submission(
    path: Path, question_ids: Sequence[int] | Int64[np.ndarray, " num"], answers: Sequence[str]
) -> None:
    """Write answers as EvalAI takes them: a JSON list of question_id and answer.

    Raises:
        UniclError: It cannot be written.
    """
    rows = [
        {"question_id": int(number), "answer": answer}
        for number, answer in zip(question_ids, answers, strict=True)
    ]
    with atomic_file(path) as file:
        file.write(json.dumps(rows).encode())
