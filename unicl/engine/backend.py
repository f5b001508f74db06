"""How a step is carried out: who holds which part of parameters, gradients and moments.

The trainer speaks to a `Backend` and does not know which it has. `TorchBackend` keeps everything on
every rank (DDP), `DeepSpeedBackend` shares it out (ZeRO, Rajbhandari et al. 2020).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unicl.data.order import mix
from unicl.distributed import Ranks
from unicl.engine.precision import Precision, autocast
from unicl.engine.task import Rows, Task


class Encoder(nn.Module):
    """The model as an engine wants it: one forward for whatever rows are given.

    Every parameter is used inside of this forward, those of the loss included: DDP counts uses
    from here, and ZeRO fetches partitioned parameters from here.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.precision: Precision = "fp32"
        self._encode = task.encode

    def forward(self, rows: dict[str, Rows], seed: int) -> dict[str, Tensor]:
        """Encode the rows [n, ...] of each tower into embeddings [n, ...].

        What a tower draws at random is a function of the seed and of the tower's name.
        """
        embeddings = {}
        for tower, part in rows.items():
            device = (part if isinstance(part, Tensor) else next(iter(part.values()))).device
            _seed(mix(seed, int.from_bytes(tower.encode())), device)
            with autocast(self.precision, device):
                embeddings[tower] = self._encode(tower, part)
        return embeddings


@runtime_checkable
class Backend(Protocol):
    """Carries out the parts of a step on all ranks together; every rank makes the same calls."""

    ranks: Ranks
    encoder: Encoder
    sizes: dict[str, int]
    """Number of elements of each trained parameter, by name."""
    kinds: tuple[str, ...]
    """What is kept per element of those: moments, and an average of the weights if asked for."""
    loss_scale: float
    """Factor of the loss in the backward pass (fp16); what is returned is free of it."""

    def encode(self, rows: dict[str, Rows], seed: int) -> dict[str, Tensor]:
        """Call the encoder."""

    def accumulate(self) -> AbstractContextManager[object]:
        """Make the context around all forwards and backwards of a step that has several parts."""

    def begin_part(self, *, last: bool) -> None:
        """Begin a forward and backward; only the last one of a step may exchange gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, averaged over the ranks, to the parameters' gradients."""

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each tower's gradient, equal on all ranks."""

    def weight_norms(self) -> dict[str, float]:
        """Return the norm of each tower's trained parameters, equal on all ranks."""

    def step(self, rate: float, *, norm: float) -> None:
        """Clip the gradient, whose norm over all towers is given, and update the parameters."""

    def drop(self) -> None:
        """Forget the gradient."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and whole gradient, as `step` would find it."""

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the model's whole state dict on the CPU; empty on all ranks but the first.

        With `averaged` the trained parameters are their averages, once there was an update.
        """

    def moments(self, keep: Collection[str]) -> dict[str, Tensor]:
        """Return the whole moments of the parameters named in `keep` on the CPU.

        The keys are `exp_avg:NAME` and `exp_avg_sq:NAME`; without any update there are none.
        """

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        """Set all `kinds`, by `KIND:NAME`, as they were after so many updates."""

    def whole_model(self) -> AbstractContextManager[Any]:
        """Make a context that gives the whole model, averaged if it can be, for reading only."""


def _seed(seed: int, device: torch.device) -> None:
    """Seed what a device's towers draw from; torch.manual_seed asks after all kinds of devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def tower_of(name: str) -> str:
    """Return the tower that a parameter belongs to: the first part of its name."""
    return name.partition(".")[0]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def scale_gradients(parameters: Mapping[str, nn.Parameter], factor: float) -> None:
    """Multiply all gradients by a factor, in place."""
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters.values() if p.grad is not None], factor)


def sums_of_squares(
    towers: Collection[str], pieces: Iterable[tuple[str, Tensor]], device: torch.device
) -> Tensor:
    """Sum the squares of pieces of gradients, one fp32 number per tower."""
    norms: dict[str, list[Tensor]] = {tower: [torch.zeros((), device=device)] for tower in towers}
    by_tower: dict[str, list[Tensor]] = {tower: [] for tower in towers}
    for name, piece in pieces:
        by_tower[tower_of(name)].append(piece)
    for tower, found in by_tower.items():
        if found:
            norms[tower] += [norm.to(device) for norm in torch._foreach_norm(found)]
    return torch.stack([torch.stack(each).square().sum() for each in norms.values()])
