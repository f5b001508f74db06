"""The learning rate as a pure function of the step: linear warm-up, then a cosine."""

import math


def learning_rate(
    step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the rate of update number `step` (from 0); the last update gets close to `final`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
