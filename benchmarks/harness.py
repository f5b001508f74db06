"""How everything here is measured: interleaved times, peak memory of fresh processes."""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from unicl.errors import UniclError

ROOT = Path(__file__).resolve().parent.parent
_MIB = 1 << 20


class Skipped(Exception):
    """This machine lacks what a benchmark measures; nothing is wrong, and nothing is kept."""


@dataclass(frozen=True)
class Timing:
    """Seconds that one side took, one entry per round."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """Summed over threads; far from wall x threads, something else ran on the machine."""

    @property
    def median(self) -> float:
        """Median of the wall clock."""
        return median(self.wall)


@dataclass(frozen=True)
class Ratio:
    """Median and spread of the ratios of the rounds."""

    median: float
    low: float
    high: float


def compare(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time the sides in turns, in one process, so that what disturbs one disturbs the other.

    Args:
        sides: What is run, by name.
        repeats: Timed rounds; every second one goes through the sides backwards.
        warm_up: Rounds before those.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, repeats):
        for name in sides if turn % 2 == 0 else reversed(list(sides)):
            gc.collect()
            start_cpu, start = time.process_time(), time.perf_counter()
            sides[name]()
            stop, stop_cpu = time.perf_counter(), time.process_time()
            if turn >= 0:
                wall[name].append(stop - start)
                cpu[name].append(stop_cpu - start_cpu)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in sides}


def ratio(over: Timing, under: Timing) -> Ratio:
    """Return the time of one side over that of the other, taken round by round."""
    ratios = [a / b for a, b in zip(over.wall, under.wall, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


class OtherLoad:
    """How busy other processes have kept the machine since this was made."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Return their part of all cores' time, between 0 and 1."""
        wall, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / (wall * (os.cpu_count() or 1))))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        machine, own = psutil.cpu_times(), os.times()
        busy = machine.user + machine.nice + machine.system
        return time.perf_counter(), busy, sum(own[:4])  # own children that ended, too


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that ran one case and nothing else, in MiB."""

    imports: float
    """After its imports."""
    ready: float
    """After its inputs and models were made."""
    peak: float
    """The most it held while the case ran."""

    @property
    def extra(self) -> float:
        """What the case took on top of its inputs and models."""
        return self.peak - self.ready

    @property
    def total(self) -> float:
        """What inputs, models and the case took together."""
        return self.peak - self.imports


def peak_memory(case: str, **arguments: Any) -> Memory:
    """Run a case in a fresh process and return what it held.

    Args:
        case: "module:function"; the function makes the inputs and returns what is to be run.
        arguments: What the function is called with.

    Raises:
        UniclError: The process failed, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise UniclError("peak memory is read from /proc, so this benchmark runs on Linux only")
    child = "from benchmarks.harness import measure_case; measure_case()"
    done = subprocess.run(
        [sys.executable, "-c", child, case, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, perhaps for lack of memory"])[-1]
        raise UniclError(f"{case} failed with exit code {done.returncode}: {reason}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measure_case() -> None:
    """Be the fresh process: run the case that the command line names and print its memory."""
    module, function = sys.argv[1].split(":")
    make = getattr(importlib.import_module(module), function)
    imports = resident()
    run = make(**json.loads(sys.argv[2]))
    ready = resident()
    reset_peak()
    run()
    print(json.dumps({"imports": imports, "ready": ready, "peak": status("VmHWM")}))


def reset_peak() -> None:
    """Let the kernel's high-water mark forget what imports and inputs took for a moment."""
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> float:
    """Return this process's resident memory in MiB, after all garbage went back to the kernel."""
    gc.collect()
    # Freed memory that the allocator still holds would hide as much of the case's own.
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> float:
    """Return a size out of this process's status, such as VmHWM, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / _MIB
    raise UniclError(f"/proc/self/status has no {name}")
