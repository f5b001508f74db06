"""A detector on a set of one's own: of a few examples per class, or of all (Florence 3.6)."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from adapters.detection.config import DetectionRecipe
from adapters.detection.evaluating import measure, save
from adapters.detection.measuring import category_ids
from adapters.detection.sets import KNOWN_SETS, DetectionSet, open_detection_set
from unicl.build import train
from unicl.config import PRETRAINING, load_recipe
from unicl.data.atomic import atomic_file
from unicl.distributed import Ranks, first_speaks, joined
from unicl.errors import UniclError, UsageError
from unicl.evaluation.page import figure
from unicl.evaluation.published import Task
from unicl.evaluation.results import Result, save_result
from unicl.evaluator import Options, check, require_writable
from unicl.fine_tuning import require_same_steps, with_steps
from unicl.models import choose_device, full_name, load, recipe_of
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

_RECIPE = "detection_fine_tune"
_TASKS: dict[str, Task] = {"few-shot": "detection_few_shot", "fine-tune": "detection_fine_tune"}
# Of ODinW's few-shot protocol (Li et al. 2022), and twice the usual dozen.
_EPOCHS = {"few-shot": 200, "fine-tune": 24}
_SHORTEST = 200
"""Steps that a training takes at least, however small the set."""


@dataclass(frozen=True)
class _Part:
    """What one run is trained on."""

    images: DetectionSet
    where: Path
    """What the recipe names."""
    run: Path
    chosen: bool
    """Whether `where` has still to be written."""


@first_speaks()  # sets are opened before the ranks join
def fine_tune(
    evaluation: str,
    model: str | Path,
    data: str,
    options: Options,
    overrides: Mapping[str, str] | None = None,
) -> Result:
    """Train a detector on a set's `train` part, then measure it on `options.split`.

    What was interrupted goes on where it stopped.

    Args:
        evaluation: fine-tune: `options.out` gets run/, and in it the result; few-shot: for each
            number of shots train_5_shot.json, the images chosen, and run_5_shot/ with its result,
            and all of them evaluation/ with the result of all.
        model: a detector's run, of which all but the names of its classes is kept; or two towers.
        data: a set with a part `train`.
        options: where and how; `out` is needed. `shots` and `seed` decide the images of few-shot;
            of those that ODinW's publishers chose, which lie beside the annotations as
            fewshot_train_shot5_seed3.json, the one of that seed, and with seed 0 the first.
        overrides: keys of the recipe, such as {"trainer.steps": "100"}.

    Raises:
        UsageError: there is no such model, set or part, or `out` is missing or holds other data.
        UniclError: what stopped the run, in one line.
    """
    out = options.out
    if out is None:
        raise UsageError("where shall the trained detector go? name a folder with --out")
    check(options)
    test = open_detection_set(data, split=options.split, root=options.root)
    training = open_detection_set(data, split="train", root=options.root)
    if training.split != "train":
        raise UsageError(f"{data} has no train part to learn from; name the folder of all parts")
    overrides = {"trainer.device": options.device, **(overrides or {})}
    work = []
    for shots, part in _parts(evaluation, data, training, options, out):
        num_images, epochs = part.images.num_images, _EPOCHS[evaluation]
        recipe = fine_tuning_recipe(model, num_images, part.where, overrides, epochs)
        _require_classes(recipe, part.images, test)
        require_same_steps(part.run, recipe)
        work.append((shots, part, recipe))
    results = []
    with joined(
        choose_device(recipe.trainer.device),
        timeout_seconds=recipe.engine.timeout_seconds,
        alone=recipe.engine.backend != "deepspeed",
    ) as ranks:
        for shots, part, recipe in work:
            tuned = _train(recipe, part, ranks)
            result, found = measure(_TASKS[evaluation], tuned, test, options, ranks)
            result = _described(result, model, recipe, part, shots, options.seed)
            kept = partial(save, part.run / "evaluation", result, found, test)
            ranks.on_first(kept)
            value = figure(result.headline, result.metrics[result.headline])
            logger.info("%s: %s %s", result.name, result.headline, value)
            results.append(result)
        if evaluation == "fine-tune":
            return results[0]
        joint = _joined(results)
        ranks.on_first(lambda: _save_joint(out, joint))
    return joint


def fine_tuning_recipe(
    model: str | Path, num_images: int, data: Path, overrides: Mapping[str, str], epochs: int
) -> DetectionRecipe:
    """Return the recipe with the model's towers, and its head and sizes if it is a detector.

    It takes as many steps as its epochs do. Where a set is smaller than the batch, the batch is the
    set.

    Args:
        model: what to start from.
        num_images: how many are trained on.
        data: where they are.
        overrides: keys of the recipe.
        epochs: how often each image is seen, unless that are too few steps.

    Raises:
        UsageError: the model was trained on something else, or has no maps of several sizes.
    """
    model = full_name(model)
    base, start = load_recipe(_RECIPE), recipe_of(model)
    assert isinstance(base, DetectionRecipe)
    if start.task not in (PRETRAINING, base.task):
        raise UsageError(f"{model} was trained on {start.task}, not on images or detection")
    detection = base.detection
    if isinstance(start, DetectionRecipe):
        own: Any = {"class_names": (), "category_ids": (), "sets": ()}
        classes = start.detection.classes
        # Objects of whatever class are found already; what is to be learned are the classes.
        own["classes"] = detection.classes if classes == "none" else classes
        detection = replace(start.detection, **own)
    whole = replace(
        base,
        embed_dim=start.embed_dim,
        model=start.model,
        weights=model,
        image_tower=replace(
            start.image_tower,
            weights=None,
            locked=False,
            drop_path_rate=base.image_tower.drop_path_rate or start.image_tower.drop_path_rate,
        ),
        text_tower=replace(start.text_tower, locked=False),
        detection=detection,
        data=replace(base.data, train=str(data)),
        trainer=replace(base.trainer, batch_size=min(base.trainer.batch_size, num_images)),
    )
    recipe = with_steps(whole, overrides, num_samples=epochs * num_images, least=_SHORTEST)
    assert isinstance(recipe, DetectionRecipe)
    return recipe


def choose_shots(images: DetectionSet, shots: int, seed: int) -> Int64[np.ndarray, " rows"]:
    """Choose images until each class has so many objects, as ODinW's few-shot parts have them.

    Of a class with fewer objects all images are taken. Crowds are no objects.

    Args:
        images: What to choose from.
        shots: Objects per class, at least.
        seed: Decides the order in which images are looked at.

    Returns:
        Numbers of the images, in rising order.

    Raises:
        UsageError: No image has an object.
    """
    lacking = np.full(len(images.class_names), shots)
    chosen = []
    for row in np.random.default_rng(seed).permutation(images.num_images).tolist():
        _, labels, crowd, _ = images.of(row)
        counts = np.bincount(labels[~crowd], minlength=len(lacking))
        if (lacking[counts > 0] > 0).any():
            chosen.append(row)
            lacking -= counts
    if not chosen:
        raise UsageError(f"{images} has no objects to learn from")
    return np.sort(np.array(chosen, np.int64))


def _parts(
    evaluation: str, data: str, training: DetectionSet, options: Options, out: Path
) -> list[tuple[int, _Part]]:
    """Return what each run is trained on, by its number of shots; 0 are all images."""
    if evaluation == "fine-tune":
        where = (options.root / data if data in KNOWN_SETS else Path(data)).resolve()
        return [(0, _Part(training, where, out / "run", False))]
    parts = []
    for shots in dict.fromkeys(options.shots):
        run = out / f"run_{shots}_shot"
        ready = _ready_shots(training.where, shots, options.seed)
        if ready is not None:
            logger.info("%d shots are those of %s", shots, ready)
            images = open_detection_set(str(ready), split="", root=options.root)
            parts.append((shots, _Part(images, ready, run, False)))
            continue
        images = training.at(choose_shots(training, shots, options.seed))
        where = (out / f"train_{shots}_shot.json").resolve()
        parts.append((shots, _Part(images, where, run, True)))
    return parts


def _ready_shots(annotations: Path, shots: int, seed: int) -> Path | None:
    """Return the file of images that the set's publishers chose; of seed 0 their first."""
    prefix = f"fewshot_train_shot{shots}_seed"
    found = {
        int(number): path
        for path in annotations.parent.glob(f"{prefix}*.json")
        if (number := path.stem.removeprefix(prefix)).isdecimal()
    }
    return found.get(seed, found[min(found)] if found and seed == 0 else None)


