"""What the runs were: facts, the settings in which they differ, and all settings in a fold."""

from collections.abc import Sequence

from unicl.evaluation.page import Cell, Column, flatten, table
from unicl.evaluation.report.contents import Report, Run


def settings(report: Report) -> str:
    """Return facts and settings."""
    runs = [run for run in report.runs if run.settings]
    flat = [dict(flatten(run.settings)) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    everything = [[name, *(each.get(name, "-") for each in flat)] for name in names]
    differing = [row for row in everything if len(set(row[1:])) > 1]
    parts = []
    facts: list[list[Cell]] = [[name, value] for name, value in report.facts.items()]
    facts += [
        [f"Throughput, {run.name}", f"{run.speed:,.0f} samples per second (median)"]
        for run in report.runs
        if run.speed is not None
    ]
    if facts:
        parts.append(table([Column("", words=True), Column("", words=True)], facts, style="pairs"))
    if len(runs) > 1:
        parts.append("<h3>Settings that differ</h3>")
        parts.append(_table(runs, report, differing) if differing else "<p>None.</p>")
    if everything:
        whole = _table(runs, report, everything)
        parts.append(f"<details><summary>All settings</summary>{whole}</details>")
    if not parts:
        return ""
    heading = "The run" if len(report.runs) == 1 else "The runs"
    return "\n".join([f"<h2>{heading}</h2>", *parts])


def _table(runs: Sequence[Run], report: Report, rows: Sequence[Sequence[str]]) -> str:
    numbers = {run.name: number for number, run in enumerate(report.runs)}
    names = [run.name for run in runs] if len(report.runs) > 1 else [""]
    columns = [
        Column("", words=True),
        *(Column(name, run=numbers.get(name), words=True) for name in names),
    ]
    return table(columns, rows, style="pairs code")
