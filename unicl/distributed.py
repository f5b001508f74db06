"""Ranks: who they are, and the few things they say to each other.

One process alone is a group of one; every exchange is then free, so that nothing above has to know
whether it runs on one rank or on many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch, as one of them sees them."""

    group: ProcessGroup | None = None
    """None is a single process that talks to nobody."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return which of `total` consecutive things are this rank's; sizes differ by one."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum_(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, row: Tensor) -> Tensor:
        """Return every rank's `row`, all of one shape, as [size, ...]."""
        if self.group is None:
            return row[None]
        rows = row.new_empty(self.size, *row.shape)
        dist.all_gather_into_tensor(rows.view(-1), row.reshape(-1), group=self.group)
        return rows

    def gather_numbers(self, *numbers: int, device: torch.device | str = "cpu") -> list[list[int]]:
        """Return every rank's numbers, one list a rank; waits for the slowest rank."""
        return self.gather(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the ranks' rows [sizes[rank], ...]; no gradient comes back through this."""
        if self.group is None:
            return rows
        gathered = self.gather(_padded(rows, max(sizes)))
        if min(sizes) == max(sizes):
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def scatter_sum(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this rank's rows of the sum over all ranks: what gives `gather_rows` gradients."""
        if self.group is None:
            return rows
        longest = max(sizes)
        if min(sizes) != longest:
            rows = torch.cat([_padded(part, longest) for part in rows.split(list(sizes))])
        own = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(own.view(-1), rows.reshape(-1), group=self.group)
        return own[: sizes[self.rank]]

    def gather_objects(self, value: Value) -> list[Value]:
        """Return every rank's value, pickled on the way; for small and rare things."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = Ranks()
"""A process by itself."""


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
