"""How things are measured on a GPU: device time, peak memory, utilisation, and what fits."""

import gc
import re
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Found = TypeVar("Found")
Key = TypeVar("Key", bound=Hashable)

# Dense bf16 products, from the makers' data sheets. Names are looked for in this order.
_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(name: str) -> float | None:
    """Return the bf16 FLOP/s that a device's data sheet gives; None for an unknown device."""
    for device, peak in _PEAKS.items():
        if re.search(rf"\b{device}\b", name):
            return peak
    return None


def utilisation(forward_flops: float, seconds: float, peak: float) -> float:
    """Return model FLOP/s over the peak's: backward counts twice the forward, recomputation not."""
    return 3 * forward_flops / seconds / peak


class Meter:
    """Seconds and bytes of what runs on a device; on a CPU the bytes are unknown, shown as 0."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Return the mean seconds of some runs in a row, by the device's own clock."""
        if not self._on_gpu:
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - begin) / repeats
        # Events are stamped on the device; the host waits once, after all runs were queued.
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / repeats

    def allocated(self) -> int:
        """Return the bytes that tensors take now."""
        return torch.cuda.memory_allocated(self.device) if self._on_gpu else 0

    def peak(self, run: Callable[[], object]) -> int:
        """Return the most bytes that tensors take during a run, what was there before included."""
        if not self._on_gpu:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()


def matmul_flops(meter: Meter, size: int) -> float:
    """Measure the bf16 FLOP/s of one large square product: what no model can exceed here."""
    left, right = torch.randn(2, size, size, device=meter.device).bfloat16()
    meter.seconds(lambda: left @ right, 3)
    return 2 * size**3 / min(meter.seconds(lambda: left @ right, 10) for _ in range(3))


def fitting(
    meter: Meter, batch_size: int, attempt: Callable[[int], Found]
) -> tuple[int, Found] | None:
    """Try a batch size, halved for as long as memory runs out; None if not even 1 fits."""
    while batch_size:
        try:
            return batch_size, attempt(batch_size)
        except torch.OutOfMemoryError:
            batch_size //= 2
        # Only out of the handler: the error's traceback holds on to the failed run's tensors.
        meter.release()
    return None


def take_turns(
    meter: Meter, runs: Mapping[Key, Callable[[], object]], *, rounds: int, repeats: int
) -> dict[Key, list[float]]:
    """Time several things in turns, every second round backwards; the seconds of each round.

    Each turn begins with an untimed run, in which the allocator finds the blocks that it needs.
    What runs out of memory beside the others' remains is left out of the answer.
    """
    found: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in range(rounds):
        for key in list(found) if turn % 2 == 0 else list(reversed(found)):
            try:
                runs[key]()
                found[key].append(meter.seconds(runs[key], repeats))
            except torch.OutOfMemoryError:
                del found[key]
            if key not in found:
                meter.release()
    return found
