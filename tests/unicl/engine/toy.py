"""A task small enough to train in milliseconds: two linear towers with dropout."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unicl.distributed import ALONE, Ranks
from unicl.engine.task import TaskInputs
from unicl.loss import unicl_loss


@dataclass(frozen=True)
class ToyBatch:
    left: Tensor
    right: Tensor
    labels: Tensor
    consumed: int
    keys: tuple[str, ...]
    skipped: dict[str, int] = field(default_factory=dict)


class ToyModel(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.right = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


class ToyTask:
    def __init__(self, model: ToyModel, ranks: Ranks = ALONE) -> None:
        self.model, self.ranks = model, ranks

    def inputs(self, batch: Any) -> TaskInputs:
        towers = {"left": batch.left, "right": batch.right, "scale": torch.zeros(1)}
        return TaskInputs(towers=towers, context={"labels": batch.labels})

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        if tower == "scale":
            return self.model.logit_scale.exp()[None]
        return nn.functional.normalize(getattr(self.model, tower)(rows).float(), dim=-1)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (scale,) = embeddings["scale"]
        labels = context["labels"]
        loss = unicl_loss(
            embeddings["left"], embeddings["right"], labels, scale, group=self.ranks.group
        )
        return loss, {"scale": scale.detach()}


class ToyLoader:
    """Batches that are a pure function of the stream position, like the real loader's."""

    def __init__(self, batch_size: int = 8, poison: int | None = None) -> None:
        self.batch_size, self.poison = batch_size, poison

    def batches(self, start: int = 0):
        while True:
            yield self.batch(start)
            start += self.batch_size

    def batch(self, start: int) -> ToyBatch:
        generator = torch.Generator().manual_seed(start)
        left, right = torch.randn(2, self.batch_size, 6, generator=generator)
        if self.poison is not None and start == self.poison * self.batch_size:
            left = left * float("nan")
        return ToyBatch(
            left=left,
            right=right,
            labels=torch.randint(0, 4, (self.batch_size,), generator=generator),
            consumed=start + self.batch_size,
            keys=tuple(str(start + i) for i in range(self.batch_size)),
        )
