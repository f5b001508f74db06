"""A report as a page: its sections, one below the other."""

from collections.abc import Callable
from html import escape
from pathlib import Path

from unicl.data.atomic import atomic_file, require_parent
from unicl.evaluation.curves import PANELS, draw
from unicl.evaluation.page import page
from unicl.evaluation.report.comparisons import comparisons
from unicl.evaluation.report.contents import Report
from unicl.evaluation.report.headlines import headlines
from unicl.evaluation.report.pictures import answers, queries
from unicl.evaluation.report.settings import settings
from unicl.evaluation.report.tables import tables


def write_report(path: Path, report: Report) -> None:
    """Write the page; it appears complete or not at all, and needs no other file and no network.

    Raises:
        UsageError: the folder does not exist.
        UniclError: the file cannot be written, an image cannot be read, or matplotlib is missing.
    """
    require_parent(path)
    text = render(report)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def render(report: Report) -> str:
    """Return the whole page as HTML."""
    sections: tuple[Callable[[Report], str], ...] = (
        _header,
        tables,
        _curves,
        answers,
        queries,
        comparisons,
        settings,
        _footer,
    )
    return page(report.title, "\n".join(filter(None, (section(report) for section in sections))))


def _header(report: Report) -> str:
    summary = f"<p>{escape(report.summary)}</p>" if report.summary else ""
    left_out = "\n".join(f"<p><b>Left out:</b> {escape(line)}.</p>" for line in report.left_out)
    notes = f'<div class="notes">{left_out}</div>' if left_out else ""
    return f"<header><h1>{escape(report.title)}</h1>\n{summary}{notes}{headlines(report)}</header>"


def _curves(report: Report) -> str:
    runs = {run.name: run.metrics for run in report.runs}
    drawn = [(panel.title, svg) for panel in PANELS if (svg := draw(panel, runs))]
    if not drawn:
        return ""
    figures = "\n".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn
    )
    return f'<h2>How it learned</h2>\n<div class="curves">{figures}</div>'


def _footer(report: Report) -> str:
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in report.credits)
    return f"<footer>{lines}</footer>" if report.credits else ""
