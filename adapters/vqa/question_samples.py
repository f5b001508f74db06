"""Questions as the loader's samples, and what is to be answered to each."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from adapters.vqa.answers import targets
from adapters.vqa.questions import QuestionSet
from adapters.vqa.tokens import Tokens
from unicl.data.shards import RawSample, SampleError
from unicl.errors import UsageError

logger = logging.getLogger("unicl")

TOO_LONG = "question too long"
"""Why a question is left out that the text encoder would see the beginning of only."""


class QuestionSamples:
    """A sample per question: its image, its words, and as label its row in the set.

    Args:
        questions: The set.
        rows: Which of its questions; unset is all.
        tokens: Questions that do not fit these are left out by the loader; unset keeps them.
    """

    def __init__(
        self,
        questions: QuestionSet,
        rows: Int64[np.ndarray, " chosen"] | None = None,
        *,
        tokens: Tokens | None = None,
    ) -> None:
        self.questions = questions
        self.rows = np.arange(questions.num_questions) if rows is None else rows
        self._tokens = tokens

    @property
    def num_samples(self) -> int:
        """Number of questions."""
        return len(self.rows)

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " 1"]:
        """Number of questions, as of a single shard: files need no order of reading."""
        return np.array([self.num_samples], np.int64)

    def digest(self) -> str:
        """Return a digest of the questions, their images and their order."""
        return self.questions.digest()

    def read(self, index: int) -> RawSample:
        """Return the encoded image and the question.

        Raises:
            SampleError: The image is out of reach, or the question too long.
        """
        row = int(self.rows[index])
        if self._tokens is not None and not self._tokens.fits(self.questions.questions[row]):
            raise SampleError(TOO_LONG)
        image = self.questions.images.read(int(self.questions.rows[row]))
        return RawSample(image.key, image.image, self.questions.questions[row].encode())

    def label(self, index: int, text: str, key: str) -> int:
        """Return the question's row in the set."""
        return int(self.rows[index])

    def locate(self, index: int) -> tuple[str, int]:
        """Return the file of a question's image, and the image's number."""
        return self.questions.images.locate(int(self.questions.rows[self.rows[index]]))


class AnswerTargets:
    """How right each answer of a vocabulary is for each question, from 0 to 1.

    Args:
        questions: The set, with people's answers.
        vocabulary: The answers that a model chooses from.
    """

    def __init__(self, questions: QuestionSet, vocabulary: Sequence[str]) -> None:
        self.num_answers = len(vocabulary)
        numbers: Mapping[str, int] = {answer: n for n, answer in enumerate(vocabulary)}
        found = [targets(answers, numbers) for answers in questions.answers]
        self.counts = np.array([len(known) for known, _ in found], np.int64)
        self._ends = self.counts.cumsum()
        self._numbers = np.concatenate([np.empty(0, np.int64), *(known for known, _ in found)])
        self._scores = np.concatenate([np.empty(0, np.float32), *(score for _, score in found)])

    def of(self, rows: Int64[Tensor, " questions"]) -> Float32[Tensor, "questions answers"]:
        """Return the targets of questions by their rows."""
        dense = torch.zeros(len(rows), self.num_answers)
        for place, row in enumerate(rows.tolist()):
            part = slice(self._ends[row] - self.counts[row], self._ends[row])
            dense[place, self._numbers[part]] = torch.from_numpy(self._scores[part])
        return dense


def trainable(questions: QuestionSet, known: AnswerTargets, tokens: Tokens) -> QuestionSamples:
    """Return the questions that can be learned from; what is left out is told.

    Raises:
        UsageError: None is left.
    """
    rows = known.counts.nonzero()[0]
    if not len(rows):
        raise UsageError(f"no question of {questions} has an answer that is in the vocabulary")
    if unknown := questions.num_questions - len(rows):
        logger.warning(
            "%s: left out %d of %d questions, whose answers are not in the vocabulary",
            *(questions, unknown, questions.num_questions),
        )
    return QuestionSamples(questions, rows, tokens=tokens)
