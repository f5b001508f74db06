"""The contract between the engine and what it trains: inputs per tower in, one loss out."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TaskInputs:
    """A batch as a task sees it."""

    towers: dict[str, Tensor]
    """Per tower the rows it encodes; rows are independent, so they may be encoded in chunks.

    What the loss learns besides, such as a scale, is a tower of one row: every gradient of the
    model comes through `encode`."""
    context: dict[str, Tensor]
    """What the loss needs besides the encoded rows, such as labels; never split."""
    frozen: frozenset[str] = frozenset()
    """Towers without anything to learn."""

    def to(self, device: torch.device) -> "TaskInputs":
        """Return the inputs on another device."""
        return TaskInputs(
            {name: rows.to(device, non_blocking=True) for name, rows in self.towers.items()},
            {name: value.to(device, non_blocking=True) for name, value in self.context.items()},
            self.frozen,
        )


@runtime_checkable
class Task(Protocol):
    """What the engine trains; pretraining, detection and question answering are tasks."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def inputs(self, batch: Any) -> TaskInputs:
        """Lay out this rank's part of a batch for the towers, still on the CPU."""

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Encode rows [n, ...] of one tower into embeddings [n, dim]."""

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the scalar loss over all rows of all towers, and metrics worth logging.

        Across ranks the loss is the whole batch's, on every rank; the ranks' gradients average to
        its gradient.
        """
