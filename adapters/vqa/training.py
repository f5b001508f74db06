"""Answers and captions as tasks: what follows pretraining (Florence 3.7)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from adapters.vqa.meter import Meter
from adapters.vqa.question_samples import AnswerTargets
from unicl.data.loader import Batch
from unicl.distributed import ALONE, Ranks, whole_means
from unicl.engine.task import TaskInputs


class Answering:
    """Images and questions into the binary cross-entropy of every answer, summed over answers.

    Args:
        model: The towers, co-attention and head.
        targets: How right each answer is for each question.
        ranks: The processes that share a batch.
    """

    def __init__(self, model: Meter, targets: AnswerTargets, *, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.targets = targets
        self.ranks = ranks

    def inputs(self, batch: Batch) -> TaskInputs:
        """Lay out images with questions, and how right each answer is."""
        pairs = {"images": batch.images, "tokens": batch.tokens}
        return TaskInputs({"pairs": pairs}, {"targets": self.targets.of(batch.labels)})

    def encode(self, tower: str, rows: dict[str, Tensor]) -> Float[Tensor, "pairs answers"]:
        """Return a logit per answer."""
        return self.model.answer(self.model.look(rows["images"]), rows["tokens"])

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean over the whole batch, and how right the best answers are."""
        logits, targets = embeddings["pairs"], context["targets"]
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")[None]
        best = logits.detach().argmax(1, keepdim=True)
        right = targets.gather(1, best).sum()[None]
        count = losses.new_tensor([len(targets)])
        (loss,), (share,) = whole_means(losses, count, self.ranks, right)
        return loss, {"answers/accuracy": share}


class Captioning:
    """Images and captions into the cross-entropy of each token, given those before it.

    Args:
        model: The towers, co-attention and head.
        ranks: The processes that share a batch.
    """

    def __init__(self, model: Meter, *, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks

    def inputs(self, batch: Batch) -> TaskInputs:
        """Lay out images with captions."""
        pairs = {"images": batch.images, "tokens": batch.tokens}
        return TaskInputs({"pairs": pairs}, {})

    def encode(self, tower: str, rows: dict[str, Tensor]) -> Float[Tensor, "pairs 3"]:
        """Return for each pair the loss of its tokens, how many were guessed, and of how many."""
        losses, *counts = self.model.next_words(self.model.look(rows["images"]), rows["tokens"])
        return torch.stack([losses, *(count.float() for count in counts)], 1)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean over all tokens of the whole batch, and the share that was guessed."""
        losses, guessed, counts = embeddings["pairs"].sum(0).split(1)
        means, (share,) = whole_means(losses, counts.detach(), self.ranks, guessed.detach())
        return means[0], {"words/accuracy": share}