def _require_classes(recipe: DetectionRecipe, training: DetectionSet, test: DetectionSet) -> None:
    """Refuse classes that could not be compared with the test part's, before hours of training."""
    classes = recipe.detection.classes
    if classes == "none":
        raise UsageError(
            "detection.classes none learns no classes to measure; choose texts or numbers"
        )
    names = recipe.detection.class_names or training.class_names
    category_ids(replace(recipe.detection, class_names=names, category_ids=()), test, named=True)


def _train(recipe: DetectionRecipe, part: _Part, ranks: Ranks) -> Pretrained:
    """Train, or go on, and load what was trained."""
    if part.chosen:
        ranks.on_first(lambda: _write(part))
    run = train(recipe, part.run)
    return ranks.together(lambda: load(run.path, device=recipe.trainer.device))


def _described(
    result: Result,
    model: str | Path,
    recipe: DetectionRecipe,
    part: _Part,
    shots: int,
    seed: int,
) -> Result:
    """Return a result that says what was trained on, and of few shots how many."""
    protocol = {
        **result.protocol,
        "from": str(model),
        "steps": recipe.trainer.steps,
        "num_train": part.images.num_images,
    }
    if not shots:
        left_out = part.images.skipped
        own = {"skipped_annotations_in_train": dict(left_out)} if left_out else {}
        return replace(result, protocol={**protocol, **own})
    metric = f"{shots}_shot"
    chosen = {"seed": seed} if part.chosen else {"examples": part.where.name}
    return replace(
        result,
        metrics={metric: result.metrics["ap"]},
        headline=metric,
        protocol={**protocol, **chosen},
    )


