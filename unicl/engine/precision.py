"""Autocast of the towers; which type is faster on a device is measured, not assumed."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch

Precision = str
_TYPES = {"bf16": torch.bfloat16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Make the context the towers run in: "fp32" casts nothing, "bf16" what profits."""
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
