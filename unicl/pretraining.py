"""Pretraining as a task: two towers under the UniCL loss (Florence 2.2)."""

from typing import Any, Literal

import torch
from torch import Tensor

from unicl.distributed import ALONE, Ranks
from unicl.engine.task import TaskInputs
from unicl.loss import unicl_loss
from unicl.towers.text import deduplicate
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
        self._frozen = frozenset(
            name
            for name, tower in towers.items()
            if not any(parameter.requires_grad for parameter in tower.parameters())
        )

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
        return loss, {"scale": scale.detach()}

    def _encode_text(self, tokens: Tensor) -> Tensor:
        # Already unique; trimming happens per chunk, to the longest text of the chunk.
        return self.model.encode_text(tokens, deduplicated=True)
