"""What a benchmark found, shown on the terminal and kept as JSON with machine and commit."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "timm", "open_clip_torch", "webdataset", "numpy")
_RELEVANT_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_VERDICTS = {True: "[green]reached[/green]", False: "[red]missed[/red]", None: ""}


@dataclass(frozen=True)
class Bar:
    """One figure and what it must reach."""

    what: str
    measured: float
    limit: float | None
    """Unset where the figure is there to be known, not to be reached."""
    unit: str
    better: Literal["at most", "at least"]
    spread: tuple[float, float] | None = None
    """Lowest and highest round."""

    @property
    def reached(self) -> bool | None:
        """Whether the figure is on the right side of the limit, if there is one."""
        if self.limit is None:
            return None
        over = self.measured >= self.limit
        return over if self.better == "at least" else self.measured <= self.limit

    def limit_text(self) -> str:
        """Write the limit, such as "at most 256 MiB"."""
        if self.limit is None:
            return "none"
        return f"{self.better} {_number(self.limit)}{_spaced(self.unit)}"

    def measured_text(self) -> str:
        """Write the figure, with its spread if it has one."""
        text = f"{_number(self.measured)}{_spaced(self.unit)}"
        if self.spread is not None:
            text += f" ({_number(self.spread[0])} to {_number(self.spread[1])})"
        return text


@dataclass(frozen=True)
class Result:
    """What a benchmark found."""

    bars: Sequence[Bar] = ()
    tables: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    """Further figures; every table has a title, its rows have the same keys."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Sizes and settings that the figures depend on."""


def save(
    name: str,
    question: str,
    result: Result,
    *,
    quick: bool,
    folder: Path,
    other_load: float | None = None,
) -> Path:
    """Write a result with machine, versions and commit to NAME.json."""
    import torch

    record = {
        "name": name,
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "commit": commit(),
        "machine": {**machine(), "threads": torch.get_num_threads(), "other_load": other_load},
        "versions": {"python": platform.python_version(), **_versions()},
        "bars": [{**asdict(bar), "reached": bar.reached} for bar in result.bars],
        "facts": dict(result.facts),
        "tables": {title: list(rows) for title, rows in result.tables.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_rounded(record), indent=2) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> tuple[dict[str, Any], list[Bar]]:
    """Read a record that `save` wrote, and its bars."""
    record = json.loads(path.read_text(encoding="utf-8"))
    bars = []
    for entry in record["bars"]:
        spread = tuple(entry["spread"]) if entry["spread"] else None
        fields = {key: value for key, value in entry.items() if key not in ("reached", "spread")}
        bars.append(Bar(**fields, spread=spread))
    return record, bars


def machine() -> dict[str, object]:
    """Describe the machine without naming it."""
    cpu, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":")[::2] for line in cpuinfo.read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, value in lines}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "instructions": [flag for flag in _RELEVANT_FLAGS if flag in flags.split()],
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
    }


def commit() -> str:
    """Return the commit, with "-dirty" if files other than results differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "uncommitted"
    own = (":!benchmarks/results", ":!benchmarks/README.md")
    return head + ("-dirty" if _git("status", "--porcelain", "--", ".", *own) else "")


def show(question: str, result: Result) -> None:
    """Print a result."""
    console = Console()
    console.print(f"\n[bold]{question}[/bold]")
    for key, value in result.facts.items():
        console.print(f"  {key.replace('_', ' ')}: {value}", highlight=False)
    for title, rows in result.tables.items():
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(column.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)
    if result.bars:
        table = Table(title="Bars", title_justify="left")
        for column in ("what", "bar", "measured", ""):
            table.add_column(column)
        for bar in result.bars:
            table.add_row(bar.what, bar.limit_text(), bar.measured_text(), _VERDICTS[bar.reached])
        console.print(table)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _rounded(value: Any) -> Any:
    """Four significant digits: more would be noise, and would differ in every run."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spaced(unit: str) -> str:
    return unit if unit in ("x", "%") else f" {unit}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
