"""One table per task: what the runs reached, beside what the papers report."""

from collections.abc import Iterable, Sequence
from html import escape

from unicl.evaluation.page import Cell, Column, figure, percent, table
from unicl.evaluation.published import Published, is_rank, published
from unicl.evaluation.report.contents import Report, Run
from unicl.evaluation.report.measurement import measurement
from unicl.evaluation.results import QUESTION_TYPE, Result

_TASKS = {
    "zero_shot": (
        "Naming images",
        "Zero-shot classification: each image is compared with every name, and the nearest name is "
        "the guess.",
    ),
    "fine_tune": (
        "Naming images after fine-tuning",
        "Each image is compared with every name, and the nearest name is the guess, after the "
        "model was trained on the set's own training images.",
    ),
    "linear_probe": (
        "Linear probe",
        "The model stays as it is; a logistic regression on its image features tells the classes.",
    ),
    "few_shot": (
        "Learning from a few images",
        "Five classes are learned from a few images each, again and again with others; shown is "
        "how often the remaining images are told right.",
    ),
    "retrieval": (
        "Searching",
        "Recall at k: how often a right answer is among the first k that a search over all images, "
        "or all their texts, brings up. Rank: the place of the first right answer; 1 is best.",
    ),
    "retrieval_fine_tuned": (
        "Searching after fine-tuning",
        "Recall at k and ranks, after the model was trained on the set's own training images.",
    ),
    "detection": (
        "Finding objects",
        "Average precision of the boxes: the mean over overlaps from 0.5 to 0.95, and at 0.5.",
    ),
    "detection_zero_shot": (
        "Finding objects by name",
        "Average precision of the boxes, on a set that the model was not trained on: its classes "
        "are known by their names alone.",
    ),
    "detection_few_shot": (
        "Finding objects after a few examples",
        "Average precision of the boxes, after the model was trained on a few images per class.",
    ),
    "detection_fine_tune": (
        "Finding objects after fine-tuning",
        "Average precision of the boxes, after the model was trained on the set's own images.",
    ),
    "vqa": (
        "Answering questions",
        "VQA's accuracy: an answer counts fully that at least three people gave; of all questions, "
        "and by the type of answer and of question.",
    ),
    "captioning": (
        "Saying what is there",
        "CIDEr and BLEU of the captions beside what people wrote; 100% of CIDEr is no limit.",
    ),
    "retrieval_reranked": (
        "Searching, and looking again",
        "As in searching, where the best that the two towers bring up are looked at again together "
        "with the text, by co-attention.",
    ),
}
_METRICS = {
    "top1": "first guess right",
    "top5": "in first five",
    "mean_per_class": "first guess right, class mean",
    "map": "mean average precision",
    "map11": "11-point mean average precision",
    "ap": "average precision",
    "ap50": "at overlap 0.5",
    "ar10": "objects found in first 10",
    "ar100": "objects found in first 100",
    "accuracy": "VQA's accuracy",
    "cider": "CIDEr",
    **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)},
}
_SEARCHES = {"i2t": "image to text", "t2i": "text to image"}


def tables(report: Report) -> str:
    """Return the sections of all tasks that a run has results of."""
    found = dict.fromkeys(result.task for run in report.runs for result in run.results)
    tasks = [*(task for task in _TASKS if task in found), *(t for t in found if t not in _TASKS)]
    return "\n".join(_section(task, report.runs) for task in tasks)


def _section(task: str, runs: Sequence[Run]) -> str:
    heading, words = _TASKS.get(task, (task, ""))
    results = [[r for r in run.results if r.task == task] for run in runs]
    peers = _peers(result for each in results for result in each)
    rows = [row for name in _result_names(results) for row in _rows(task, name, runs, peers)]
    has_chance = any(row[2] for row in rows)
    columns = [
        Column("Set", words=True),
        Column("Metric", words=True),
        *([Column("Chance")] if has_chance else []),
        *(Column(run.name, run=number) for number, run in enumerate(runs)),
        *(Column(peer.model, aside="published") for peer in peers),
    ]
    if not has_chance:
        rows = [[*row[:2], *row[3:]] for row in rows]
    intervals = any(r.interval for each in results for r in each)
    return (
        f'<h2>{escape(heading)}</h2>\n<p class="soft">{escape(words)}'
        f"{' A range below a figure is its 95% confidence interval.' if intervals else ''}</p>\n"
        f"{table(columns, rows)}\n{measurement(runs, results, peers)}"
    )


def _peers(results: Iterable[Result]) -> list[Published]:
    """Return the papers' models that have figures for one of these results."""
    found = (peer for result in results for peer in published(result.task, result.dataset))
    return list({peer.model: peer for peer in found}.values())


def _result_names(results: Sequence[Sequence[Result]]) -> list[str]:
    return list(dict.fromkeys(result.name for each in results for result in each))


def _rows(
    task: str, name: str, runs: Sequence[Run], peers: Sequence[Published]
) -> list[list[Cell]]:
    """Return a row per metric; the set is named in its first."""
    results = [run.result(task, name) for run in runs]
    there = [result for result in results if result is not None]
    metrics = dict.fromkeys(metric for result in there for metric in result.shown)
    return [
        [
            _set(name, there) if number == 0 else "",
            _metric(metric),
            _chance(there, metric),
            *(_figure(result, metric) for result in results),
            *(_published(peer, there[0].dataset, metric) for peer in peers),
        ]
        for number, metric in enumerate(metrics)
    ]


def _set(name: str, results: Sequence[Result]) -> Cell:
    images = f"{_either(result.num_images for result in results)} {results[0].noun}"
    names = _either(n for r in results if isinstance(n := r.protocol.get("num_classes"), int))
    left_out = _either(number for r in results if (number := sum(r.skipped.values())))
    return name, (
        f"{images}{f', {names} names' if names else ''}"
        f"{f'; {left_out} left out' if left_out else ''}"
    )


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(dict.fromkeys(f"{number:,}" for number in numbers))


def _metric(metric: str) -> str:
    side, _, what = metric.partition("_")
    if side in _SEARCHES:
        return f"{_SEARCHES[side]}, {what.replace('_', ' ') if is_rank(what) else f'R@{what[1:]}'}"
    if metric.endswith("_shot"):
        return f"{metric.removesuffix('_shot')} images per class"
    if side == "towers":
        return f"{_metric(what)}, by the towers alone"
    if metric.startswith(QUESTION_TYPE):
        return f"questions: {metric.removeprefix(QUESTION_TYPE)}"
    if metric.startswith("accuracy/"):
        return f"answers: {metric.removeprefix('accuracy/')}"
    return _METRICS.get(metric, metric)


def _chance(results: Sequence[Result], metric: str) -> str:
    chances = dict.fromkeys(result.chance(metric) for result in results)
    return " or ".join(percent(chance) for chance in chances if chance is not None)


def _figure(result: Result | None, metric: str) -> Cell:
    if result is None or metric not in result.metrics:
        return "-"
    interval = result.interval_of(metric)
    if interval is None:
        return figure(metric, result.metrics[metric])
    low, high = (figure(metric, end) for end in interval)
    return figure(metric, result.metrics[metric]), f"{low} to {high}"


def _published(peer: Published, dataset: str, metric: str) -> str:
    printed = peer.figures.get(dataset, {}).get(metric)
    return "-" if printed is None else f"{printed}{'' if is_rank(metric) else '%'}"
