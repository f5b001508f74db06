"""Adapters on the same towers, each beside the same adapter without them."""

from html import escape

from unicl.evaluation.curves import Curve, Panel, draw
from unicl.evaluation.page import Column, percent, picture, table
from unicl.evaluation.report.contents import Comparison, Report, Shown


def comparisons(report: Report) -> str:
    """Return a section per adapter: what it reached, how it learned, and pictures."""
    if not report.comparisons:
        return ""
    overview = table(
        [Column("Adapter", words=True), Column("Measured by", words=True), *_starts(report)],
        [
            [each.title, each.called, *(percent(value) for value in _reached(each))]
            for each in report.comparisons
        ],
    )
    sections = "\n".join(map(_section, report.comparisons))
    return (
        f"<h2>One pair of towers, {len(report.comparisons)} adaptations</h2>\n"
        '<p class="soft">The same adapter, data and steps each time; what differs is whether the '
        f"towers come from the training above or from nothing.</p>\n{overview}\n{sections}"
    )


def _starts(report: Report) -> list[Column]:
    names = dict.fromkeys(start for each in report.comparisons for start in each.curves)
    return [Column(name, run=number) for number, name in enumerate(names)]


def _reached(comparison: Comparison) -> list[float]:
    curves = (Curve.of(rows, comparison.metric) for rows in comparison.curves.values())
    return [float(curve.values[-1]) if len(curve.values) else float("nan") for curve in curves]


def _section(comparison: Comparison) -> str:
    panel = Panel(
        title=comparison.called, metrics={comparison.metric: comparison.called}, percent=True
    )
    svg = draw(panel, comparison.curves)
    figure = (
        '<div class="curves alone"><figure>'
        f"<figcaption>{escape(comparison.called)}</figcaption>{svg}</figure></div>"
        if svg
        else ""
    )
    shown = "\n".join(_shown(each, list(comparison.curves)) for each in comparison.shown)
    return (
        f'<h3>{escape(comparison.title)}</h3>\n<p class="soft">{escape(comparison.words)}</p>\n'
        f"{figure}\n{shown}"
    )


def _shown(each: Shown, starts: list[str]) -> str:
    whole = _figure(each.image, each.text, "") if each.image is not None else ""
    figures = "".join(
        _figure(image, said, "right" if right else "other", start)
        for start, (image, said, right) in zip(starts, each.found, strict=True)
    )
    seen = f'<div class="seen">{whole}{figures}</div>'
    return f'<div class="query"><b>{escape(each.text)}</b>{seen}</div>'


def _figure(image: bytes | None, said: str, style: str, start: str = "") -> str:
    whose = f"<small>{escape(start)}</small><br>" if start else ""
    mark = " &#10003;" if style == "right" else ""
    shown = picture(image, said or start) if image is not None else ""
    words = f"<figcaption>{whose}{escape(said) if start else ''}{mark}</figcaption>"
    return f'<figure class="{style}">{shown}{words}</figure>'
