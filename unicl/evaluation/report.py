"""The report of a run: one self-contained HTML page of figures, curves, tables and pictures."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from unicl.data.atomic import atomic_file
from unicl.errors import UsageError
from unicl.evaluation.curves import PANELS, Rows, draw
from unicl.evaluation.page import Cell, flatten, page, picture, table


@dataclass(frozen=True, kw_only=True)
class Split:
    """Zero-shot figures of one held-out set."""

    name: str
    """What is in it, such as "Unseen skin tones"."""
    top1: float
    """Share of the images whose own name is the first guess, in 0..1."""
    top5: float
    """The same for the first five guesses."""
    num_images: int
    """Images asked for."""
    num_classes: int
    """Names to choose from."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One held-out image and what the model takes it for."""

    image: bytes
    """The image file's bytes."""
    truth: str
    """Its own name."""
    guesses: Sequence[tuple[str, float]]
    """The best names and their probabilities, best first."""


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
class Outcome:
    """What one training run reached."""

    name: str
    """What legends and columns call it, such as "UniCL"."""
    metrics: Rows = ()
    """Rows of `metrics.jsonl`: `step` and metrics by name."""
    splits: Sequence[Split] = ()
    """Zero-shot figures; the first split is the one in the headline."""
    retrieval: Mapping[str, float] = field(default_factory=dict)
    """Recalls in 0..1 as the retrieval evaluator names them: `retrieval/i2t_r1`, ..."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows; parts that are empty are left out."""

    title: str
    """Headline."""
    summary: str = ""
    """What was trained on what, in a sentence or two."""
    run: Outcome
    """The run the report is about."""
    comparison: Outcome | None = None
    """The same model trained another way: extra columns and second curves."""
    right: Sequence[Prediction] = ()
    """Images that were named right."""
    wrong: Sequence[Prediction] = ()
    """Images that were not."""
    queries: Sequence[TextQuery] = ()
    """Text queries with their best images."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Other figures worth a line: training time, parameters, machine."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, nested as it is."""
    credits: Sequence[str] = ()
    """Who made the data, under which licence."""


