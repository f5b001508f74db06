"""How long does `unicl demo` take, and how well does its model name held-out images?"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.record import Bar, Result
from unicl.engine.metrics import read_metrics
from unicl.errors import UniclError, UsageError

_MINUTES = re.compile(r"Whole job\D*?([\d.]+) minutes")
_QUICK = ("--trainer.steps", "4", "--trainer.batch_size", "32")


def measure(*, quick: bool, run: Path | None = None) -> Result:
    """Read the figures of a finished demo, or run it (about 8 minutes on 2 cores).

    Raises:
        UsageError: `run` holds no finished demo.
        UniclError: The demo failed.
    """
    if run is not None:
        return _read(run)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "unicl", "demo", "--out", folder]
        done = subprocess.run([*command, *(_QUICK if quick else ())], check=False)
        if done.returncode:
            raise UniclError(f"unicl demo failed with exit code {done.returncode}")
        return _read(Path(folder))


def _read(run: Path) -> Result:
    log = read_metrics(run / "unicl" / "metrics.jsonl")
    rows = [row for row in log if "zero_shot/top1" in row]
    report = run / "report.html"
    found = _MINUTES.search(report.read_text(encoding="utf-8")) if report.is_file() else None
    if not rows or found is None:
        raise UsageError(f"{run} holds no finished demo; run `unicl demo --out {run}` first")
    last = rows[-1]  # not the best: the images would have chosen it
    speeds = [row["train/samples_per_second"] for row in log if "train/samples_per_second" in row]
    figures = {key: value for key, value in last.items() if key.startswith("retrieval/")}
    return Result(
        bars=[
            Bar(
                "unicl demo, whole job after installation", float(found[1]), 8, "minutes", "at most"
            ),
            _accuracy("top-1", last["zero_shot/top1"], 70),
            _accuracy("top-5", last["zero_shot/top5"], 90),
        ],
        tables={"Retrieval": [{"figure": key, "share": figures[key]} for key in figures]}
        if figures
        else {},
        facts={
            "steps": last["step"],
            "median_samples_per_second": median(speeds) if speeds else None,
        },
    )


def _accuracy(name: str, share: float, percent: float) -> Bar:
    what = f"demo, zero-shot {name} on held-out images against all names"
    return Bar(what, 100 * share, percent, "%", "at least")
