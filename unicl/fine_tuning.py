"""Fine-tuning by the pretraining's own loss, on classes or captions (Florence 3.3 and 3.5).

Classes are texts like any other: their names, in prompt templates, go through the text tower, and
images of one class are positives of each other. Nothing is added to the model.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unicl.build import train
from unicl.config import PRETRAINING, Medium, Recipe, load_recipe, parse_recipe, recipe_to_toml
from unicl.data.image_sets import CaptionSet, ClassificationSet, open_image_set
from unicl.data.image_sets.source import SetSource
from unicl.data.prepare import is_finished, prepare
from unicl.data.progress import progress_bar
from unicl.data.shards import ShardSet
from unicl.distributed import find_launch, first_speaks, joined
from unicl.engine.checkpoint import checkpoints
from unicl.errors import UsageError
from unicl.evaluation import protocols
from unicl.evaluation.results import Result, save_result
from unicl.evaluator import Options, check, setting_of, warn_of_classes
from unicl.models import OPEN_CLIP, choose_device, full_name, load, read_recipe, recipe_of

logger = logging.getLogger("unicl")

_RECIPES = {"classes": ("finetune_classes", 10), "captions": ("finetune_captions", 12)}
"""Recipe and epochs by what a set has."""
_SECONDS_BETWEEN_LOOKS = 2.0
_SHORTEST = 20
"""Steps that a fine-tuning takes at least, however small the set."""


@first_speaks()  # a set is opened and prepared before the ranks join
def fine_tune(
    model: str | Path,
    data: str,
    options: Options,
    overrides: Mapping[str, str] | None = None,
    medium: Medium | None = None,
) -> Result:
    """Train a model on a set's `train` part, then evaluate it on `options.split`.

    `options.out` gets the training data as shards, the run, and in it the result. A fine-tuning
    that was interrupted goes on where it stopped.

    Args:
        model: what `unicl.models.load` takes.
        data: a set with a part `train`; with classes or with captions.
        options: where and how; `out` is needed.
        overrides: keys of the recipe, such as {"trainer.steps": "100"}.
        medium: what the set is of; unset are images. It trains on the set as it lies.

    Raises:
        UsageError: there is no such model, set or part, or `out` is missing or holds other data.
    """
    if options.out is None:
        raise UsageError("where shall the fine-tuned run go? name a folder with --out")
    check(options)
    out = options.out
    test = _open(data, options.split, options, medium)
    warn_of_classes(test, by_name=True)
    training = _open(data, "train", options, medium)
    overrides = {"trainer.device": options.device, **(overrides or {})}
    shards = out / "data"
    if medium is not None:  # trained on as it lies
        shards = (training.where or Path(data)).resolve()
    recipe = fine_tuning_recipe(model, training, shards, overrides, medium)
    if medium is None:
        _prepare_first(training, out)
    device = choose_device(recipe.trainer.device)
    require_same_steps(out / "run", recipe)
    with joined(
        device,
        timeout_seconds=recipe.engine.timeout_seconds,
        alone=recipe.engine.backend != "deepspeed",
    ) as ranks:
        run = train(recipe, out / "run")
        tuned = ranks.together(lambda: load(run.path, device=str(device)))
        setting = setting_of(options, ranks)
        if isinstance(test, CaptionSet):
            result = protocols.retrieval(tuned, test, setting)
            result = replace(result, task="retrieval_fine_tuned")
        elif tuned.classes:
            result, _ = protocols.recognition(tuned, test, setting)
        else:
            result, _ = protocols.zero_shot(tuned, test, setting, templates=options.ensemble)
            result = replace(result, task="fine_tune")
        from_ = {"from": str(model), "steps": recipe.trainer.steps}
        result = replace(result, protocol={**result.protocol, **from_})
        ranks.on_first(lambda: save_result(run.path / "evaluation", result))
    return result


def fine_tuning_recipe(
    model: str | Path,
    training: ClassificationSet | CaptionSet,
    data: Path,
    overrides: Mapping[str, str],
    medium: Medium | None = None,
) -> Recipe:
    """Return the paper's recipe with the model's towers, and as many steps as its epochs take.

    Where a set is smaller than the paper's batch, the batch is the set.

    Raises:
        UsageError: the model was trained on another medium.
    """
    if isinstance(training, CaptionSet):
        kind, num_samples = "captions", sum(len(texts) for texts in training.captions)
    else:
        kind, num_samples = "classes", training.num_samples
    name, epochs = (_RECIPES if medium is None else medium.fine_tuning)[kind]
    model = full_name(model)
    base, towers = load_recipe(name), recipe_of(model)
    if towers.task not in (PRETRAINING, base.task):
        wanted = "images" if medium is None else medium.name
        raise UsageError(f"{model} was trained on {towers.task}, not on {wanted}")
    if medium is not None:
        base = medium.follow(base, towers)
    drop_path_rate = towers.image_tower.drop_path_rate
    if towers.model is None:  # open_clip's have a rate of their own
        drop_path_rate = base.image_tower.drop_path_rate or drop_path_rate
    whole = replace(
        base,
        embed_dim=towers.embed_dim,
        model=towers.model,
        weights=None if model.startswith(OPEN_CLIP) else model,
        image_tower=replace(
            towers.image_tower, weights=None, locked=False, drop_path_rate=drop_path_rate
        ),
        text_tower=replace(towers.text_tower, locked=False),
        data=replace(base.data, train=str(data)),
        trainer=replace(
            base.trainer,
            batch_size=max(2, min(base.trainer.batch_size, num_samples)),
        ),
    )
    return with_steps(whole, overrides, num_samples=epochs * num_samples, least=_SHORTEST)


def with_steps(
    recipe: Recipe, overrides: Mapping[str, str], *, num_samples: int, least: int
) -> Recipe:
    """Return a recipe with overrides, and as many steps as see so many samples.

    Of these a third at most is warm-up. What the overrides say stands.

    Args:
        recipe: What is trained.
        overrides: Keys of it.
        num_samples: How many are seen, each as often as there are epochs.
        least: Steps that it takes at least.
    """
    text = recipe_to_toml(recipe)
    given = parse_recipe(text, overrides, source=recipe.name)
    steps = max(least, -(-num_samples // given.trainer.batch_size))
    steps = given.trainer.steps if "trainer.steps" in overrides else steps
    found = {
        "trainer.steps": str(steps),
        "schedule.warmup_steps": str(min(recipe.schedule.warmup_steps, steps // 3)),
    }
    return parse_recipe(text, {**found, **overrides}, source=recipe.name)


def _open(
    data: str, split: str, options: Options, medium: Medium | None
) -> ClassificationSet | CaptionSet:
    opened: ClassificationSet | CaptionSet
    if medium is not None:
        opened = medium.open_set(data, split=split, root=options.root, kind=None)
    else:
        opened = open_image_set(data, split=split, root=options.root, download=options.download)
    if isinstance(opened, ClassificationSet) and opened.targets.ndim == 2:
        raise UsageError(f"fine-tuning needs one class per image; {opened} has several")
    return opened


def require_same_steps(run: Path, recipe: Recipe) -> None:
    """Refuse to go on with other steps, rather than with the warmup that is derived from them."""
    if not checkpoints(run / "checkpoints"):
        return
    former = read_recipe(run)
    before, now = ((each.trainer.steps, each.trainer.batch_size) for each in (former, recipe))
    if before != now:
        raise UsageError(
            f"{run} was fine-tuned for {before[0]} steps of {before[1]} samples, not {now[0]} of "
            f"{now[1]}; choose another --out"
        )


def _prepare_first(training: ClassificationSet | CaptionSet, out: Path) -> None:
    """Write a part of a set into shards, unless they are there; other ranks wait until they are.

    They do so before they join, however long it takes: a rank that has joined is given up when it
    is not heard of for some minutes.
    """
    folder = out / "data"
    launch = find_launch()
    while launch is not None and launch.rank and not is_finished(folder):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if not is_finished(folder):
        _prepare(training, folder)
    if ShardSet.open(folder).info.get("fingerprint") != SetSource({"": training}).fingerprint:
        raise UsageError(
            f"{folder} holds other images, classes or captions than {training}; "
            "choose another --out"
        )


def _prepare(training: ClassificationSet | CaptionSet, folder: Path) -> None:
    with progress_bar("preparing") as progress:
        prepared = prepare(SetSource({"": training}), folder, progress=progress)
    logger.info("%s", prepared)
