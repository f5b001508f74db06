"""The whole job on the embedded corpus: prepare, train, evaluate, report."""

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from unicl.adapting import last
from unicl.build import HeldOut, build_held_out, train
from unicl.config import Demonstrated, Recipe, load_recipe, working_plugins
from unicl.data.prepare import is_finished, prepare
from unicl.data.progress import progress_bar
from unicl.data.shards import ShardSet
from unicl.data.twemoji import HELD_OUT_KINDS
from unicl.engine.metrics import read_metrics
from unicl.errors import UsageError
from unicl.evaluation.answers import SavedAnswers, SavedExample
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.metrics import wilson_interval
from unicl.evaluation.report import (
    Comparison,
    FoundImage,
    Report,
    Run,
    TextQuery,
    write_report,
)
from unicl.evaluation.results import Result
from unicl.evaluation.zero_shot import ZeroShotResult
from unicl.models import load_model
from unicl.towers.two_tower import TwoTower

logger = logging.getLogger("unicl")

_QUERIES = (
    "red heart",
    "a photo of a cat",
    "flag of japan",
    "a smiling face",
    "something to eat with cheese",
    "waving hand",
    "musical instrument",
    "an animal that lives in the sea",
)
_PICTURES = 12
_SHARE_OF_STEPS = 3
_ALL = "All held-out images"


def run_demo(
    folder: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    compare_clip: bool = False,
    adapt: bool = False,
) -> Path:
    """Prepare the Twemoji corpus, train on it, evaluate, and write the report.

    A demo that was interrupted goes on where it stopped.

    Args:
        folder: everything is written below it: data/, unicl/, clip/, adapted/, report.html.
        overrides: keys of the demo recipe, such as {"trainer.steps": "200"}.
        compare_clip: train once more with plain CLIP targets for comparison.
        adapt: adapt the towers by each plug-in that can show what they are worth to it, for a third
            of the demo's own steps from each start.

    Returns:
        The path of the report.
    """
    start = time.perf_counter()
    data = folder / "data"
    recipe = load_recipe("demo", {**_data_keys(data), **(overrides or {})})
    if not is_finished(data):
        logger.info("drawing the corpus into %s", data)
        with progress_bar("drawing") as progress:
            prepare("twemoji", data, samples_per_shard=2000, progress=progress)
    run = train(recipe, folder / "unicl")
    examiner = build_held_out(recipe)
    model, _ = load_model(run.path)
    ours, queries = _examine(model, run.path, recipe, examiner, "UniCL")
    runs = [ours]
    if compare_clip:
        clip = load_recipe(
            "demo", {**_data_keys(data), **(overrides or {}), "loss.targets": "clip"}
        )
        peer = train(clip, folder / "clip").path
        runs.append(_examine(load_model(peer)[0], peer, clip, examiner, "CLIP targets")[0])
    comparisons = _adapt(run.path, folder / "adapted", recipe) if adapt else []
    path = folder / "report.html"
    minutes = (time.perf_counter() - start) / 60
    facts = {**_sizes(model), "Whole job": f"{minutes:.1f} minutes", **_machine()}
    report = replace(_report(recipe, runs, queries, facts), comparisons=comparisons)
    write_report(path, report)
    _print_summary(runs)
    if comparisons:
        _print_comparisons(comparisons)
    logger.info("%.1f minutes; open %s in a browser", minutes, path)
    return path


