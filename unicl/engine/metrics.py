"""What a run says of itself: `metrics.jsonl`, TensorBoard events, and one log line per N steps."""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from unicl.data.atomic import atomic_file

logger = logging.getLogger("unicl")


class RunningMeans:
    """Means of metrics since the last log line; part of a checkpoint, so that resume is exact."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self.sums = dict(sums or {})
        self.count = count

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Add one step's values."""
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def pop(self) -> dict[str, float]:
        """Return the means and start over."""
        means = {name: total / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {"sums": dict(self.sums), "count": self.count}


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard.

    Args:
        folder: the run.
        step: the run continues after this step; rows of later steps, written by a process that
            died before its next checkpoint, are removed.
        active: only one of several ranks writes.
    """

    def __init__(self, folder: Path, *, step: int, active: bool = True) -> None:
        self.active = active
        self.path = folder / "metrics.jsonl"
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        with atomic_file(self.path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self.path.open("a")
        self._events = SummaryWriter(folder / "events", purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row, and have it on disk before anything that builds on it."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        if not self.active:
            return
        self._file.close()
        self._events.close()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`; what a kill has torn or is no row is dropped."""
    return parse_rows(path.read_text(errors="replace")) if path.is_file() else []


def parse_rows(text: str) -> list[dict[str, Any]]:
    """Return the rows of the text of a `metrics.jsonl`, those that are sound."""
    rows = []
    for line in text.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


# Dense bf16 and fp16 operations per second as of the vendor's data sheets, in teraflops; the first
# name that is part of the device's own counts.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}


def peak_teraflops(device: torch.device, precision: str) -> float | None:
    """Return what a device does at most in half precision; None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class StepClock:
    """Speed since the last reading, and the time that is left."""

    def __init__(self) -> None:
        self._restart()

    def add(self, samples: int) -> None:
        """Count one step and its samples on all ranks."""
        self._samples += samples
        self._steps += 1

    def add_flops(self, flops: float) -> None:
        """Count floating-point operations of this rank."""
        self._flops += flops

    def read(self, steps_left: int, peak: float | None = None) -> tuple[dict[str, float], float]:
        """Return the speed as metrics, and the seconds left; start over.

        `tflops` are those of one device, and `mfu` (Chowdhery et al. 2022, appendix B) is their
        share of `peak`.
        """
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        speed = {"train/samples_per_second": self._samples / elapsed}
        if self._flops:
            speed["train/tflops"] = self._flops / elapsed / 1e12
            if peak is not None:
                speed["train/mfu"] = speed["train/tflops"] / peak
        remaining = steps_left * elapsed / max(self._steps, 1)
        self._restart()
        return speed, remaining

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._samples = 0
        self._flops = 0.0
        self._steps = 0


# Figures that tasks give besides the loss.
_OF_TASKS = {"train/scale": "  scale {scale:6.2f}", "train/top1": "  top1 {top1:6.1%}"}


def log_line(step: int, total: int, row: Mapping[str, float], seconds_left: float) -> None:
    """Log one aligned line for a person to read."""
    width = len(str(total))
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    mfu = f"  MFU {row['train/mfu']:.1%}" if "train/mfu" in row else ""
    skipped = f"  skipped {row['train/skipped']:.0f}" if row.get("train/skipped") else ""
    figures = [text for name, text in _OF_TASKS.items() if name in row]
    logger.info(
        "step %*d/%d  loss %7.4f%s  rate %.2e  gradient %8.3f  %7.0f samples/s%s  %s left%s",
        width,
        step,
        total,
        row["train/loss"],
        "".join(figures).format_map({name.removeprefix("train/"): row[name] for name in row}),
        row["train/learning_rate"],
        row["train/grad_norm"],
        row["train/samples_per_second"],
        mfu,
        f"{hours}:{minutes:02d}:{seconds:02d}",
        skipped,
    )


def log_skipped(skipped: Mapping[str, int]) -> None:
    """Warn of the samples that a run could not use, by reason."""
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        logger.warning("%d samples were skipped in training (%s)", sum(skipped.values()), reasons)


def log_evaluation(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Log an evaluation's figures in one line."""
    figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    logger.info("step %*d/%d  %s", len(str(total)), step, total, figures)
