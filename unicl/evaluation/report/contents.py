"""What a report shows; parts that are empty are left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from unicl.evaluation.answers import SavedAnswers
from unicl.evaluation.curves import Rows
from unicl.evaluation.results import Result


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model, and what is known of it."""

    name: str
    """What legends and columns call it, such as "UniCL"; no other run of the report has it."""
    results: Sequence[Result] = ()
    """What it reached, one result per task and part of a set."""
    answers: Mapping[str, SavedAnswers] = field(default_factory=dict)
    """What it took images for, by the name of a zero-shot result."""
    metrics: Rows = ()
    """Rows of `metrics.jsonl`: `step` and metrics by name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its configuration, nested as it is."""

    def result(self, task: str, name: str) -> Result | None:
        """Return the result of a task by its name, if there is one."""
        return next((r for r in self.results if (r.task, r.name) == (task, name)), None)

    @property
    def speed(self) -> float | None:
        """Median of the samples that it learned from per second, where that was written down."""
        speeds = [row.get("train/samples_per_second") for row in self.metrics]
        finite = [s for s in speeds if isinstance(s, int | float) and math.isfinite(s)]
        return median(finite) if finite else None


@dataclass(frozen=True, kw_only=True)
class FoundImage:
    """One image that a text query brought up."""

    image: bytes
    """The image file's bytes."""
    text: str
    """Its own name."""
    right: bool
    """Whether the query is its name."""


@dataclass(frozen=True, kw_only=True)
class TextQuery:
    """A text and the images that are nearest to it."""

    text: str
    """What was asked for."""
    images: Sequence[FoundImage]
    """The nearest images, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What several starts of one adapter make of the same thing."""

    text: str
    """What it is, or what was asked about it."""
    image: bytes | None = None
    """An image file of it, unless each start has its own."""
    found: Sequence[tuple[bytes | None, str, bool | None]]
    """Of each start an image file, what it says, and whether that is right, where it can be."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One adapter from several starts: how it learned, what it reached, some pictures."""

    title: str
    """What the adapter does."""
    words: str
    """What it was trained on and how, in a sentence or two."""
    metric: str
    """What the curves show, by its name in `metrics.jsonl`; a share."""
    called: str
    """What the metric is called."""
    curves: Mapping[str, Rows]
    """Rows of `metrics.jsonl` by start."""
    shown: Sequence[Shown] = ()
    """Some things that both starts were shown after training."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows."""

    title: str
    """Headline."""
    summary: str = ""
    """What was trained on what, in a sentence or two."""
    runs: Sequence[Run]
    """What is compared; a headline's figure is that of the first run that has it."""
    queries: Sequence[TextQuery] = ()
    """Text queries with the first run's best images."""
    comparisons: Sequence[Comparison] = ()
    """What adapters make of the first run's towers."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Other figures worth a line: training time, parameters, machine."""
    left_out: Sequence[str] = ()
    """What could not be read, and why, in one line each."""
    credits: Sequence[str] = ()
    """Who made the data, under which licence."""
