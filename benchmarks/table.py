"""The README's table, made from the JSON of the results so that the two cannot drift apart."""

from pathlib import Path
from typing import Any

from benchmarks import NAMES
from benchmarks.record import load
from unicl.errors import UsageError

START, END = "<!-- made by `python -m benchmarks table` -->", "<!-- end of the table -->"
# Share of the machine that other processes may take before the table says so.
_QUIET = 0.1
_REACHED = {True: "yes", False: "**no**", None: ""}


def write_table(readme: Path, results: Path) -> None:
    """Put the table of the results between the README's two markers."""
    text = readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UsageError(f"{readme} has no place for the table: {START} ... {END}")
    readme.write_text(f"{before}{START}\n\n{render(results)}\n{END}{after}", encoding="utf-8")


def render(results: Path) -> str:
    """Return the table as Markdown: every bar that was measured, then where."""
    lines = ["| what | bar | measured | reached | command |", "|---|---|---|---|---|"]
    places: dict[str, list[str]] = {}
    for name in NAMES:
        path = results / f"{name}.json"
        if not path.exists():
            lines.append(f"| {name} | | not measured yet | | `python -m benchmarks {name}` |")
            continue
        record, bars = load(path)
        places.setdefault(_place(record), []).append(name)
        command = f"`python -m benchmarks {name}`"
        for bar in bars:
            cells = (
                bar.what,
                bar.limit_text(),
                bar.measured_text(),
                _REACHED[bar.reached],
                command,
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for place, names in places.items():
        lines.append(f"{', '.join(names)}: {place}.")
    return "\n".join(lines) + "\n"


def _place(record: dict[str, Any]) -> str:
    where, versions = record["machine"], record["versions"]
    busy = (where["other_load"] or 0) > _QUIET
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "timm", "open_clip_torch")
    )
    gpu = f"{record['facts']['gpu']}; " if "gpu" in record["facts"] else ""
    return (
        f"{gpu}{where['cpu']}, {where['cores']} cores, {where['threads']} threads, "
        f"{where['memory_gib']} GiB; Python {versions['python']}, {packages}; "
        f"commit {record['commit']}; {record['date']}"
        + ("; **the machine was not quiet**" if busy else "")
        + ("; **quick sizes**" if record["quick"] else "")
    )
