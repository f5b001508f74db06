"""Autocast of the towers; which type is faster on a device is measured, not assumed."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch

Precision = str
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Make the context the towers run in: "fp32" casts nothing, the others what profits."""
    if precision == "fp32":
        return nullcontext()
    # The cache of cast weights would survive between the two passes of a gradient cache and
    # tie their graphs together; casting again costs little beside the matmuls.
    return torch.autocast(device.type, dtype=_TYPES[precision], cache_enabled=False)


def faster_precision(step: Callable[[Precision], object], *, repeats: int = 3) -> Precision:
    """Time `step` in each precision, interleaved, and return the one with the lower median.

    Args:
        step: runs one forward and backward in the given precision and leaves no trace.
        repeats: timed runs of each, after one to warm up.
    """
    times: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    for precision in times:
        step(precision)
    for _ in range(repeats):
        for precision, seconds in times.items():
            start = time.perf_counter()
            step(precision)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return min(times, key=lambda precision: median(times[precision]))


class LossScale:
    """The factor that keeps small fp16 gradients from vanishing: as large as does not overflow.

    It halves when a gradient overflows, and doubles after 2,000 steps without that
    (Micikevicius et al. 2018, section 3.2). In other precisions it is 1.
    """

    SMALLEST = 1.0
    _LARGEST = 2.0**24

    _PATIENCE = 2000

    def __init__(self, value: float = 2.0**16, good_steps: int = 0) -> None:
        self.value = value
        self.good_steps = good_steps

    def state(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {"value": self.value, "good_steps": self.good_steps}

    def grow(self) -> None:
        """Count a step whose gradient was finite."""
        self.good_steps += 1
        if self.good_steps == self._PATIENCE:
            self.value = min(self.value * 2, self._LARGEST)
            self.good_steps = 0

    def shrink(self) -> bool:
        """Halve after an overflow; false if it is as small as it gets: the gradient is bad."""
        if self.value <= self.SMALLEST:
            return False
        self.value /= 2
        self.good_steps = 0
        return True
