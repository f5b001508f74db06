"""The learning rate as a pure function of the step: linear warm-up, then down."""

import math
from typing import Literal

Decay = Literal["cosine", "linear"]


def learning_rate(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    decay: Decay = "cosine",
) -> float:
    """Return the rate of update number `step` (from 0); the last update gets close to `final`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    left = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (peak - final) * left
