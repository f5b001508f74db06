"""Measuring detectors on sets of boxes: `unicl eval MODEL detection-... SET` (Florence 3.6)."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from adapters.detection.config import READING, DetectionConfig
from adapters.detection.measuring import Found, build_loaders, category_ids, compare, find_all
from adapters.detection.metrics import AGNOSTIC
from adapters.detection.pictures import save_pictures
from adapters.detection.pretrained import Detect, overridden
from adapters.detection.sets import DetectionSet, open_detection_set
from unicl.data.atomic import atomic_file
from unicl.data.image_sets import MissingSetError
from unicl.data.prompts import TEMPLATES
from unicl.distributed import Ranks, joined
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import autocast_of
from unicl.evaluation.page import figure
from unicl.evaluation.published import ROBOFLOW, Task
from unicl.evaluation.results import DETECTIONS, Result, save_result
from unicl.evaluator import Options, require_writable, results_folder
from unicl.models import choose_device, load
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

_TASKS: dict[str, Task] = {"map": "detection", "zero-shot": "detection_zero_shot"}
_RECALLS = ("ar1", "ar10", "ar100")


def evaluate(
    evaluation: str,
    model: str | Path,
    data: Sequence[str],
    options: Options,
    overrides: Mapping[str, str],
) -> list[Result]:
    """Measure a detector by one of the plug-in's evaluations; several ranks share the work.

    Each result is written as soon as it is there; beside it what was found, in COCO's format for
    results, and some pictures.

    Args:
        evaluation: map: by the classes of its training, or by the names of the set's, and without
            either how many objects its proposals find; zero-shot: by the names of the set's
            classes; few-shot and fine-tune train first, see `fine_tuning.fine_tune`.
        model: a detector's run.
        data: names of known sets, folders, JSON files; `all` is Florence's 11 sets on Roboflow, as
            far as they are there.
        options: where and how.
        overrides: other ways of looking at images, such as {"detection.test_sizes": "640,800"}.

    Raises:
        UsageError: the model is no detector or not of this kind, or there is no such set or split.
        UniclError: the model cannot be loaded, or images cannot be read.
    """
    if options.download:
        raise UsageError("--download fetches no sets of boxes; leave it out to see what to fetch")
    if evaluation in ("few-shot", "fine-tune"):
        from adapters.detection.fine_tuning import fine_tune

        if len(data) != 1 or data[0] == "all":
            raise UsageError(f"detection-{evaluation} takes one set, got {', '.join(data)}")
        return [fine_tune(evaluation, model, data[0], options, overrides)]
    device = choose_device(options.device)
    with joined(device, timeout_seconds=600, alone=True) as ranks:
        # Opened before the model is loaded: a name that is wrong is told at once.
        sets = ranks.together(lambda: _open_all(data, options))
        loaded = ranks.together(lambda: load(model, device=str(device)))
        detect = ranks.together(lambda: detector_of(loaded))
        config = ranks.together(lambda: _config(evaluation, detect, sets, options, overrides))
        out = results_folder(model) if options.out is None else options.out
        ranks.on_first(lambda: require_writable(out))
        results = []
        for images in sets:
            mark = ", ".join(f"{key}={value}" for key, value in sorted(overrides.items()))
            result, found = measure(
                _TASKS[evaluation], loaded, images, options, ranks, config=config, mark=mark
            )
            results.append(result)
            ranks.on_first(partial(save, out, result, found, images))
            value = figure(result.headline, result.metrics[result.headline])
            logger.info("%s: %s %s", result.name, result.headline, value)
    return results


def detector_of(model: Pretrained) -> Detect:
    """Return what finds objects with a model.

    Raises:
        UsageError: the model is no detector.
    """
    detect = model.skills.get("detect")
    if not isinstance(detect, Detect):
        raise UsageError(
            f"{model.name} is no detector; train one on it: "
            "unicl train detection --weights MODEL --data.train FOLDER"
        )
    return detect


def measure(
    task: Task,
    model: Pretrained,
    images: DetectionSet,
    options: Options,
    ranks: Ranks,
    *,
    config: DetectionConfig | None = None,
    mark: str = "",
) -> tuple[Result, Found]:
    """Find the objects of a set, and compare them with the annotations.

    Args:
        task: what the result is called; detection does not name a detector's proposals.
        model: a detector.
        images: the set.
        options: how the work is done.
        ranks: the processes that share it.
        config: another way of looking at images than the model's own.
        mark: what is said of it in the result's name.

    Returns:
        The result, and what was found.

    Raises:
        UniclError: no image can be read, or there is no object in them.
    """
    start = time.perf_counter()
    detect = detector_of(model)
    config = detect.config if config is None else config
    proposes = config.classes == "none"
    agnostic = proposes and task == "detection"
    ensemble = options.templates or "simple"
    finder = detect.finder(
        None if agnostic or config.classes == "numbers" else images.class_names,
        templates=TEMPLATES[ensemble],
        autocast=autocast_of(options.precision),
        config=config,
    )
    loaders = build_loaders(
        images,
        config,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        ranks=ranks,
    )
    found = find_all(finder, images, loaders, ranks)
    metrics = compare(found, images, by_class=not agnostic)
    if agnostic:
        metrics = {name: metrics[name] for name in _RECALLS if name in metrics}
    headline = "ar100" if agnostic else "ap"
    if headline not in metrics:
        raise UniclError(f"{images} has no objects to find; choose another set or --split")
    named = proposes and not agnostic
    of_names = {"templates": ensemble, "num_templates": len(TEMPLATES[ensemble])}
    unsaid = ("test_sizes",) if named else ("test_sizes", "regions")
    protocol = {
        "split": images.split,
        "image_size": ", ".join(map(str, config.test_sizes)),
        "precision": options.precision,
        "num_classes": 1 if agnostic else len(images.class_names),
        "classes": config.classes,
        **{name: getattr(config, name) for name in READING if name not in unsaid},
        **(of_names if named else {}),
        # Not among the images that were left out, which results count.
        **({"skipped_annotations": dict(images.skipped)} if images.skipped else {}),
        **({"mark": mark} if mark else {}),
    }
    result = Result(
        task=task,
        dataset=images.name,
        model=model.name,
        metrics=metrics,
        headline=headline,
        num_images=len(found.rows),
        skipped=found.skipped,
        protocol=protocol,
        seconds=time.perf_counter() - start,
    )
    return result, found


def save(out: Path, result: Result, found: Found, images: DetectionSet) -> None:
    """Write a result, and beside it NAME.detections.json and pictures in NAME.pictures.

    Raises:
        UniclError: the folder cannot be written to.
    """
    stem = save_result(out, result).with_suffix("")
    with atomic_file(stem.with_name(stem.name + DETECTIONS)) as file:
        file.write(json.dumps(found.results).encode())
    names = dict(zip(images.category_ids, images.class_names, strict=True))
    if result.headline == "ar100":
        names = {AGNOSTIC: "object"}
    save_pictures(stem.with_name(f"{stem.name}.pictures"), images, found, names)


def _config(
    evaluation: str,
    detect: Detect,
    sets: Sequence[DetectionSet],
    options: Options,
    overrides: Mapping[str, str],
) -> DetectionConfig:
    """Return how a detector looks at images; refuse what it cannot be asked for."""
    config = overridden(detect.config, overrides)
    if evaluation == "zero-shot" and config.classes == "numbers":
        raise UsageError(
            f"{detect.name} knows its classes by number and finds none by name; measure it by "
            "detection-map, or train with --detection.classes texts"
        )
    names_proposals = evaluation == "zero-shot" and config.classes == "none"
    if "detection.regions" in overrides and not names_proposals:
        raise UsageError("detection.regions has an effect on detection-zero-shot of proposals only")
    if options.templates is not None and not names_proposals:
        raise UsageError(
            f"--templates is for naming proposals; {detect.name} was trained on names as they are"
        )
    for images in sets:
        category_ids(config, images, named=evaluation == "zero-shot")
    return config


def _open_all(data: Sequence[str], options: Options) -> list[DetectionSet]:
    """Open every set before anything is computed; of Florence's sets those that are there."""
    if not data:
        raise UsageError("name at least one set: a known one, a folder, or all")
    opened = []
    for name in data:
        opened += _open_papers(options) if name == "all" else [_open(name, options)]
    return opened


def _open_papers(options: Options) -> list[DetectionSet]:
    there, missing = [], []
    for name in ROBOFLOW:
        try:
            there.append(_open(name, options))
        except MissingSetError:
            missing.append(name)
        except UniclError as error:
            logger.warning("left out: %s", error)
    lacks = (
        f"{options.root} lacks {', '.join(missing)}; name another --root, or ask for one alone to "
        "see what it needs"
    )
    if missing and not there:
        raise UsageError(f"none of the sets of detection is there: {lacks}")
    if not there:
        raise UsageError("none of the sets of detection can be opened")  # why was told of each
    if missing:
        logger.warning("left out: %s", lacks)
    return there


def _open(name: str, options: Options) -> DetectionSet:
    return open_detection_set(name, split=options.split, root=options.root)
