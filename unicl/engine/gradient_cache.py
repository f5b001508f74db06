"""Forward and backward of one step, whole or in chunks (gradient cache, Gao et al. 2021).

Both give the same gradient. In chunks, first every row is encoded without a graph, then the loss
gives the gradient of each embedding, then each chunk is encoded again, with the random state of
the first time, and receives its rows of that gradient. One extra forward buys activations that
do not grow with the batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from unicl.engine.task import Task, TaskInputs

Autocast = Callable[[], AbstractContextManager[object]]


def backward(
    task: Task, inputs: TaskInputs, *, chunk: int | None, autocast: Autocast
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradient of the task's loss into its parameters.

    Args:
        task: what is trained.
        inputs: the batch, laid out by `task.inputs`.
        chunk: rows per forward and backward of a tower; None encodes all rows at once.
        autocast: makes the context the towers run in; the loss runs outside of it.

    Returns:
        The detached loss and the task's metrics.
    """
    if chunk is None or all(len(rows) <= chunk for rows in inputs.towers.values()):
        with autocast():
            embeddings = {name: task.encode(name, rows) for name, rows in inputs.towers.items()}
        loss, metrics = task.loss(embeddings, inputs.context)
        loss.backward()
        return loss.detach(), metrics
    return _cached_backward(task, inputs, chunk, autocast)


def _cached_backward(
    task: Task, inputs: TaskInputs, chunk: int, autocast: Autocast
) -> tuple[Tensor, dict[str, Tensor]]:
    random_states: dict[str, list[_RandomState]] = {}
    embeddings: dict[str, Tensor] = {}
    with torch.no_grad(), autocast():
        for name, rows in inputs.towers.items():
            random_states[name] = []
            encoded = []
            for part in rows.split(chunk):
                random_states[name].append(_RandomState(part.device))
                encoded.append(task.encode(name, part))
            embeddings[name] = torch.cat(encoded).requires_grad_()

    # Parameters of the loss itself, such as the scale, get their gradient here and only here.
    loss, metrics = task.loss(embeddings, inputs.context)
    loss.backward()

    after = _RandomState(loss.device)
    for name, rows in inputs.towers.items():
        gradient = embeddings.pop(name).grad
        assert gradient is not None, f"the loss does not depend on the {name} tower"
        parts = zip(rows.split(chunk), gradient.split(chunk), random_states[name], strict=True)
        for part, part_gradient, state in parts:
            state.restore()
            with autocast():
                encoded_part = task.encode(name, part)
            encoded_part.backward(part_gradient)
    after.restore()
    return loss.detach(), metrics


class _RandomState:
    """The generators that dropout and stochastic depth draw from, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
