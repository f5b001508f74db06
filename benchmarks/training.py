"""One training step of ours and one of open_clip's, for the benchmarks that time them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unicl.config import OptimizerConfig
from unicl.engine.backend import Backend
from unicl.engine.gradient_cache import backward
from unicl.engine.task import Task, TaskInputs

_PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}  # ours: open_clip's name for it


@dataclass(frozen=True)
class Batch:
    """What `Pretraining.inputs` reads of a batch."""

    images: Tensor
    tokens: Tensor
    labels: Tensor


def own_step(task: Task, backend: Backend, inputs: TaskInputs, *, chunks: int = 1) -> Tensor:
    """Step as the trainer does it, without its log; return the loss."""
    loss, _ = backward(task, backend, inputs, chunks=chunks)
    norm = math.hypot(*backend.gradient_norms().values())
    backend.step(OptimizerConfig().learning_rate, norm=norm)
    return loss


class OpenClipStep:
    """Steps as `open_clip_train` does them, with the optimizer that it builds.

    Args:
        model: What is trained.
        precision: "fp32" or "bf16", by autocast.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        # Late: the ranks that only do own_step need not wait for it.
        from open_clip.loss import ClipLoss
        from open_clip_train.precision import get_autocast

        self.model = model
        self.loss = ClipLoss()
        device = next(model.parameters()).device
        self.autocast = get_autocast(_PRECISIONS[precision], device_type=device.type)
        self.optimizer = _open_clip_optimizer(model)

    def __call__(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Train on normalised images [n, 3, h, w] and tokens [n, context]; return the loss."""
        self.optimizer.zero_grad()
        with self.autocast():
            image_features, text_features, scale = self.model(images, tokens)
            loss = self.loss(image_features, text_features, scale)
        loss.backward()
        largest_norm = OptimizerConfig().clip_grad_norm or math.inf
        nn.utils.clip_grad_norm_(self.model.parameters(), largest_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()


def forward_flops(run: Callable[[], object]) -> float:
    """Count the floating-point operations of matrix products, two for each multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _open_clip_optimizer(model: nn.Module) -> torch.optim.AdamW:
    config = OptimizerConfig()
    no_decay: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        excluded = parameter.ndim < 2 or any(x in name for x in ("bn", "ln", "bias", "logit_scale"))
        (no_decay if excluded else decay).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": no_decay, "weight_decay": 0.0},
            {"params": decay, "weight_decay": config.weight_decay},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )
