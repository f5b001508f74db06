"""What a run is measured by while it learns: matching and hidden words, answers, captions."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adapters.vqa.answers import measure
from adapters.vqa.caption_metrics import caption_metrics
from adapters.vqa.meter import Meter
from adapters.vqa.objectives import VisionLanguagePretraining
from adapters.vqa.questions import QuestionSet
from adapters.vqa.speaking import Speaker
from unicl.data.image_sets import CaptionSet
from unicl.data.loader import Batch, Loader
from unicl.evaluation.embeddings import device_of, evaluating
from unicl.evaluation.results import QUESTION_TYPE

_FEW_TYPES = 6


class PretrainingAccuracy:
    """Evaluator: how often a text is told from one drawn at random, and hidden tokens guessed.

    Args:
        loader: Held-out pairs.
        task: Lays them out and encodes them; its model is not used.
    """

    def __init__(self, loader: Loader, task: VisionLanguagePretraining) -> None:
        self.loader = loader
        self.task = task

    def __call__(self, model: Meter) -> dict[str, float]:
        """Return `matching/accuracy` and `words/accuracy`."""
        ranks = self.loader.ranks
        sums = ranks.together(lambda: self._own_sums(model))
        right, pairs, guessed, hidden = ranks.sum_(sums).tolist()
        return {
            "matching/accuracy": right / max(2 * pairs, 1),
            "words/accuracy": guessed / max(hidden, 1),
        }

    def _own_sums(self, model: Meter) -> Float[Tensor, "4"]:
        device = device_of(model)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        with evaluating(model):
            for batch in self.loader.epoch():
                if not batch.keys:
                    continue
                inputs = self.task.inputs(batch).to(device)
                own, other, _, guessed = self.task.encode_with(model, inputs.towers["pairs"]).T
                found = [(own > 0).sum() + (other < 0).sum(), len(own), guessed.sum()]
                found.append(inputs.context["num_hidden"].sum())
                sums += torch.stack([torch.as_tensor(each, device=device) for each in found])
        return sums


class AnswerAccuracy:
    """Evaluator: VQA's accuracy of the best answers.

    Args:
        questions: Held-out questions with people's answers.
        loader: The same, whose labels are their rows.
        answers: The vocabulary.
    """

    def __init__(self, questions: QuestionSet, loader: Loader, answers: Sequence[str]) -> None:
        self.questions = questions
        self.loader = loader
        self.answers = answers

    def __call__(self, model: Meter) -> dict[str, float]:
        """Return `vqa/accuracy`, `vqa/accuracy/TYPE` of answers, and of few `vqa/type/TYPE`.

        One figure for all hides a type of question that is not learned; of VQAv2's 65 a log line
        has no room.
        """
        said = answer_all(model, self.loader, self.questions, self.answers)
        found = measure(said, self.questions)
        if len(set(self.questions.question_types)) > _FEW_TYPES:
            found = {n: share for n, share in found.items() if not n.startswith(QUESTION_TYPE)}
        return {f"vqa/{name}": share for name, share in found.items()}


def answer_all(
    model: Meter, loader: Loader, questions: QuestionSet, answers: Sequence[str]
) -> dict[int, str]:
    """Return the best answer to every question whose image can be read, by the question's id."""

    def answer(images: Tensor, tokens: Tensor) -> Tensor:
        return model.answer(model.look(images), tokens).argmax(1)

    rows, best = for_all(model, loader, answer)
    ids = questions.question_ids[rows.numpy()].tolist()
    return {number: answers[each] for number, each in zip(ids, best.tolist(), strict=True)}


def for_all(
    model: Meter, loader: Loader, work: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Int64[Tensor, " samples"], Int64[Tensor, " samples"]]:
    """Return the labels of all samples, and a number that is found for each; ranks share the work.

    Args:
        model: What works.
        loader: The samples.
        work: Makes numbers [n] of images [n, ...] and tokens [n, length].
    """
    ranks, device = loader.ranks, device_of(model)

    def own() -> Int64[Tensor, "samples 2"]:
        found = [torch.empty(0, 2, dtype=torch.int64)]
        with evaluating(model):
            for batch in loader.epoch():
                if batch.keys:
                    numbers = work(batch.images.to(device), batch.tokens.to(device))
                    found.append(torch.stack([batch.labels, numbers.cpu()], 1))
        return torch.cat(found).to(device)

    rows = ranks.together(own)
    sizes = [size for (size,) in ranks.gather_numbers(len(rows))]
    labels, numbers = ranks.gather_rows(rows, sizes).cpu().T
    return labels, numbers


class CaptionQuality:
    """Evaluator: CIDEr and BLEU of captions.

    Args:
        images: Held-out images with people's captions.
        loader: The same, whose labels are their rows.
        build_speaker: Makes what says captions, of a model.
    """

    def __init__(
        self, images: CaptionSet, loader: Loader, build_speaker: Callable[[Meter], Speaker]
    ) -> None:
        self.images = images
        self.loader = loader
        self.build_speaker = build_speaker

    def __call__(self, model: Meter) -> dict[str, float]:
        """Return `captions/cider` and `captions/bleu1` to `captions/bleu4`."""
        said = caption_all(self.build_speaker(model), self.loader)
        found = caption_metrics(said, dict(enumerate(self.images.captions)))
        return {f"captions/{name}": value for name, value in found.items()}


def caption_all(speaker: Speaker, loader: Loader) -> dict[int, str]:
    """Return a caption of every image that can be read, by its label; ranks share the work."""
    ranks, device = loader.ranks, device_of(speaker.model)

    def own() -> dict[int, str]:
        found: dict[int, str] = {}
        with evaluating(speaker.model):
            for batch in loader.epoch():
                found |= _said(speaker, batch, device)
        return found

    parts = ranks.gather_objects(ranks.together(own))
    return {label: caption for part in parts for label, caption in part.items()}


def _said(speaker: Speaker, batch: Batch, device: torch.device) -> dict[int, str]:
    if not batch.keys:
        return {}
    numbers = batch.labels.tolist()
    captions = speaker.captions(speaker.model.look(batch.images.to(device)), numbers)
    return dict(zip(numbers, captions, strict=True))
