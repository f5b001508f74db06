"""How long does `unicl --help` take?"""

import subprocess
import sys

from benchmarks.harness import compare
from benchmarks.record import Bar, Result


def measure(*, quick: bool) -> Result:
    """A fresh process each time; beside it an interpreter that does nothing."""
    sides = {
        "unicl --help": lambda: _process("-m", "unicl", "--help"),
        "python -c pass": lambda: _process("-c", "pass"),
    }
    timings = compare(sides, repeats=3 if quick else 15)
    own = timings["unicl --help"]
    return Result(
        bars=[Bar("unicl --help", own.median, 0.5, "s", "at most", (min(own.wall), max(own.wall)))],
        tables={
            "Seconds of a process": [
                {"command": name, "median": t.median, "low": min(t.wall), "high": max(t.wall)}
                for name, t in timings.items()
            ]
        },
    )


def _process(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
