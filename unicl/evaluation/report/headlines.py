"""The report's first figures, in words a newcomer knows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from unicl.evaluation.page import dot, percent
from unicl.evaluation.report.contents import Report, Run
from unicl.evaluation.results import Result


@dataclass(frozen=True)
class _Wording:
    """How a metric of a task is said."""

    task: str
    metric: str
    words: str


_NAMED = "get their own name at the first guess"
_WORDINGS = (
    _Wording("zero_shot", "top1", f"of {{images}} {_NAMED}{{of_names}}"),
    _Wording("zero_shot", "top5", "have their own name among the first five guesses"),
    _Wording("fine_tune", "top1", f"of {{images}} {_NAMED}, after training on this set"),
    _Wording(
        "linear_probe",
        "top1",
        "of {images} get their own class from a linear probe",
    ),
    _Wording(
        "few_shot",
        "5_shot",
        "of images get their own class after five examples of each, on {set}",
    ),
    _Wording("retrieval", "t2i_r5", "of the texts bring up {one} of theirs among the first five"),
    _Wording(
        "retrieval_fine_tuned",
        "t2i_r5",
        "of the texts bring up {one} of theirs among the first five, after training on this set",
    ),
    _Wording("detection", "ap50", "average precision at overlap 0.5, on {set}"),
    _Wording(
        "detection_zero_shot",
        "ap50",
        "average precision at overlap 0.5, on {set}, whose classes are known by name alone",
    ),
    _Wording("vqa", "accuracy", "of {images} are answered as people do"),
)


@dataclass(frozen=True)
class _Card:
    """One figure of one run."""

    run: Run
    figure: str
    words: str
    aside: str


def headlines(report: Report) -> str:
    """Return a card per figure: whose it is, what it means, what to compare it with.

    Of several runs it is that of the first that has such a figure.
    """
    cards = "".join(_html(card, report.runs) for card in _cards(report.runs))
    return f'<div class="figures">{cards}</div>' if cards else ""


def _html(card: _Card, runs: Sequence[Run]) -> str:
    whose = f'<span class="long">{dot(runs.index(card.run))}{escape(card.run.name)}</span>'
    aside = f'<span class="soft">{escape(card.aside)}</span>'
    return (
        f"<div>{whose if len(runs) > 1 else ''}<b>{escape(card.figure)}</b>"
        f"<span>{escape(card.words)}</span>{aside if card.aside else ''}</div>"
    )


def _cards(runs: Sequence[Run]) -> Iterator[_Card]:
    alone = len({result.name for run in runs for result in run.results}) == 1
    for wording in _WORDINGS:
        run = next((run for run in runs if _asked(run, wording)), None)
        if run is None:
            continue
        others = [other for other in runs if other is not run]
        result = _largest(run, others, wording)
        yield _Card(
            run,
            percent(result.metrics[wording.metric]),
            _words(wording, result, alone=alone),
            _aside(result, wording.metric, others),
        )
    timed = [(run, f"{run.speed:,.0f}") for run in runs if run.speed is not None]
    if timed:
        (run, speed), *rest = timed
        aside = "; ".join(f"{other.name}: {theirs}" for other, theirs in rest)
        yield _Card(run, speed, "samples learned from per second", aside)


def _asked(run: Run, wording: _Wording) -> list[Result]:
    return [r for r in run.results if r.task == wording.task and wording.metric in r.metrics]


def _largest(run: Run, others: Sequence[Run], wording: _Wording) -> Result:
    """Choose the set with most images, of those that all runs have if there are any.

    The test part comes before all others, however large they are.
    """
    asked = _asked(run, wording)
    shared = [r for r in asked if all(each.result(r.task, r.name) for each in others)]
    return max(shared or asked, key=lambda r: (not r.marks, r.num_images))


def _words(wording: _Wording, result: Result, *, alone: bool) -> str:
    alone = alone and not result.marks
    names = result.protocol.get("num_classes")
    images = f"{result.num_images:,} {result.noun}"
    words = wording.words.format(
        images=images if alone else f"{images} ({result.name})",
        set=result.name,
        one="a video" if result.noun == "videos" else "an image",
        of_names=f", out of {names:,} names" if names else "",
    )
    named = "{images}" in wording.words or "{set}" in wording.words
    return words if alone or named else f"{words} ({result.name})"


def _aside(result: Result, metric: str, others: Sequence[Run]) -> str:
    parts = []
    if (chance := result.chance(metric)) is not None:
        parts.append(f"Guessing blindly: {percent(chance)}")
    for other in others:
        theirs = other.result(result.task, result.name)
        if theirs is not None and metric in theirs.metrics:
            parts.append(f"{other.name}: {percent(theirs.metrics[metric])}")
    return "; ".join(parts)
