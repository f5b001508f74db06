"""The whole job on the embedded corpus: prepare, train, evaluate, report."""

import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from unicl.build import HeldOut, build_held_out, train
from unicl.config import Recipe, load_recipe
from unicl.data.prepare import is_finished, prepare, progress_bar
from unicl.data.shards import ShardSet
from unicl.data.twemoji import HELD_OUT_KINDS
from unicl.engine.metrics import read_metrics
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.report import (
    FoundImage,
    Outcome,
    Prediction,
    Report,
    Split,
    TextQuery,
    write_report,
)
from unicl.evaluation.zero_shot import ZeroShotResult
from unicl.models import load_model, read_recipe
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


def run_demo(
    folder: Path, *, overrides: Mapping[str, str] | None = None, compare_clip: bool = False
) -> Path:
    """Prepare the Twemoji corpus, train on it, evaluate, and write the report.

    A demo that was interrupted goes on where it stopped.

    Args:
        folder: everything is written below it: data/, unicl/, clip/, report.html.
        overrides: keys of the demo recipe, such as {"trainer.steps": "200"}.
        compare_clip: train once more with plain CLIP targets for comparison.

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
    outcome, pictures = _examine(model, run.path, examiner, "UniCL")
    comparison = None
    if compare_clip:
        clip = load_recipe(
            "demo", {**_data_keys(data), **(overrides or {}), "loss.targets": "clip"}
        )
        peer = train(clip, folder / "clip").path
        comparison, _ = _examine(load_model(peer)[0], peer, examiner, "CLIP targets")
    path = folder / "report.html"
    minutes = (time.perf_counter() - start) / 60
    facts = {**_sizes(model), "Whole job": f"{minutes:.1f} minutes", **_machine()}
    write_report(path, _report(recipe, outcome, comparison, pictures, facts))
    _print_summary(outcome, comparison)
    logger.info("%.1f minutes; open %s in a browser", minutes, path)
    return path


def _data_keys(data: Path) -> dict[str, str]:
    train_folder = str(data / "train")
    return {
        "data.train": train_folder,
        "evaluation.data": str(data / "held_out"),
        "evaluation.names": train_folder,
    }


@dataclass(frozen=True)
class _Pictures:
    right: list[Prediction]
    wrong: list[Prediction]
    queries: list[TextQuery]


def _examine(model: TwoTower, run: Path, examiner: HeldOut, name: str) -> tuple[Outcome, _Pictures]:
    """Evaluate a run's model and choose the pictures for the report."""
    embedded = embed_images(model, examiner.loader)
    result = examiner.zero_shot.predict(model, embedded)
    splits = [_split("All held-out images", result)]
    splits += [
        _split(words, result.where(partial(_has_prefix, prefix=prefix)))
        for prefix, words in HELD_OUT_KINDS.items()
    ]
    outcome = Outcome(
        name=name,
        metrics=read_metrics(run / "metrics.jsonl"),
        splits=splits,
        retrieval=examiner.retrieval(model, embedded),
    )
    images = _images_by_key(Path(read_recipe(run).evaluation.data or ""))
    hits = examiner.retrieval.search(model, _QUERIES, 5, embedded)
    queries = [
        TextQuery(
            text=query,
            images=[FoundImage(image=images[h.key], text=h.text, right=h.right) for h in row],
        )
        for query, row in zip(_QUERIES, hits, strict=True)
    ]
    return outcome, _Pictures(
        right=_predictions(result, images, right=True),
        wrong=_predictions(result, images, right=False),
        queries=queries,
    )


def _has_prefix(key: str, *, prefix: str) -> bool:
    return key.startswith(prefix)


def _split(name: str, result: ZeroShotResult) -> Split:
    return Split(
        name=name,
        top1=result.top(1),
        top5=result.top(5),
        num_images=len(result.keys),
        num_classes=result.num_classes,
    )


def _predictions(
    result: ZeroShotResult, images: Mapping[str, bytes], *, right: bool
) -> list[Prediction]:
    """Choose predictions spread evenly over the set, so that nobody picks the pretty ones."""
    return [
        Prediction(
            image=images[result.keys[row]],
            truth=result.truths[row],
            guesses=list(zip(result.guesses[row], result.probabilities[row].tolist(), strict=True)),
        )
        for row in result.rows(right=right, count=_PICTURES)
    ]


def _images_by_key(folder: Path) -> dict[str, bytes]:
    shards = ShardSet.open(folder)
    samples = (shards.read(index) for index in range(shards.num_samples))
    return {sample.key: sample.image for sample in samples}


def _report(
    recipe: Recipe,
    outcome: Outcome,
    comparison: Outcome | None,
    pictures: _Pictures,
    facts: Mapping[str, str],
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
        run=outcome,
        comparison=comparison,
        right=pictures.right,
        wrong=pictures.wrong,
        queries=pictures.queries,
        facts=facts,
        settings=asdict(recipe),
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


def _print_summary(outcome: Outcome, comparison: Outcome | None) -> None:
    outcomes = [outcome, *([comparison] if comparison else [])]
    table = Table(title="Held-out images against all names", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("images", justify="right")
    for each in outcomes:
        table.add_column(f"{each.name} top-1", justify="right")
        table.add_column("top-5", justify="right")
    for row, split in enumerate(outcome.splits):
        figures = [each.splits[row] for each in outcomes]
        cells = [f"{value:.1%}" for s in figures for value in (s.top1, s.top5)]
        table.add_row(split.name, f"{split.num_images:,}", *cells)
    Console(stderr=True).print(table)
