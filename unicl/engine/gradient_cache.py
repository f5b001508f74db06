"""Forward and backward of one step, whole or in chunks (gradient cache, Gao et al. 2021).

Both give the same gradient. In chunks, first every row is encoded without a graph, then the loss
gives the gradient of each embedding, then each chunk is encoded again, with the seed of the first
time, and receives its rows of that gradient. One extra forward buys activations that
do not grow with the batch. Across ranks the gradient is averaged once, with the last chunk.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unicl.data.order import mix
from unicl.engine.backend import Backend
from unicl.engine.task import Rows, Task, TaskInputs, num_rows


def num_chunks(most_rows: int, chunk: int | None) -> int:
    """Return into how many chunks a step goes, given the most rows of any tower on any rank."""
    return 1 if chunk is None else max(1, -(-most_rows // chunk))


def backward(
    task: Task, backend: Backend, inputs: TaskInputs, *, chunks: int = 1, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradient of the task's loss into its parameters.

    Args:
        task: what is trained.
        backend: encodes, and gathers gradients.
        inputs: this rank's part of the batch, laid out by `task.inputs`; a tower may have no rows.
        chunks: into how many chunks the rows of every tower go; equal on all ranks, because with
            ZeRO 3 each forward is an exchange.
        seed: decides what dropout and stochastic depth draw.

    Returns:
        The detached loss and the task's metrics.
    """
    parts = _split(inputs.towers, chunks)
    if chunks > 1:
        return _cached_backward(task, backend, inputs, parts, seed)
    backend.begin_part(last=True)
    embeddings = _unpad(backend.encode(parts[0], seed), inputs)
    loss, metrics = task.loss(embeddings, inputs.context)
    backend.backward(loss)
    return loss.detach(), metrics


def _cached_backward(
    task: Task, backend: Backend, inputs: TaskInputs, parts: list[dict[str, Rows]], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        encoded = [backend.encode(rows, mix(seed, part)) for part, rows in enumerate(parts)]
    learning = [tower for tower in inputs.towers if tower not in inputs.frozen]
    leaves = {tower: torch.cat([rows[tower] for rows in encoded]) for tower in inputs.towers}
    for tower in learning:
        leaves[tower].requires_grad_()
    loss, metrics = task.loss(_unpad(leaves, inputs), inputs.context)
    found = torch.autograd.grad(loss, [leaves[tower] for tower in learning])
    gradients = {
        tower: gradient.split([len(part[tower]) for part in encoded])
        for tower, gradient in zip(learning, found, strict=True)
    }
    del leaves, encoded, found

    with backend.accumulate():
        for part, rows in enumerate(parts):
            backend.begin_part(last=part == len(parts) - 1)
            encoded_part = backend.encode({t: rows[t] for t in learning}, mix(seed, part))
            # The derivative of this sum is the embeddings' gradient, passed on to the parameters.
            products = [(encoded_part[t] * gradients[t][part]).sum() for t in learning]
            backend.backward(torch.stack(products).sum())
    return loss.detach(), metrics


def _split(towers: Mapping[str, Rows], count: int) -> list[dict[str, Rows]]:
    """Cut each tower's rows into parts that differ by one row at most, and that all have one.

    So every parameter is used in every part, on every rank: what DDP and ZeRO count on. A tower
    with fewer rows than parts encodes zeros besides, and no gradient comes back to those.
    """
    split = {tower: _cut(rows, count) for tower, rows in towers.items()}
    return [{tower: parts[part] for tower, parts in split.items()} for part in range(count)]


def _cut(rows: Rows, count: int) -> Sequence[Any]:
    if isinstance(rows, dict):
        parts = zip(*(_cut(each, count) for each in rows.values()), strict=True)
        return [dict(zip(rows, part, strict=True)) for part in parts]
    missing = count - len(rows)
    if missing > 0:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.tensor_split(count)


def _unpad(embeddings: Mapping[str, Tensor], inputs: TaskInputs) -> dict[str, Tensor]:
    return {tower: embeddings[tower][: num_rows(rows)] for tower, rows in inputs.towers.items()}