def write_report(path: Path, report: Report) -> None:
    """Write the page; it appears complete or not at all, and needs no other file and no network.

    Raises:
        UsageError: the folder does not exist.
        UniclError: the file cannot be written, an image cannot be read, or matplotlib is missing.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    text = render(report)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def render(report: Report) -> str:
    """The whole page as HTML."""
    sections: tuple[Callable[[Report], str], ...] = (
        _header,
        _zero_shot,
        _retrieval,
        _curves,
        _predictions,
        _queries,
        _facts,
        _footer,
    )
    return page(report.title, "\n".join(filter(None, (section(report) for section in sections))))


def _header(report: Report) -> str:
    cards = [
        f"<div><b>{escape(figure)}</b><span>{escape(words)}</span>"
        f'<span class="soft">{escape(aside)}</span></div>'
        for figure, words, aside in _headlines(report)
    ]
    summary = f"<p>{escape(report.summary)}</p>" if report.summary else ""
    figures = f'<div class="figures">{"".join(cards)}</div>' if cards else ""
    return f"<header><h1>{escape(report.title)}</h1>\n{summary}{figures}</header>"


def _headlines(report: Report) -> list[tuple[str, str, str]]:
    """Figures, what each means and what to compare it with, in words a newcomer knows."""
    run, other = report.run, report.comparison
    cards = []
    if run.splits:
        split = run.splits[0]
        cards += [
            (
                _percent(split.top1),
                f"of {split.num_images:,} images it never saw before get their own name at the "
                f"first guess, out of {split.num_classes:,} names",
                _aside(_chance(split, 1), other, _split(other, split.name, "top1")),
            ),
            (
                _percent(split.top5),
                "have their own name among the first five guesses",
                _aside(_chance(split, 5), other, _split(other, split.name, "top5")),
            ),
        ]
    if (recall := _recalls(run).get(("t2i", 5))) is not None:
        words = "of the texts bring up an image of theirs among the first five"
        aside = _aside(None, other, _recalls(other).get(("t2i", 5)))
        cards.append((_percent(recall), words, aside))
    if (speed := _speed(run)) is not None:
        cards.append((f"{speed:,.0f}", "samples (image and text) learned from per second", ""))
    return cards


def _aside(chance: float | None, other: Outcome | None, value: float | None) -> str:
    parts = []
    if chance is not None:
        parts.append(f"Guessing blindly: {_percent(chance)}")
    if other is not None and value is not None:
        parts.append(f"{other.name}: {_percent(value)}")
    return "; ".join(parts)


def _chance(split: Split, guesses: int) -> float:
    return min(guesses, split.num_classes) / split.num_classes


def _split(outcome: Outcome | None, name: str, figure: str) -> float | None:
    splits = outcome.splits if outcome is not None else ()
    return next((getattr(split, figure) for split in splits if split.name == name), None)


def _recalls(outcome: Outcome | None) -> dict[tuple[str, int], float]:
    recalls = {}
    for name, value in outcome.retrieval.items() if outcome is not None else ():
        if match := re.search(r"(i2t|t2i)_r(\d+)$", name):
            recalls[match[1], int(match[2])] = value
    return recalls


def _speed(run: Outcome) -> float | None:
    name = "train/samples_per_second"
    speeds = [row[name] for row in run.metrics if name in row]
    return median(speeds) if speeds else None


def _zero_shot(report: Report) -> str:
    if not report.run.splits:
        return ""
    runs = _outcomes(report)
    rows: list[list[Cell]] = [
        [
            split.name,
            f"{split.num_images:,}",
            f"{split.num_classes:,}",
            _percent(_chance(split, 1)),
            tuple(_percent(_split(run, split.name, "top1")) for run in runs),
            tuple(_percent(_split(run, split.name, "top5")) for run in runs),
        ]
        for split in report.run.splits
    ]
    head = ("Held-out images", "Images", "Names", "Chance", "First guess right", "In first five")
    return (
        "<h2>Naming unseen images</h2>\n"
        '<p class="soft">Zero-shot classification: each image is compared with every name, and the '
        "nearest name is the guess. None of these images was trained on.</p>\n"
        + table(head, rows, runs=[run.name for run in runs])
    )


def _retrieval(report: Report) -> str:
    recalls = [_recalls(outcome) for outcome in _outcomes(report)]
    if not recalls[0]:
        return ""
    ks = sorted({k for _, k in recalls[0]})
    rows: list[list[Cell]] = [
        [words, *(tuple(_percent(each.get((direction, k))) for each in recalls) for k in ks)]
        for direction, words in (("i2t", "Image to text"), ("t2i", "Text to image"))
    ]
    head = ["Search", *(f"R@{k}" for k in ks)]
    return (
        "<h2>Searching</h2>\n"
        '<p class="soft">Recall at k: how often a right answer is among the first k that a search '
        "over all held-out images, or all their texts, brings up.</p>\n"
        + table(head, rows, runs=[outcome.name for outcome in _outcomes(report)])
    )


def _outcomes(report: Report) -> list[Outcome]:
    return [report.run] if report.comparison is None else [report.run, report.comparison]


def _curves(report: Report) -> str:
    runs = {outcome.name: outcome.metrics for outcome in _outcomes(report)}
    drawn = [(panel.title, svg) for panel in PANELS if (svg := draw(panel, runs))]
    if not drawn:
        return ""
    figures = "\n".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn
    )
    return f'<h2>How it learned</h2>\n<div class="curves">{figures}</div>'


def _predictions(report: Report) -> str:
    if not report.right and not report.wrong:
        return ""
    parts = [
        "<h2>What it sees</h2>\n"
        "<p class=\"soft\">In bold the image's own name; below it the model's best guesses and "
        "how sure it is of each.</p>"
    ]
    for heading, predictions in (("Named right", report.right), ("Named wrong", report.wrong)):
        if predictions:
            cards = "\n".join(_card(prediction) for prediction in predictions)
            parts.append(f'<h3>{heading}</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _card(prediction: Prediction) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if name == prediction.truth else ""}">'
        f'<i style="width:{100 * min(max(probability, 0.0), 1.0):.1f}%"></i>'
        f"<span>{escape(name)}</span><span>{_sureness(probability)}</span></div>"
        for name, probability in prediction.guesses
    )
    return (
        f'<div class="card">{picture(prediction.image, prediction.truth)}'
        f'<div><div class="truth">{escape(prediction.truth)}</div>{guesses}</div></div>'
    )


def _queries(report: Report) -> str:
    if not report.queries:
        return ""
    rows = "\n".join(_query(query) for query in report.queries)
    return (
        "<h2>Looking for images by text</h2>\n"
        '<p class="soft">The five images nearest to each text, best first. A frame marks images '
        f"that have this very name.</p>\n{rows}"
    )


def _query(query: TextQuery) -> str:
    figures = "".join(
        f'<figure class="{"right" if found.right else "other"}">'
        f"{picture(found.image, found.text)}<figcaption>{escape(found.text)}"
        f"{' &#10003;' if found.right else ''}</figcaption></figure>"
        for found in query.images
    )
    return f'<div class="query"><b>{escape(query.text)}</b><div class="hits">{figures}</div></div>'


def _facts(report: Report) -> str:
    facts = list(report.facts.items())
    for outcome in _outcomes(report):
        if (speed := _speed(outcome)) is not None:
            facts.append(
                (f"Throughput, {outcome.name}", f"{speed:,.0f} samples per second (median)")
            )
    settings = flatten(report.settings)
    if not facts and not settings:
        return ""
    parts = ["<h2>The run</h2>"]
    if facts:
        parts.append(_definitions(facts))
    if settings:
        parts.append(f"<details><summary>All settings</summary>{_definitions(settings)}</details>")
    return "\n".join(parts)


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pairs
    )
    return f'<div class="scroll"><table class="pairs"><tbody>\n{rows}\n</tbody></table></div>'


def _footer(report: Report) -> str:
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in report.credits)
    return f"<footer>{lines}</footer>" if report.credits else ""


def _percent(share: float | None) -> str:
    """A share as a person reads it: 71.3%, and 0.053% where more digits are needed."""
    if share is None:
        return "-"
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def _sureness(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.01 else "&lt;1%"
