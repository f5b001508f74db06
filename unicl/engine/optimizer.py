"""AdamW with the lineage's rules of what decays, and a rate of its own for each layer; averages."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unicl.config import OptimizerConfig
from unicl.errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps per element."""
AVERAGE = "average"
"""What `ema_decay` keeps per element besides."""

# Tables of vectors rather than maps between them: decay would only shrink what a row means.
_TABLES = (
    "logit_scale",
    "positional_embedding",
    "token_embedding.weight",
    "relative_position_bias_table",
    "pos_embed",
    "cls_token",
)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split trainable parameters by what decays and by the factor of the learning rate.

    Biases, norms, LayerScale (all vectors and scalars) and embedding tables do not decay, nor does
    what a submodule names in timm's `no_weight_decay`. The factor is the group's `lr_scale`, as
    timm calls it.

    Raises:
        UsageError: Layers are to have different rates, but the model cannot tell its layers.
    """
    named_by_model = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    factors = rate_factors(model, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(_TABLES) or name in named_by_model
        kind = (0.0 if exempt else config.weight_decay, factors.get(name, 1.0))
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": factor}
        for (decay, factor), parameters in sorted(groups.items(), key=lambda each: each[0])
    ]


def rate_factors(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Return the factor of the learning rate of every parameter that lies in a tower.

    It is the tower's own, times `layer_decay` for each layer above. Towers number the layers of
    their parameters, from the input on, in `layer_depths`. What an adapter puts on the towers has
    the factor that its model's `rates` says.
    """
    own_rates: dict[str, float] = getattr(model, "rates", {})
    rates = {"image": config.image_rate, "text": config.text_rate, **own_rates}
    towers: dict[str, Any] = dict(model.named_children())
    depths: dict[str, dict[str, int]] = {}
    if config.layer_decay < 1:
        depths = {t: m.layer_depths() for t, m in towers.items() if hasattr(m, "layer_depths")}
        if not depths:
            raise UsageError(
                "optimizer.layer_decay has no effect: the model has no numbered layers"
            )
    factors = {}
    for tower, module in towers.items():
        own = depths.get(tower, {})
        top = max(own.values(), default=0)
        for name, _ in module.named_parameters():
            layers_above = top - own.get(name, top)
            factors[f"{tower}.{name}"] = rates.get(tower, 1.0) * config.layer_decay**layers_above
    return factors


def kinds(config: OptimizerConfig) -> tuple[str, ...]:
    """Name what is kept per element of a trained parameter."""
    return MOMENTS if config.ema_decay is None else (*MOMENTS, AVERAGE)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the model's parameter groups; fused, one kernel for all parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times the group's own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def update_averages(states: Mapping[Tensor, dict[str, Any]], decay: float, updates: int) -> None:
    """Move each weight's average, kept in its optimizer's state, towards what it is by now.

    So the average is laid out, shared out and offloaded like the moments. It starts with the
    weights after the first update, and the decay of update t is at most (1 + t) / (10 + t): a
    short run, too, forgets its random start.

    Args:
        states: The optimizer's state of every tensor that it updates.
        decay: The old average's share in the new one.
        updates: Number of updates, this one included.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    for tensor, state in states.items():
        if AVERAGE not in state:
            state[AVERAGE] = tensor.detach().clone()
    averages = [state[AVERAGE] for state in states.values()]
    torch._foreach_lerp_(averages, [tensor.detach() for tensor in states], 1 - decay)