def _adapt(towers: Path, folder: Path, recipe: Recipe) -> list[Comparison]:
    """Adapt the towers by one plug-in after the other; one that lacks a library is left out."""
    found = []
    steps = max(1, recipe.trainer.steps // _SHARE_OF_STEPS)
    for plugin in working_plugins():
        if not isinstance(plugin, Demonstrated):
            continue
        logger.info("adapting the towers to %s, and random ones", plugin.name)
        try:
            found.append(plugin.demonstrate(towers, folder / plugin.name, steps=steps))
        except UsageError as error:
            logger.warning("left out: %s: %s", plugin.name, error)
    return found


def _print_comparisons(comparisons: Sequence[Comparison]) -> None:
    table = Table(title="The same adapters on these towers, and on random ones")
    table.title_justify = "left"
    table.add_column("")
    table.add_column("measured by")
    for start in comparisons[0].curves:
        table.add_column(start, justify="right")
    for each in comparisons:
        shares = [f"{last(rows, each.metric):.1%}" for rows in each.curves.values()]
        table.add_row(each.title, each.called, *shares)
    Console(stderr=True).print(table)


def _data_keys(data: Path) -> dict[str, str]:
    train_folder = str(data / "train")
    return {
        "data.train": train_folder,
        "evaluation.data": str(data / "held_out"),
        "evaluation.names": train_folder,
    }


def _examine(
    model: TwoTower, path: Path, recipe: Recipe, examiner: HeldOut, name: str
) -> tuple[Run, list[TextQuery]]:
    """Evaluate a run's model and choose the pictures for the report."""
    embedded = embed_images(model, examiner.loader)
    named = examiner.zero_shot.predict(model, embedded)
    kinds = {
        words: named.where(partial(_has_prefix, prefix=prefix))
        for prefix, words in HELD_OUT_KINDS.items()
    }
    recalls = examiner.retrieval(model, embedded)
    images = _images_by_key(Path(recipe.evaluation.data or ""))
    result = partial(Result, model=name, protocol={"image_size": recipe.image_tower.image_size})
    run = Run(
        name=name,
        results=[
            *(_zero_shot(result, words, each) for words, each in {_ALL: named, **kinds}.items()),
            result(
                task="retrieval",
                dataset=_ALL,
                metrics={key.removeprefix("retrieval/"): value for key, value in recalls.items()},
                headline="t2i_r1",
                num_images=len(named.keys),
            ),
        ],
        answers={_ALL: SavedAnswers((), None, _examples(named, images))},
        metrics=read_metrics(path / "metrics.jsonl"),
        settings=asdict(recipe),
    )
    hits = examiner.retrieval.search(model, _QUERIES, 5, embedded)
    queries = [
        TextQuery(
            text=query,
            images=[FoundImage(image=images[h.key], text=h.text, right=h.right) for h in row],
        )
        for query, row in zip(_QUERIES, hits, strict=True)
    ]
    return run, queries


def _has_prefix(key: str, *, prefix: str) -> bool:
    return key.startswith(prefix)


def _zero_shot(result: "partial[Result]", dataset: str, named: ZeroShotResult) -> Result:
    shown = result(
        task="zero_shot",
        dataset=dataset,
        metrics={"top1": named.top(1), "top5": named.top(5)},
        headline="top1",
        interval=wilson_interval(named.top(1), len(named.keys)),
        num_images=len(named.keys),
    )
    return replace(shown, protocol={**shown.protocol, "num_classes": named.num_classes})


def _examples(named: ZeroShotResult, images: Mapping[str, bytes]) -> tuple[SavedExample, ...]:
    """Choose images spread evenly over the set, so that nobody picks the pretty ones."""
    return tuple(
        SavedExample(
            image=images[named.keys[row]],
            truth=named.truths[row],
            guesses=tuple(zip(named.guesses[row], named.probabilities[row].tolist(), strict=True)),
            right=right,
        )
        for right in (True, False)
        for row in named.rows(right=right, count=_PICTURES)
    )


def _images_by_key(folder: Path) -> dict[str, bytes]:
    shards = ShardSet.open(folder)
    samples = (shards.read(index) for index in range(shards.num_samples))
    return {sample.key: sample.image for sample in samples}


def _report(
    recipe: Recipe, runs: Sequence[Run], queries: Sequence[TextQuery], facts: Mapping[str, str]
) -> Report:
    info = ShardSet.open(Path(recipe.data.train)).info
    samples = recipe.trainer.steps * recipe.trainer.batch_size
    return Report(
        title="Florence-style pretraining on Twemoji",
        summary=(
            f"A {recipe.image_tower.model} image tower and a {recipe.text_tower.num_layers}-layer "
            f"text tower, trained from nothing on {samples:,} image-text pairs with the UniCL "
            "loss. The images below are held out: unseen compositions of known emoji, and skin "
            "tones the model has never met."
        ),
        runs=runs,
        queries=queries,
        facts=facts,
        credits=[str(info["credit"])],
    )


def _sizes(model: TwoTower) -> dict[str, str]:
    towers = {"Image tower": model.image, "Text tower": model.text}
    counts = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    return {name: f"{count / 1e6:.2f}M parameters" for name, count in counts.items()}


def _machine() -> dict[str, str]:
    return {
        "Machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    }


def _print_summary(runs: Sequence[Run]) -> None:
    table = Table(title="Held-out images against all names", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("images", justify="right")
    for run in runs:
        table.add_column(f"{run.name} top-1", justify="right")
        table.add_column("top-5", justify="right")
    for first in runs[0].results:
        results = [run.result("zero_shot", first.dataset) for run in runs]
        if first.task == "zero_shot":
            figures = [r.metrics[metric] for r in results if r for metric in ("top1", "top5")]
            cells = [f"{value:.1%}" for value in figures]
            table.add_row(first.dataset, f"{first.num_images:,}", *cells)
    Console(stderr=True).print(table)
