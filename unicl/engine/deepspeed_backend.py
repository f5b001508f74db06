"""ZeRO by DeepSpeed: optimizer states, gradients and parameters shared out among the ranks.

DeepSpeed's engine runs in fp32 whatever the precision: the towers' autocast lies inside of the
encoder, as with the torch backend. So there are no half-precision parameters beside master weights,
and nothing that reads or bounds a parameter (the scale's limit, EMA) can miss the copy that counts.
"""

import contextlib
import copy
import io
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unicl.config import EngineConfig, OptimizerConfig
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

BUCKET = 2**23
"""Elements of what is put together, reduced or fetched at a time: 32 MiB, near DDP's 25.
DeepSpeed's own buckets of 5e8 are 2 GB in fp32: more than ZeRO saves on models of this size."""
LIVE_BUCKETS = 4
"""Buckets of parameters that ZeRO 3 holds whole before it stops to fetch more."""


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter that this rank updates."""

    flat: Tensor
    """This rank's fp32 partition of the parameter's group; the optimizer's state is kept by it."""
    offset: int
    """Where the part begins in `flat`."""
    start: int
    """Where it begins in the parameter."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the part in a tensor laid out like `flat`."""
        return flat.narrow(0, self.offset, self.length)


class DeepSpeedBackend:
    """A DeepSpeed engine of ZeRO stage 0 to 3.

    Args:
        task: What is trained; its model is on the device already, equal on all ranks.
        optimizer: The optimizer's configuration.
        ranks: The processes that train together; DeepSpeed wants a group even for one.
        config: Stage, offload, and how often gradients are reduced.
    """

    def __init__(
        self, task: Task, optimizer: OptimizerConfig, ranks: Ranks, config: EngineConfig
    ) -> None:
        self.ranks = ranks
        self.encoder = Encoder(task)
        self._config = config
        self._stage = config.zero_stage
        self._parameters = trained(task.model)
        self.sizes = {name: p.numel() for name, p in self._parameters.items()}
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._towers = tuple(dict.fromkeys(map(tower_of, self.sizes)))
        self._device = next(iter(self._parameters.values())).device
        self.kinds = kinds(optimizer)
        self._ema_decay = optimizer.ema_decay
        self._updates = 0
        copies = self._stage == 3 or self._ema_decay is not None
        self._skeleton = copy.deepcopy(task.model).to("meta") if copies else None
        self._engine = _initialize(self.encoder, optimizer, config, self._device)
        self._optimizer = self._engine.optimizer
        self.loss_scale = 1.0

    def encode(self, rows: dict[str, Rows], seed: int) -> dict[str, Tensor]:
        """Call the encoder."""
        return self._engine(rows, seed)

    def accumulate(self) -> AbstractContextManager[object]:
        """Keep the whole gradient on every rank until the last part, and reduce it once.

        The other way, a reduction per part into the sharded gradient, needs no context.
        """
        if self._stage == 0 or self._config.reduce_every == "chunk":
            return nullcontext()
        return self._engine.coalesce_grad_reduction()

    def begin_part(self, *, last: bool) -> None:
        """Tell the engine whether the gradient is complete after this backward."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss."""
        if self._stage == 0:
            loss = loss * self.loss_scale
        elif self.loss_scale != self._optimizer.loss_scale:
            self._optimizer.override_loss_scale(self.loss_scale)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each tower's gradient, from what each rank holds of it."""
        norms = self._norms(self._own_gradient)
        return {tower: norm / self.loss_scale for tower, norm in norms.items()}

    def weight_norms(self) -> dict[str, float]:
        """Return the norm of each tower's trained parameters, from what each rank updates."""
        return self._norms(self._own_weight)

    def _norms(self, own: Callable[[str], Tensor | None]) -> dict[str, float]:
        self._wait_for_copies()
        pieces = ((name, t) for name in self._parameters if (t := own(name)) is not None)
        squares = sums_of_squares(self._towers, pieces, self._device)
        if self._stage > 0:
            self.ranks.sum_(squares)
        return dict(zip(self._towers, squares.sqrt().tolist(), strict=True))

    def step(self, rate: float, *, norm: float) -> None:
        """Clip the gradient and update the parameters; the engine computes the norm itself."""
        if self._stage == 0:
            scale_gradients(self._parameters, 1 / self.loss_scale)
        set_learning_rate(self._optimizer, rate)
        self._engine.step()
        self._updates += 1
        if self._ema_decay is not None:
            update_averages(self._states, self._ema_decay, self._updates)

    def drop(self) -> None:
        """Forget the gradient, in all the places where ZeRO keeps it."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        self._optimizer.zero_grad(set_to_none=True)
        if self._config.offload_optimizer:
            self._optimizer.reset_cpu_buffers()
            if self._stage < 3:
                # Its own zero_grad leaves these, and the next backward would add to this gradient.
                self._optimizer.micro_step_id = -1
                self._optimizer._offload_accumulated_param_ids = set()
        elif self._stage == 3:
            self._optimizer.averaged_gradients = {}
        else:
            for group in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[group] = None
                self._optimizer.all_grad_tensors[group] = None

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and whole gradient, put together from the ranks' pieces."""
        self._wait_for_copies()
        for name, gradient in self._whole(self._own_gradient):
            yield name, gradient / self.loss_scale

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the model's whole state dict on the CPU, on the first rank."""
        found: dict[str, Tensor] = {}
        model = self.encoder.model
        for names in self._gathered(model):
            if self.ranks.first:
                found |= {name: _on_cpu(model.get_parameter(name)) for name in names}
        if self.ranks.first:
            state = model.state_dict()  # besides parameters: buffers
            found |= {name: _on_cpu(state[name]) for name in state if name not in found}
        for name, average in self._averages() if averaged else ():
            if self.ranks.first:
                found[name] = average.cpu().contiguous()
        return found

    def moments(self, keep: Collection[str]) -> dict[str, Tensor]:
        """Return the moments of the parameters named in `keep` on the CPU."""
        if not self._states:
            return {}
        found: dict[str, Tensor] = {}
        for kind in MOMENTS:
            for name, moment in self._whole(partial(self._own_moment, kind)):
                if name in keep:
                    found[f"{kind}:{name}"] = moment.cpu().contiguous()
        return found

    def load_moments(self, moments: Mapping[str, Tensor], *, updates: int) -> None:
        """Set moments and averages as they were after so many updates."""
        self._updates = updates
        for name, parameter in self._parameters.items():
            values = {kind: moments[f"{kind}:{name}"] for kind in self.kinds}
            if self._stage == 0:
                state = {kind: value.to(parameter.device) for kind, value in values.items()}
                state["step"] = torch.tensor(float(updates), device=parameter.device)
                self._states[parameter] = state
                continue
            piece = self._piece(name)
            if piece is None:
                continue
            state = self._states[piece.flat]
            if not state:
                state["step"] = torch.tensor(float(updates), device=piece.flat.device)
                state |= {kind: torch.zeros_like(piece.flat) for kind in self.kinds}
            for kind, value in values.items():
                own = value.flatten().narrow(0, piece.start, piece.length)
                piece.of(state[kind]).copy_(own)

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """Give the model, or with averages or partitioned parameters a copy that has all."""
        model = self.encoder.model
        if self._skeleton is None:
            yield model
            return
        replica = copy.deepcopy(self._skeleton).to_empty(device=self._device)
        buffers = dict(model.named_buffers())
        for name, buffer in replica.named_buffers():
            buffer.copy_(buffers[name])
        own_parameters = dict(replica.named_parameters())
        for names in self._gathered(model):
            for name in names:
                own_parameters[name].data.copy_(model.get_parameter(name).data)
        for name, average in self._averages():
            own_parameters[name].data.copy_(average)
        yield replica

    def _averages(self) -> Iterator[tuple[str, Tensor]]:
        if AVERAGE in self.kinds and self._updates > 0:
            yield from self._whole(partial(self._own_moment, AVERAGE))

    def _gathered(self, model: nn.Module) -> Iterator[list[str]]:
        """Yield names of parameters; while one has them, these are whole, as far as ZeRO 3 cut."""
        parameters: dict[str, Any] = dict(model.named_parameters())
        if self._stage < 3:
            yield list(parameters)
            return
        import deepspeed

        for names in _buckets({name: p.ds_numel for name, p in parameters.items()}):
            with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
                yield names

    def _wait_for_copies(self) -> None:
        """Let what goes to the host arrive there before it is read."""
        if self._config.offload_optimizer and self._stage in (1, 2):
            self._optimizer._wait_for_offload_copies()

    @property
    def _states(self) -> dict[Tensor, dict[str, Any]]:
        return (self._optimizer if self._stage == 0 else self._optimizer.optimizer).state

    def _piece(self, name: str) -> _Piece | None:
        """Find what of a parameter this rank updates; None where that is nothing."""
        parameter: Any = self._parameters[name]
        if self._stage == 0:
            return None
        if self._stage == 3:
            group, offset, length = self._optimizer.grad_position[
                self._optimizer.get_param_id(parameter)
            ]
            start = self.ranks.rank * length
            length = min(length, self.sizes[name] - start)  # the last rank's part is padded
            flat = self._optimizer.fp32_partitioned_groups_flat[group]
            return _Piece(flat, offset, start, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return _Piece(flat, here.start, there.start, here.numel)

    def _own_gradient(self, name: str) -> Tensor | None:
        """Return what this rank holds of the reduced gradient; at stage 0 that is all of it."""
        parameter: Any = self._parameters[name]
        if self._stage == 0:
            return parameter.grad
        piece = self._piece(name)
        if piece is None:
            return None
        if self._stage == 3:
            return self._optimizer.get_local_fp32_grad_for_param(parameter)[: piece.length]
        fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return fragment.flatten()

    def _own_weight(self, name: str) -> Tensor | None:
        if self._stage == 0:
            return self._parameters[name].detach()
        piece = self._piece(name)
        return None if piece is None else piece.of(piece.flat.detach())

    def _own_moment(self, kind: str, name: str) -> Tensor | None:
        if self._stage == 0:
            return self._states[self._parameters[name]][kind]
        piece = self._piece(name)
        return None if piece is None else piece.of(self._states[piece.flat][kind])

    def _whole(self, own: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Put parameter-sized tensors together from what each rank owns of them."""
        for names in _buckets(self.sizes):
            sizes = [self.sizes[name] for name in names]
            bucket = torch.zeros(sum(sizes), device=self._device)
            parts = bucket.split(sizes)
            for name, part in zip(names, parts, strict=True):
                value, piece = own(name), self._piece(name)
                if value is not None:
                    start, length = (piece.start, piece.length) if piece else (0, len(part))
                    part.narrow(0, start, length).copy_(value.flatten())
            if self._stage > 0:
                self.ranks.sum_(bucket)
            for name, part in zip(names, parts, strict=True):
                yield name, part.view(self._shapes[name])


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group parameters such that a group is worth an exchange, and fits beside the model."""
    names: list[str] = []
    length = 0
    for name, size in sizes.items():
        names.append(name)
        length += size
        if length >= BUCKET:
            yield names
            names, length = [], 0
    if names:
        yield names


def _initialize(
    encoder: Encoder, optimizer: OptimizerConfig, config: EngineConfig, device: torch.device
) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    for name in (deepspeed.utils.logger.name, "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # what it has built, on every rank
        engine, *_ = deepspeed.initialize(
            model=encoder,
            optimizer=build_optimizer(encoder.model, optimizer),
            config=_deepspeed_config(optimizer, config),
            dist_init_required=False,
        )
    return engine


def _deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": BUCKET}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.persistence_threshold
        # By default parameters that are needed again within 1e9 elements stay whole: all of them.
        zero["stage3_max_reuse_distance"] = BUCKET
        zero["stage3_prefetch_bucket_size"] = BUCKET
        zero["stage3_max_live_parameters"] = LIVE_BUCKETS * BUCKET
    return {
        # The loader and the gradient cache decide how many samples a backward has.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's own default is 1.0: unset must mean no clipping.
        "gradient_clipping": optimizer.clip_grad_norm or 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW has a vectorized kernel for CPUs too.
        "zero_force_ds_cpu_optimizer": False,
    }
