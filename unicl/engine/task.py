"""The contract between the engine and what it trains: inputs per tower in, one loss out."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class TaskInputs:
    """A batch as a task sees it."""

    towers: dict[str, Tensor]
    """Per tower the rows it encodes; rows are independent, so they may be encoded in chunks."""
    context: dict[str, Tensor]
    """What the loss needs besides the encoded rows, such as labels; never split."""


@runtime_checkable
class Task(Protocol):
    """What the engine trains; pretraining, detection and question answering are tasks."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def inputs(self, batch: Any) -> TaskInputs:
        """Lay out a batch, already on the device, for the towers."""

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Encode rows [n, ...] of one tower into embeddings [n, dim]."""

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the scalar loss over all rows of all towers, and metrics worth logging."""
