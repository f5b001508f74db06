"""The contract between the engine and what it trains: inputs per tower in, one loss out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Rows = Tensor | dict[str, Tensor]
"""What a tower encodes, one row per sample: a tensor [n, ...], or several by name, of which a
sample has its row of each, as an image and its question."""


def num_rows(rows: Rows) -> int:
    """Return how many samples there are."""
    return len(rows if isinstance(rows, Tensor) else next(iter(rows.values())))


def map_rows(function: Callable[[Tensor], Tensor], rows: Rows) -> Rows:
    """Apply a function to a tensor, or to each of several."""
    if isinstance(rows, Tensor):
        return function(rows)
    return {name: function(tensor) for name, tensor in rows.items()}


@dataclass(frozen=True)
class TaskInputs:
    """A batch as a task sees it."""

    towers: Mapping[str, Rows]
    """Per tower the rows it encodes; rows are independent, so they may be encoded in chunks.

    What the loss learns besides, such as a scale, is a tower of one row: every gradient of the
    model comes through `encode`."""
    context: dict[str, Tensor]
    """What the loss needs besides the encoded rows, such as labels; never split."""
    frozen: frozenset[str] = frozenset()
    """Towers without anything to learn."""

    def to(self, device: torch.device) -> "TaskInputs":
        """Return the inputs on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return TaskInputs(
            {name: map_rows(moved, rows) for name, rows in self.towers.items()},
            {name: moved(value) for name, value in self.context.items()},
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

    def encode(self, tower: str, rows: Any) -> Tensor:
        """Encode rows [n, ...] of one tower, laid out by `inputs`, into embeddings [n, dim]."""

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the scalar loss over all rows of all towers, and metrics worth logging.

        Across ranks the loss is the whole batch's, on every rank; the ranks' gradients average to
        its gradient.
        """
