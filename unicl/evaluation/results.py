"""What protocols measured, on disk in CLIP_benchmark's schema, so that its tools read ours."""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from unicl.data.atomic import atomic_file, write_error
from unicl.errors import UniclError
from unicl.evaluation.published import Task, is_rank, reported_part

logger = logging.getLogger("unicl")

DETECTIONS = ".detections.json"
"""Ends the name of what was found in images, beside the result that was measured on it."""
QUESTION_TYPE = "type/"
"""Begins the names of metrics of one type of question."""
SAID = ".said.json"
"""Ends the name of what was answered, or said of images, beside the result."""

# CLIP_benchmark's words for ours; i2t is an image that looks for its texts.
_TASKS: dict[Task, str] = {
    "zero_shot": "zeroshot_classification",
    "linear_probe": "linear_probe",
    "retrieval": "zeroshot_retrieval",
}
# They have no word for the 11-point mean and for ranks: these keep ours, map11, t2i_mean_rank, ...
_METRICS = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class": "mean_per_class_recall",
    "map": "mean_average_precision",
}
_RECALLS = {"i2t": "text_retrieval_recall@", "t2i": "image_retrieval_recall@"}
# What a table's row shows beside the headline, where it was measured.
_BESIDE = {"top1": "top5", "map11": "map", "map": "map11", "ap": "ap50", "ar100": "ar10"}
_ALL_SHOWN = (
    *("few_shot", "retrieval", "retrieval_fine_tuned", "retrieval_reranked"),
    *("detection_few_shot", "vqa", "captioning"),
)
# VQAv2 has 65 types of questions.
_MOST_TYPES = 12
# Characters of a set's name in a file's name; file systems allow about 255 in all.
_LONGEST = 80


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
    """By name: shares in 0..1 (top1, mean_per_class, map11, i2t_r1, ...), and ranks of which 1 is
    best (i2t_median_rank, i2t_mean_rank, ...)."""
    headline: str
    """Name of the metric that the papers report of this set."""
    interval: tuple[float, float] | None = None
    """95% confidence interval of the headline."""
    num_images: int
    """Images that were asked about."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Images of the set that were left out, by reason."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: templates, splits, regularisation, precision, ..."""
    seconds: float = 0.0
    """How long it took, with what was embedded for it."""

    @property
    def name(self) -> str:
        """The set, and what tells this result from others on it: photos, photos (val)."""
        return f"{self.dataset} ({', '.join(self.marks)})" if self.marks else self.dataset

    @property
    def noun(self) -> str:
        """What was asked about: images, videos, or questions."""
        if self.task == "vqa":
            return "questions"
        return "videos" if "num_frames" in self.protocol else "images"

    @property
    def marks(self) -> list[str]:
        """What tells it from the usual: part of the set, another way of reading, a saved probe."""
        split = self.protocol.get("split")
        is_usual = not split or split == reported_part(self.dataset, self.task)
        marks = [None if is_usual else split, self.protocol.get("mark"), self.protocol.get("probe")]
        return [mark for mark in marks if mark]

    @property
    def left_out(self) -> str:
        """How many images were left out and why, in words; empty if none were."""
        parts = {"": self.skipped, " of train": self.protocol.get("skipped_in_train") or {}}
        return ", ".join(
            f"{sum(skipped.values()):,}{where} "
            f"({', '.join(f'{reason}: {count:,}' for reason, count in skipped.items())})"
            for where, skipped in parts.items()
            if skipped
        )

    @property
    def shown(self) -> list[str]:
        """Names of the metrics of a table's rows: the headline, and what belongs beside it."""
        if self.task in _ALL_SHOWN:
            types = [name for name in self.metrics if name.startswith(QUESTION_TYPE)]
            left_out = {*types} if len(types) > _MOST_TYPES else set()
            if self.task == "retrieval_reranked":  # twice the figures: recalls are enough
                left_out = {name for name in self.metrics if is_rank(name)}
            return [name for name in self.metrics if name not in left_out]
        beside = _BESIDE.get(self.headline)
        return [self.headline, *([beside] if beside and beside in self.metrics else [])]

    def interval_of(self, metric: str) -> tuple[float, float] | None:
        """Return the 95% confidence interval of a metric, where it is known."""
        if metric in (intervals := self.protocol.get("intervals") or {}):
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
        """Return what `to_json` was made of.

        Raises:
            ValueError: a field is missing, or is not what it should be.
        """
        own = _table(fields.get("unicl"), "unicl")
        own = {name: own.get(name) for name in _CHECKS} | {"dataset": fields.get("dataset")}
        for name, check in _CHECKS.items():
            check(own[name], name)
        for name, check in _CHECKS_OF_PROTOCOL.items():
            if (value := own["protocol"].get(name)) is not None:
                check(value, name)
        if own["headline"] not in own["metrics"]:
            raise ValueError(f"there is no metric {own['headline']!r}")
        own["metrics"] = {name: float(value) for name, value in own["metrics"].items()}
        own["interval"] = None if own["interval"] is None else tuple(own["interval"])
        return cls(**own)


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no table")
    return value


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")


