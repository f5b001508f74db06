"""Pretraining as a task: two towers under the UniCL loss (Florence 2.2)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from unicl.distributed import ALONE, Ranks
from unicl.engine.task import TaskInputs, num_rows
from unicl.loss import unicl_loss
from unicl.towers.text import deduplicate, trim
from unicl.towers.two_tower import TwoTower


class Pretraining:
    """Image-text batches into the bidirectional supervised contrastive loss.

    Args:
        model: the two towers.
        targets: "unicl" takes samples with equal labels as positives of each other, "clip" only
            an image and its own text.
        tile: rows and columns of the logits that exist at one time.
        ranks: the processes that share a batch.
    """

    def __init__(
        self,
        model: TwoTower,
        *,
        targets: Literal["unicl", "clip"] = "unicl",
        tile: int = 2048,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.targets = targets
        self.tile = tile
        self.ranks = ranks
        towers = {"image": model.image, "text": model.text}
        self._frozen = frozenset(name for name, tower in towers.items() if not learns(tower))

    def inputs(self, batch: Any) -> TaskInputs:
        """Lay out images, unique texts, and the labels that tie them together."""
        texts, inverse = deduplicate(batch.tokens)
        labels = batch.labels
        if self.targets == "clip":
            # A number of its own for every pair on any rank: the ranks' take turns.
            labels = torch.arange(len(labels)) * self.ranks.size + self.ranks.rank
        return TaskInputs(
            towers={"image": batch.images, "text": texts, "scale": torch.zeros(1)},
            context={"labels": labels, "inverse": inverse},
            frozen=self._frozen,
        )

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] or tokens [n, context] into unit embeddings [n, dim].

        The tower "scale" is the factor of the similarities [1], whatever its row.
        """
        if tower == "scale":
            return self.model.scale()[None]
        return self.model.encode_image(rows) if tower == "image" else self._encode_text(rows)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss over the whole batch, and the scale it was computed with."""
        (scale,) = embeddings["scale"]
        loss = unicl_loss(
            embeddings["image"],
            embeddings["text"][context["inverse"]],
            context["labels"],
            scale,
            tile=self.tile,
            group=self.ranks.group,
        )
        similarities = _similarities(
            embeddings["image"].detach(),
            embeddings["text"].detach()[context["inverse"]],
            self.ranks,
        )
        return loss, {"scale": scale.detach(), **similarities}

    def _encode_text(self, tokens: Tensor) -> Tensor:
        # Already unique; trimming happens per chunk, to the longest text of the chunk.
        return self.model.encode_text(tokens, deduplicated=True)


class StepFlops:
    """Floating-point operations of a step, from those of one image and of one text.

    Made before an engine shares the weights out. A tower that learns costs its forward three times
    (the backward is two products for each of the forward), a locked one once. What is recomputed,
    by checkpointing or the gradient cache, does not count: these are the model's operations.

    Args:
        model: The two towers.
        image_shape: Shape of one image, or of what else the image tower takes.
        images_per_sample: How many of these a sample has, such as frames.
        context_length: Longest text in tokens; shorter ones cost proportionally less, which takes
            attention's small quadratic part as linear.
    """

    def __init__(
        self,
        model: TwoTower,
        *,
        image_shape: tuple[int, ...],
        context_length: int,
        images_per_sample: int = 1,
    ) -> None:
        text = count_flops(model.text, (1, context_length), torch.int64)
        self.per_image = count_flops(model.image, (1, *image_shape), torch.float32)
        self.per_image *= images_per_sample
        self.per_token = text / context_length
        self.per_image *= 3 if learns(model.image) else 1
        self.per_token *= 3 if learns(model.text) else 1

    def __call__(self, inputs: TaskInputs) -> float:
        """Return the operations of this rank's part of a batch, which is still on the CPU."""
        texts = inputs.towers["text"]
        assert isinstance(texts, Tensor)
        return (
            self.per_image * num_rows(inputs.towers["image"]) + self.per_token * trim(texts).numel()
        )


def count_flops(tower: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Count a forward's operations on tensors that have shapes, but neither memory nor values.

    It is 0 for a model whose shapes depend on values.
    """
    device = next(tower.parameters()).device
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)
    training = tower.training
    try:
        with torch.no_grad(), fake, counter:
            tower.eval()(torch.zeros(shape, dtype=dtype, device=device))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return 0.0
    finally:
        tower.train(training)
    return float(counter.get_total_flops())


def _similarities(images: Tensor, texts: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """Return the mean similarity of the batch's own pairs, and of every image with every text.

    Both follow from sums over the batch, so the ranks exchange a few numbers, and no matrix of
    similarities is needed: the mean of all <image, text> is <mean image, mean text>.
    """
    images, texts = images.float(), texts.float()
    pairs = torch.dot(images.flatten(), texts.flatten())[None]
    sums = torch.cat([images.sum(0), texts.sum(0), pairs, pairs.new_tensor([len(images)])])
    *vectors, pairs, count = ranks.sum_(sums).split([images.shape[1], texts.shape[1], 1, 1])
    return {
        "similarity/pairs": (pairs / count)[0],
        "similarity/all": torch.dot(*vectors) / count[0].square(),
    }


def learns(tower: nn.Module) -> bool:
    """Say whether a tower has anything to learn."""
    return any(parameter.requires_grad for parameter in tower.parameters())
