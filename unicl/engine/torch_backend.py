"""Everything on every rank; gradients are averaged by DDP, during the last backward of a step."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unicl.config import OptimizerConfig
from unicl.distributed import Ranks
from unicl.engine.backend import (
    Encoder,
    scale_gradients,
    sums_of_squares,
    tower_of,
    trained,
)
from unicl.engine.optimizer import (
    AVERAGE,
    MOMENTS,
    build_optimizer,
    kinds,
    set_learning_rate,
    update_averages,
)
from unicl.engine.task import Rows, Task


class TorchBackend:
    """One process, or one per GPU under DDP.

    Args:
        task: What is trained; its model is on the device already.
        optimizer: The optimizer's configuration.
        ranks: The processes that train together.
    """

    def __init__(self, task: Task, optimizer: OptimizerConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.encoder = Encoder(task)
        self._parameters = trained(task.model)
        self.sizes = {name: p.numel() for name, p in self._parameters.items()}
        self._towers = tuple(dict.fromkeys(map(tower_of, self.sizes)))
        self._optimizer = build_optimizer(task.model, optimizer)
        self.kinds = kinds(optimizer)
        self.loss_scale = 1.0
        self._clip = optimizer.clip_grad_norm
        self._ema_decay = optimizer.ema_decay
        self._updates = 0
        self._ddp = None
        if ranks.size > 1:
            self._ddp = DistributedDataParallel(
                self.encoder, process_group=ranks.group, gradient_as_bucket_view=True
            )
            # Training changes no buffer of ours, and every chunk would pay for the exchange.
            self._ddp.broadcast_buffers = False

    def encode(self, rows: dict[str, Rows], seed: int) -> dict[str, Tensor]:
        """Call the encoder."""
        return (self._ddp or self.encoder)(rows, seed)

    def accumulate(self) -> AbstractContextManager[object]:
        """Nothing needs to know of several parts but `begin_part`."""
        return nullcontext()

    def begin_part(self, *, last: bool) -> None:
        """Let DDP exchange gradients in the last part only."""
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss."""
        (loss * self.loss_scale).backward()

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each tower's gradient."""
        pieces = ((n, p.grad) for n, p in self._parameters.items() if p.grad is not None)
        return {tower: norm / self.loss_scale for tower, norm in self._norms(pieces).items()}

    def weight_norms(self) -> dict[str, float]:
        """Return the norm of each tower's trained parameters."""
        return self._norms((name, p.detach()) for name, p in self._parameters.items())

    def _norms(self, pieces: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        device = next(iter(self._parameters.values())).device
        norms = sums_of_squares(self._towers, pieces, device).sqrt()
        return dict(zip(self._towers, norms.tolist(), strict=True))

    def step(self, rate: float, *, norm: float) -> None:
        """Clip the gradient and update the parameters."""
        factor = 1.0 if self._clip is None else min(1.0, self._clip / (norm + 1e-6))
        scale_gradients(self._parameters, factor / self.loss_scale)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._updates += 1
        if self._ema_decay is not None:
            update_averages(self._optimizer.state, self._ema_decay, self._updates)
        self.drop()

    def drop(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and gradient."""
        for name, parameter in self._parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield name, gradient / self.loss_scale

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the model's state dict on the CPU, on the first rank."""
        if not self.ranks.first:
            return {}
        state = self.encoder.model.state_dict()
        state |= self._averages() if averaged else {}
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    def moments(self, keep: Collection[str]) -> dict[str, Tensor]:
        """Return the moments of the parameters named in `keep` on the CPU."""
        states = {name: self._optimizer.state.get(self._parameters[name]) for name in keep}
        return {
            f"{kind}:{name}": state[kind].cpu().contiguous()
            for name, state in states.items()
            if state
            for kind in MOMENTS
        }

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        """Set moments and averages as they were after so many updates."""
        self._updates = updates
        for name, parameter in self._parameters.items():
            state = {kind: moments[f"{kind}:{name}"].to(parameter.device) for kind in self.kinds}
            # The counter of fused AdamW must live where its kernel runs.
            state["step"] = torch.tensor(float(updates), device=parameter.device)
            self._optimizer.state[parameter] = state

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """Give the model itself, or a copy of it with the averages."""
        averages = self._averages()
        if not averages:
            yield self.encoder.model
            return
        replica = copy.deepcopy(self.encoder.model)
        replica.load_state_dict(averages, strict=False)
        yield replica

    def _averages(self) -> dict[str, Tensor]:
        if AVERAGE not in self.kinds or self._updates == 0:
            return {}
        return {name: self._optimizer.state[p][AVERAGE] for name, p in self._parameters.items()}
