"""`python -m benchmarks`: lists the benchmarks, runs one or all, writes the README's table."""

import argparse
import ast
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import NAMES
from benchmarks.harness import ROOT, OtherLoad, Skipped
from benchmarks.record import RESULTS, Result, save, show
from benchmarks.table import write_table
from unicl.errors import UniclError, UsageError

# Only when asked for: what takes many minutes, or a machine of its own.
_NOT_IN_ALL = (
    *("coswin3d", "inflation", "zero_shot", "linear_probe", "retrieval", "search"),
    *("dynamic_head", "detection", "co_attention", "question_answering", "demo", "gpu"),
)
_TAKE_RUNS = ("demo", "question_answering")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"all, table, or one of {', '.join(NAMES)}")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes; shows the figures, keeps none"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON (default: with the code)")
    parser.add_argument(
        "--run",
        type=Path,
        help="demo: the folder of a finished `unicl demo`; question_answering: where its runs are "
        "kept, to go on with them after an interruption",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.name is None:
            _list()
        elif arguments.name == "table":
            write_table(ROOT / "benchmarks" / "README.md", RESULTS)
        else:
            _run(arguments)
    except UniclError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.name not in (*NAMES, "all"):
        raise UsageError(f"no benchmark {arguments.name!r}; there are {', '.join(NAMES)}")
    if arguments.run is not None and arguments.name not in _TAKE_RUNS:
        raise UsageError(f"--run belongs to {' and '.join(_TAKE_RUNS)}")
    names = [name for name in NAMES if name not in _NOT_IN_ALL]
    for name in names if arguments.name == "all" else [arguments.name]:
        try:
            _run_one(name, arguments)
        except Skipped as reason:
            print(f"{name}: skipped: {reason}")


def _run_one(name: str, arguments: argparse.Namespace) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    options = {"run": arguments.run} if arguments.run is not None else {}
    folder = arguments.out or (None if arguments.quick else RESULTS)
    start, other_load = time.perf_counter(), OtherLoad()
    found = module.measure(quick=arguments.quick, **options)
    # A long benchmark gives what it has after each part: what cuts it short costs the rest only.
    for result in [found] if isinstance(found, Result) else found:
        if folder is not None:
            kept = {"quick": arguments.quick, "folder": folder, "other_load": other_load.share()}
            save(name, question(name), result, **kept)
    show(question(name), result)
    seconds, share = time.perf_counter() - start, other_load.share()
    print(f"{name}: {seconds:.0f} s; others kept {share:.0%} of the machine busy")


def question(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing what it imports."""
    source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def _list() -> None:
    table = Table(box=None)
    table.add_column("name")
    table.add_column("question")
    for name in NAMES:
        table.add_row(name, question(name) + (" (not in all)" if name in _NOT_IN_ALL else ""))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
