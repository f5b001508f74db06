"""`unicl report`: runs by their folders, on one page beside the papers' figures."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unicl.data.atomic import atomic_file, require_parent
from unicl.engine.metrics import parse_rows
from unicl.errors import UniclError, UsageError
from unicl.evaluation.answers import SavedAnswers, load_answers
from unicl.evaluation.report import Report, Run, write_report
from unicl.evaluation.results import Result, read_result, result_files, to_csv
from unicl.evaluator import results_folder
from unicl.models import OPEN_CLIP, read_recipe

logger = logging.getLogger("unicl")

_RECIPE, _METRICS = "recipe.toml", "metrics.jsonl"
# What many folders are called, so that it tells no run from another.
_SAYS_NOTHING = re.compile(r"runs?|results?|step-\d+")


def report(runs: Sequence[str | Path], out: Path, *, csv: Path | None = None) -> None:
    """Write one page of a run, or comparing several, and perhaps a table of all results.

    Damaged files are left out; a warning names each, and so does the page.

    Args:
        runs: folders of runs, folders with results of `unicl eval` in them or in `evaluation`
            below them, or names of open_clip's models that were evaluated from here.
        out: the page.
        csv: a table in the columns of `clip_benchmark build`.

    Raises:
        UsageError: a run has neither metrics nor results, is named twice, or the folder of a file
            is not there.
        UniclError: all files are damaged, one cannot be written, or matplotlib is missing.
    """
    for path in filter(None, (out, csv)):
        require_parent(path)
    places = [_find(run) for run in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UsageError(f"{runs[number]} is named twice")
    left_out: list[str] = []
    read = [
        _read(place, name, left_out) for place, name in zip(places, _names(places), strict=True)
    ]
    if left_out and not any(run.results or run.metrics for run in read):
        raise UniclError(left_out[0])
    for message in left_out:
        logger.warning("left out of the report: %s", message)
    write_report(out, _report(read, left_out))
    if csv is not None:
        with atomic_file(csv) as file:
            file.write(to_csv(result for run in read for result in run.results).encode())


@dataclass(frozen=True)
class _Place:
    """Where the files of a run lie."""

    name: tuple[str, ...]
    """What it may be called: its folders from the outermost to the innermost."""
    run: Path | None
    """Folder of the recipe and the metrics, if there is one."""
    results: Path
    """Folder of the results; perhaps there are none."""


def _find(run: str | Path) -> _Place:
    """Look for a run's files in its folder, below it, or beside its results.

    Raises:
        UsageError: there are no such files.
    """
    path, results = Path(run), results_folder(run)
    if not path.is_dir() and not (str(run).startswith(OPEN_CLIP) and results.is_dir()):
        problem = "is no folder" if path.exists() else "is not there"
        raise UsageError(f"{run} {problem}; name a run, or a folder of `unicl eval`'s results")
    place = _place(path.resolve(), results) if path.is_dir() else _Place((str(run),), None, results)
    has_metrics = place.run is not None and (place.run / _METRICS).is_file()
    if not has_metrics and not result_files(place.results):
        raise UsageError(
            f"{run} has neither metrics of a run nor results of `unicl eval`: train or evaluate it"
        )
    return place


def _place(path: Path, results: Path) -> _Place:
    above = path.parent
    if _is_run(path):
        return _Place(path.parts, path, results)
    if above.name == "checkpoints" and _is_run(above.parent):
        return _Place((*above.parent.parts, path.name), above.parent, results)
    if result_files(results):
        return _Place(path.parts, None, results)
    run = above if path.name.startswith("evaluation") and _is_run(above) else None
    return _Place(above.parts if path.name == "evaluation" else path.parts, run, path)


def _is_run(folder: Path) -> bool:
    return (folder / _RECIPE).is_file() or (folder / _METRICS).is_file()


def _names(places: Sequence[_Place]) -> list[str]:
    """Call each by as many of its last folders as it takes to tell all apart, and to say a name."""
    longest = max(len(place.name) for place in places)
    for length in range(1, longest + 1):
        names = [_last(place.name, length) for place in places]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(place.name)} {number}" for number, place in enumerate(places, start=1)]


def _last(folders: Sequence[str], length: int) -> str:
    while length < len(folders) and _SAYS_NOTHING.fullmatch(folders[-length]):
        length += 1
    return "/".join(folders[-length:])


def _read(place: _Place, name: str, left_out: list[str]) -> Run:
    """Read what is sound of a run, and add what is not to the messages."""
    results: list[Result] = []
    answers: dict[str, SavedAnswers] = {}
    settings: dict[str, Any] = {}
    for path in result_files(place.results):
        with _leaving_out(left_out):
            result = read_result(path)
            results.append(result)
            if (saved := load_answers(path.with_suffix(""))) is not None:
                answers[result.name] = saved
    folder = place.run
    if folder is not None and (folder / _RECIPE).is_file():
        with _leaving_out(left_out):
            settings = asdict(read_recipe(folder))
    return Run(
        name=name,
        results=results,
        answers=answers,
        metrics=_metrics(folder / _METRICS, left_out) if folder else (),
        settings=settings,
    )


@contextmanager
def _leaving_out(messages: list[str]) -> Iterator[None]:
    """Note that a file is damaged, and go on."""
    try:
        yield
    except UniclError as error:
        messages.append(str(error))


def _metrics(path: Path, left_out: list[str]) -> list[dict[str, Any]]:
    # Once, for a run may be writing it.
    text = path.read_text(errors="replace") if path.is_file() else ""
    rows = parse_rows(text)
    # A row ends its line, but for a last one that a kill has torn.
    written = text.count("\n")
    if len(rows) < written:
        left_out.append(f"{path} is damaged: {written - len(rows)} of its {written} rows are lost")
    return rows


def _report(runs: Sequence[Run], left_out: Sequence[str]) -> Report:
    names = [run.name for run in runs]
    *most, last = names
    facts = {}
    for run in runs:
        models = ", ".join(dict.fromkeys(result.model for result in run.results))
        if models:
            facts[f"Model, {run.name}"] = models
        steps = max((row.get("step", 0) for row in run.metrics), default=0)
        if steps:
            facts[f"Trained, {run.name}"] = f"{steps:,} steps"
    return Report(
        title=f"{', '.join(most)} and {last} compared" if most else f"Report of {last}",
        runs=runs,
        facts=facts,
        left_out=left_out,
    )
