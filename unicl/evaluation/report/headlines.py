"""The report's first figures, in words a newcomer knows."""

from dataclasses import dataclass
from html import escape

from unicl.evaluation.page import percent
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
    _Wording(
        "retrieval", "t2i_r5", "of the texts bring up an image of theirs among the first five"
    ),
    _Wording(
        "retrieval_fine_tuned",
        "t2i_r5",
        "of the texts bring up an image of theirs among the first five, after training on this set",
    ),
)


def headlines(report: Report) -> str:
    """Return a card per figure: what it is, what it means, what to compare it with."""
    cards = [
        f"<div><b>{escape(figure)}</b><span>{escape(words)}</span>"
        f'<span class="soft">{escape(aside)}</span></div>'
        for figure, words, aside in _cards(report)
    ]
    return f'<div class="figures">{"".join(cards)}</div>' if cards else ""


def _cards(report: Report) -> list[tuple[str, str, str]]:
    run, *others = report.runs
    cards = []
    for wording in _WORDINGS:
        result = _largest(run, others, wording)
        if result is None:
            continue
        cards.append(
            (
                percent(result.metrics[wording.metric]),
                _words(wording, result, alone=len(_asked(run, wording)) == 1),
                _aside(result, wording.metric, others),
            )
        )
    if run.speed is not None:
        cards.append((f"{run.speed:,.0f}", "samples (image and text) learned from per second", ""))
    return cards


def _asked(run: Run, wording: _Wording) -> list[Result]:
    return [r for r in run.results if r.task == wording.task and wording.metric in r.metrics]


def _largest(run: Run, others: list[Run], wording: _Wording) -> Result | None:
    """Choose the set with most images, of those that all runs have if there are any.

    The test part comes before all others, however large they are.
    """
    asked = _asked(run, wording)
    shared = [r for r in asked if all(each.result(r.task, r.name) for each in others)]
    return max(shared or asked, key=lambda r: (not r.marks, r.num_images), default=None)


def _words(wording: _Wording, result: Result, *, alone: bool) -> str:
    alone = alone and not result.marks
    names = result.protocol.get("num_classes")
    images = f"{result.num_images:,} images"
    words = wording.words.format(
        images=images if alone else f"{images} ({result.name})",
        set=result.name,
        of_names=f", out of {names:,} names" if names else "",
    )
    return words if alone or "{" in wording.words else f"{words} ({result.name})"


def _aside(result: Result, metric: str, others: list[Run]) -> str:
    parts = []
    if (chance := result.chance(metric)) is not None:
        parts.append(f"Guessing blindly: {percent(chance)}")
    for other in others:
        theirs = other.result(result.task, result.name)
        if theirs is not None and metric in theirs.metrics:
            parts.append(f"{other.name}: {percent(theirs.metrics[metric])}")
    return "; ".join(parts)