def _save_joint(out: Path, joint: Result) -> None:
    save_result(out / "evaluation", joint)


def _joined(results: Sequence[Result]) -> Result:
    """Return one result of several numbers of shots, as the tables have it."""
    first = results[0]
    differing = {
        key: ", ".join(f"{result.protocol[key]:,}" for result in results)
        for key in ("steps", "num_train")
    }
    return replace(
        first,
        model=str(first.protocol["from"]),
        metrics={key: value for result in results for key, value in result.metrics.items()},
        protocol={**first.protocol, **differing},
        seconds=sum(result.seconds for result in results),
    )


def _write(part: _Part) -> None:
    """Write the images chosen, as a file that a recipe can name."""
    content = json.dumps(_with_whole_paths(part.images)).encode()
    require_writable(part.where.parent)
    with atomic_file(part.where) as file:
        file.write(content)


def _with_whole_paths(images: DetectionSet) -> dict[str, Any]:
    """Return annotations in COCO's format whose images may lie anywhere."""
    folder = getattr(getattr(images.files, "images", images.files), "folder", None)
    if folder is None:
        raise UniclError(f"the images of {images} are no files that a list could name")
    content = images.truth()
    for row, image in enumerate(content["images"]):
        image["file_name"] = str((Path(folder) / image["file_name"]).resolve())
        if images.judged is not None:
            judged = images.of(row).judged
            assert judged is not None
            own = set(images.of(row).labels.tolist())
            asked = set(judged.tolist())
            ids = images.category_ids
            image["neg_category_ids"] = [ids[number] for number in sorted(asked - own)]
            image["not_exhaustive_category_ids"] = [ids[number] for number in sorted(own - asked)]
    return content
