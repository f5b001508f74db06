"""AdamW with the lineage's rules of what decays."""

import torch
from torch import nn

from unicl.config import OptimizerConfig

# Tables of vectors rather than maps between them: decay would only shrink what a row means.
_TABLES = (
    "logit_scale",
    "positional_embedding",
    "token_embedding.weight",
    "relative_position_bias_table",
    "pos_embed",
    "cls_token",
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into those that decay and those that do not.

    Biases, norms, LayerScale (all vectors and scalars) and embedding tables do not decay, nor does
    what a submodule names in timm's `no_weight_decay`.
    """
    named_by_model = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(_TABLES) or name in named_by_model
        (no_decay if exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the model's parameter groups; fused, one kernel for all parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times the group's own `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