def _task(value: Any, name: str) -> None:
    if value not in get_args(Task):
        raise ValueError(f"{name} is none that is known")


def _count(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is no count")


def _number(value: Any, name: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is no number")


def _interval(value: Any, name: str) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} is no pair of numbers")
    for end in value:
        _number(end, name)


def _no_or_interval(value: Any, name: str) -> None:
    if value is not None:
        _interval(value, name)


def _each(check: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    def checked(value: Any, name: str) -> None:
        for key, each in _table(value, name).items():
            check(each, f"{name}.{key}")

    return checked


_CHECKS: Mapping[str, Callable[[Any, str], object]] = {
    "task": _task,
    "dataset": _text,
    "model": _text,
    "metrics": _each(_number),
    "headline": _text,
    "interval": _no_or_interval,
    "num_images": _count,
    "skipped": _each(_count),
    "protocol": _table,
    "seconds": _number,
}
# What is reckoned with; all else of a protocol is only shown.
_CHECKS_OF_PROTOCOL: Mapping[str, Callable[[Any, str], object]] = {
    "split": _text,
    "probe": _text,
    "chosen_on": _text,
    "num_classes": _count,
    "skipped_in_train": _each(_count),
    "shared_captions": _count,
    "intervals": _each(_interval),
}


def save_result(folder: Path, result: Result) -> Path:
    """Write one result into a folder of results; the same measured anew takes its place.

    Its name is task_set.json; the part of the set and a saved probe follow, each behind an @.
    """
    words = map(_file_word, (result.dataset, *result.marks))
    path = folder / f"{result.task}_{'@'.join(words)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with atomic_file(path) as file:
        file.write(json.dumps(result.to_json(), indent=1).encode())
    return path


def _file_word(name: str) -> str:
    """Return a name as part of a file's name; those that this changes remain different."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip("./"))[:_LONGEST]
    if word == name:
        return word
    return f"{word}-{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def result_files(folder: Path) -> list[Path]:
    """Return the files that results lie in, in the order of their names."""
    return [p for p in sorted(folder.glob("*.json")) if not p.name.endswith((DETECTIONS, SAID))]


def read_results(folder: Path) -> list[Result]:
    """Read all results of a folder, in the order of their names; a damaged one is left out."""
    results = []
    for path in result_files(folder):
        try:
            results.append(read_result(path))
        except UniclError as error:
            logger.warning("%s", error)
    return results


def read_result(path: Path) -> Result:
    """Read one result.

    Raises:
        UniclError: the file is none.
    """
    try:
        return Result.from_json(_table(json.loads(path.read_text(encoding="utf-8")), "it"))
    except (OSError, ValueError) as error:
        raise UniclError(f"{path} is no result of `unicl eval`, move it away ({error})") from error


def to_csv(results: Iterable[Result]) -> str:
    """One line per result, in the columns of `clip_benchmark build`."""
    rows: list[dict[str, Any]] = []
    for result in results:
        fields = result.to_json()
        # A millionth of a set is less than an image; more digits are noise of the arithmetic.
        metrics = {name: round(value, 6) for name, value in fields.pop("metrics").items()}
        del fields["unicl"]
        name = f"{fields['model']} {fields['pretrained']}".rstrip()
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
