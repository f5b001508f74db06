"""One pair of towers, several adaptations: each beside the same adapter on random towers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unicl.build import train
from unicl.config import Recipe, parse_recipe
from unicl.engine.metrics import read_metrics
from unicl.evaluation.curves import Rows
from unicl.models import recipe_of_run, with_towers_of

PRETRAINED, RANDOM = "pretrained towers", "random towers"
"""What the two starts are called."""
_FOLDERS = {PRETRAINED: "pretrained", RANDOM: "random"}

_KEYS = {
    "data.templates": "none",
    "data.crop_scale": "1,1",
    "data.num_workers": "0",
    "trainer.log_every": "50",
}
_EVALUATIONS = 4


def train_both(
    keys: Mapping[str, str],
    towers: Path,
    folder: Path,
    *,
    steps: int,
    starts: Mapping[str, Path] | None = None,
) -> dict[str, Path]:
    """Train one recipe twice: on a run's towers, and on towers of the same sizes from nothing.

    Args:
        keys: Of the recipe, as the command line takes them.
        towers: The run.
        folder: Gets the two runs; one that is finished is not trained again.
        steps: Of each; the adapter is measured four times on the way.
        starts: What each goes on from, where something was trained before.

    Returns:
        The folders of the runs, by `PRETRAINED` and `RANDOM`.
    """
    own = {
        **_KEYS,
        "trainer.steps": str(steps),
        "trainer.eval_every": str(-(-steps // _EVALUATIONS)),
        "schedule.warmup_steps": str(min(50, steps // 4)),
    }
    recipe: Recipe = with_towers_of(parse_recipe("", {**own, **keys}), recipe_of_run(towers))
    weights = {PRETRAINED: towers, RANDOM: None, **(starts or {})}
    return {
        start: train(
            replace(recipe, weights=None if path is None else str(path)), folder / _FOLDERS[start]
        ).path
        for start, path in weights.items()
    }


def curves(runs: Mapping[str, Path]) -> dict[str, Rows]:
    """Return the rows of the runs' metrics."""
    return {start: read_metrics(run / "metrics.jsonl") for start, run in runs.items()}


def last(rows: Rows, metric: str) -> float:
    """Return the last value of a metric."""
    return [row[metric] for row in rows if metric in row][-1]
