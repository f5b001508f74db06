"""What protocols measured, on disk in CLIP_benchmark's schema, so that its tools read ours."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unicl.data.atomic import atomic_file, write_error
from unicl.errors import UniclError
from unicl.evaluation.published import Task

# CLIP_benchmark's words for ours; i2t is an image that looks for its texts.
_TASKS: dict[Task, str] = {
    "zero_shot": "zeroshot_classification",
    "linear_probe": "linear_probe",
    "retrieval": "zeroshot_retrieval",
}
_METRICS = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class": "mean_per_class_recall",
    "map": "mean_average_precision",
}
_RECALLS = {"i2t": "text_retrieval_recall@", "t2i": "image_retrieval_recall@"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one protocol measured of one model on one set."""

    task: Task
    """The protocol."""
    dataset: str
    """The set, by its name or path."""
    model: str
    """The model, as it was named."""
    metrics: Mapping[str, float]
    """Shares in 0..1 by name: top1, top5, mean_per_class, map11, i2t_r1, ..."""
    headline: str
    """Name of the metric that the papers report of this set."""
    interval: tuple[float, float] | None = None
    """95% confidence interval of the headline."""
    num_images: int
    """Images that were asked about."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Images that could not be read, by reason."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: templates, splits, regularisation, precision, ..."""
    seconds: float = 0.0
    """How long it took, with what was embedded for it."""

    @property
    def shown(self) -> list[str]:
        """Names of the metrics of a table's rows: the headline, and what belongs beside it."""
        if self.task in ("zero_shot", "linear_probe", "fine_tune"):
            beside = ["top5"] if self.headline == "top1" and "top5" in self.metrics else []
            return [self.headline, *beside]
        return list(self.metrics)

    def interval_of(self, metric: str) -> tuple[float, float] | None:
        """Return the 95% confidence interval of a metric, where it is known."""
        if metric in (intervals := self.protocol.get("intervals", {})):
            low, high = intervals[metric]
            return low, high
        return self.interval if metric == self.headline else None

    def chance(self, metric: str) -> float | None:
        """Return what guessing blindly reaches, where it is known."""
        guesses = {"top1": 1, "mean_per_class": 1, "top5": 5}.get(metric)
        num_classes = self.protocol.get("num_classes")
        if guesses is None or not num_classes:
            return None
        return min(guesses, num_classes) / num_classes

    def to_json(self) -> dict[str, Any]:
        """Return CLIP_benchmark's fields, and ours beside them."""
        model, _, pretrained = self.model.removeprefix("open_clip:").partition("/")
        known = self.model.startswith("open_clip:")
        prefix = "lp_" if self.task == "linear_probe" else ""
        return {
            "dataset": self.dataset,
            "model": model if known else self.model,
            "pretrained": pretrained if known else "",
            "task": _TASKS.get(self.task, self.task),
            "metrics": {prefix + _their_metric(k): v for k, v in self.metrics.items()},
            "language": "en",
            "unicl": {
                "task": self.task,
                "model": self.model,
                "metrics": dict(self.metrics),
                "headline": self.headline,
                "interval": self.interval,
                "num_images": self.num_images,
                "skipped": dict(self.skipped),
                "protocol": dict(self.protocol),
                "seconds": self.seconds,
            },
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Result":
        """Return what `to_json` was made of."""
        own = dict(fields["unicl"])
        interval = own.pop("interval")
        own["metrics"] = {name: float(value) for name, value in own["metrics"].items()}
        if own["headline"] not in own["metrics"]:
            raise ValueError(f"there is no metric {own['headline']}")
        return cls(
            dataset=fields["dataset"], interval=None if interval is None else tuple(interval), **own
        )


def save_result(folder: Path, result: Result) -> Path:
    """Write one result into a folder of results; the same measured anew takes its place."""
    split = result.protocol.get("split") or "test"
    words = [result.task, result.dataset.strip("./"), *([] if split == "test" else [split])]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join(words))
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with atomic_file(path) as file:
        file.write(json.dumps(result.to_json(), indent=1).encode())
    return path


def read_results(folder: Path) -> list[Result]:
    """Read all results of a folder, in the order of their names.

    Raises:
        UniclError: a file is none.
    """
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def read_result(path: Path) -> Result:
    """Read one result.

    Raises:
        UniclError: the file is none.
    """
    try:
        return Result.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UniclError(f"{path} is no result of `unicl eval`; move it away") from error


def to_csv(results: Iterable[Result]) -> str:
    """One line per result, in the columns of `clip_benchmark build`."""
    rows: list[dict[str, Any]] = []
    for result in results:
        fields = result.to_json()
        metrics = fields.pop("metrics")
        del fields["unicl"]
        name = f"{fields['model']} {fields['pretrained']}"
        rows.append({**metrics, **fields, "model_fullname": name})
    columns = _columns(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = ("dataset", "model", "pretrained", "task", "language", "model_fullname")
    return [*first, *sorted({key for row in rows for key in row}.difference(first))]


def _their_metric(name: str) -> str:
    if match := re.fullmatch(r"(i2t|t2i)_r(\d+)", name):
        return _RECALLS[match[1]] + match[2]
    return _METRICS.get(name, name)
