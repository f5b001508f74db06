"""A run's figures over its steps, drawn as SVG that takes its colours from the page around it."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl.errors import UniclError
from unicl.evaluation.page import RUN_COLOURS

Rows = Sequence[Mapping[str, Any]]
"""Rows of a `metrics.jsonl`: a step and metrics by name."""

# More points than pixels only make the page heavy.
_MOST_POINTS = 400

# Characters of a run's name in a legend, which lies over the curves; its ends tell it from others.
_LONGEST = 24

# Stand-ins that no other element has, replaced by the page's CSS variables after drawing.
_COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--line)",
    **{f"#00001{n}": f"var(--{name})" for n, name in enumerate(RUN_COLOURS)},
}
_INK, _LINE, *_OF_RUNS = _COLOURS
# Of a run's metrics; more runs than colours take the colours anew with the second pair.
_DASHES = (("-", "--"), (":", "-."))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: which metrics it shows and how."""

    title: str
    metrics: Mapping[str, str]
    """What the legend calls each metric, by the metric's name."""
    percent: bool = False
    """Values are shares, shown in percent from 0 to 100."""
    from_zero: bool = False
    """The vertical axis begins at zero."""


PANELS = (
    Panel(title="Loss", metrics={"train/loss": "loss"}),
    Panel(
        title="Held-out images named right",
        metrics={"zero_shot/top1": "first guess", "zero_shot/top5": "first five"},
        percent=True,
    ),
    Panel(title="Scale of the similarities", metrics={"train/scale": "scale"}),
    Panel(title="Learning rate", metrics={"train/learning_rate": "learning rate"}, from_zero=True),
    Panel(
        title="Samples per second",
        metrics={"train/samples_per_second": "samples/s"},
        from_zero=True,
    ),
    Panel(title="Gradient norm", metrics={"train/grad_norm": "norm"}, from_zero=True),
)


@dataclass(frozen=True)
class Curve:
    """Finite values of one metric over the steps."""

    steps: NDArray[np.float64] = field(repr=False)
    values: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, rows: Rows, metric: str) -> "Curve":
        """Take one metric out of the rows; a long run is thinned to means of neighbours."""
        points = [
            (float(row["step"]), float(row[metric]))
            for row in rows
            if isinstance(row.get(metric), int | float) and math.isfinite(row[metric])
        ]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        if len(steps) > _MOST_POINTS:
            steps, values = (
                np.array([part.mean() for part in np.array_split(series, _MOST_POINTS)])
                for series in (steps, values)
            )
        return cls(steps, values)


def draw(panel: Panel, runs: Mapping[str, Rows]) -> str | None:
    """Draw one panel as an `<svg>` element, or nothing where no run has its metrics.

    Args:
        panel: what to draw.
        runs: rows by the name of the run, in the order of their colours.

    Raises:
        UniclError: matplotlib is missing.
    """
    curves = [
        (
            _OF_RUNS[run % len(_OF_RUNS)],
            _DASHES[run // len(_OF_RUNS) % 2][number],
            _label(name, called, panel, runs),
            curve,
        )
        for run, (name, rows) in enumerate(runs.items())
        for number, (metric, called) in enumerate(panel.metrics.items())
        if len((curve := Curve.of(rows, metric)).steps)
    ]
    if not curves:
        return None
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter, StrMethodFormatter
    except ImportError as error:
        raise UniclError(
            "the report's curves need matplotlib: pip install 'unicl[demo]'"
        ) from error
    with rc_context({**_STYLE, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for colour, dash, label, curve in curves:
            marker = "o" if len(curve.steps) < 25 else ""
            axes.plot(
                curve.steps, curve.values, dash, color=colour, label=label, marker=marker, ms=3.5
            )
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(length=0)
        if panel.percent:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif panel.from_zero:
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(loc="best", fontsize=9 if len(curves) < 5 else 7)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _inline(target.getvalue(), panel.title)


def _label(run: str, called: str, panel: Panel, runs: Mapping[str, Rows]) -> str:
    if len(runs) == 1:
        return called
    if len(run) > _LONGEST:
        run = f"{run[: _LONGEST // 2]}\u2026{run[-_LONGEST // 2 :]}"
    return run if len(panel.metrics) == 1 else f"{run}, {called}"


def _inline(svg: str, title: str) -> str:
    """Cut a stand-alone SVG down to an element of a page, coloured by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title} over the steps" ', 1)
    # Ids are unique in a file of their own; many files share this page.
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
