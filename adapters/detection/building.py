"""From a recipe of detection to what it trains."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from adapters.detection.config import DetectionRecipe
from adapters.detection.detector import STRIDES, Detector
from adapters.detection.measuring import AveragePrecision, build_loaders
from adapters.detection.reading import DetectionBatch, DetectionReader, JoinedSets
from adapters.detection.sets import DetectionSet, open_detection_set
from adapters.detection.training import DetectionTraining
from adapters.detection.transforms import TrainTransform
from adapters.detection.vocabulary import Vocabulary
from unicl.build import Parts
from unicl.data.hash_table import normalise
from unicl.data.loader import BatchLoader
from unicl.data.order import SampleOrder
from unicl.distributed import Ranks
from unicl.engine.checkpoint import set_weights
from unicl.errors import UsageError
from unicl.models import build_image_tower, build_tokenizer, build_towers, read_weights, with_locks
from unicl.towers.image import BACKBONE, ImageTower, backbone_weights, carry_backbone
from unicl.towers.two_tower import TwoTower, carry_model

_ROOT = Path("data")
_OF_HEAD = ("pyramid.", "head.", "predictor.")
_CLASSES = "predictor.classes."
_BY_TEXT = "predictor.log_scale"  # only detectors by text have it


def complete(recipe: DetectionRecipe) -> DetectionRecipe:
    """Name the classes after those of the training data, where the recipe leaves it to them."""
    _open.cache_clear()  # the files may have changed since an earlier run of this process
    detection = recipe.detection
    if detection.classes == "none" or detection.class_names or not recipe.data.train:
        return recipe
    sets = open_sets(recipe)
    names = Vocabulary.join(sets).names
    ids = sets[0].category_ids if len(sets) == 1 else tuple(range(1, len(names) + 1))
    return replace(recipe, detection=replace(detection, class_names=names, category_ids=ids))


def build(recipe: DetectionRecipe, ranks: Ranks, *, start: bool) -> Parts:
    """Build a detector's run.

    Raises:
        UsageError: data are missing, or a setting does not fit them.
        UniclError: the weights to start from are missing or do not fit.
    """
    detection = recipe.detection
    if detection.classes == "none" and recipe.weights is None:
        raise UsageError(
            "detection.classes none keeps both towers as they are, which needs towers that are "
            "trained: name a run by `weights`"
        )
    sets = open_sets(recipe)
    if not any(len(each.boxes) for each in sets):
        raise UsageError(f"{', '.join(each.name for each in sets)} has no objects to learn from")
    samples = join(recipe, sets)
    model = build_model(recipe, start=start)
    return Parts(
        DetectionTraining(
            model,
            names=detection.class_names,
            tokenize=build_tokenizer(recipe),
            classes_per_step=detection.classes_per_step,
            seed=recipe.trainer.seed,
            ranks=ranks,
        ),
        _train_loader(recipe, samples, ranks),
        _evaluators(recipe, ranks),
    )


def build_model(recipe: DetectionRecipe, *, start: bool) -> Detector:
    """Build the detector of a recipe; `start` loads the weights to start from.

    Those may be of two towers, or of a detector, of which the head is taken as far as it fits.

    Raises:
        UsageError: the image tower has no maps of several sizes, or weights do not fit.
        UniclError: there are no such weights.
    """
    detection = recipe.detection
    tower = build_image_tower(recipe, start=start)
    by_number = detection.classes == "numbers"
    text = nn.Identity() if by_number else build_towers(recipe, tower).text
    model = Detector(
        tower,
        text,
        detection,
        num_classes=len(detection.class_names),
        embed_dim=recipe.embed_dim,
        initial_scale=recipe.loss.initial_scale,
        max_scale=recipe.loss.max_scale,
    )
    _require_any_size(tower)
    if start and recipe.weights is not None:
        _start_from(Path(recipe.weights), model, towers=not by_number)
    if detection.classes == "none":
        model.lock("image")
        model.lock("text")
    with_locks(recipe, model)
    return model


def _start_from(path: Path, model: Detector, *, towers: bool) -> None:
    """Load two towers, or a backbone alone, and what fits of a head."""
    file, weights = read_weights(path)
    if not towers:
        backbone = backbone_weights(weights)
        if not backbone:
            raise UsageError(f"{file} has no whole model's weights: it lacks {BACKBONE}*")
        image: ImageTower = model.image  # type: ignore[assignment]
        image.backbone.load_state_dict(carry_backbone(backbone, image.backbone, source=file))
    else:
        scales = {"initial_scale": model.scale().item(), "max_scale": model.max_scale}
        two = TwoTower(model.image, model.text, **scales)
        two.logit_scale = model.logit_scale
        of_towers = {k: w for k, w in weights.items() if not k.startswith(_OF_HEAD)}
        set_weights(carry_model(of_towers, two, source=file), two, source=file)
    own = model.state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name.startswith(_OF_HEAD) and name in own and own[name].shape == weight.shape
    }
    if (_BY_TEXT in weights) != model.by_text:  # embeddings and logits may be equally many
        fitting = {k: w for k, w in fitting.items() if not k.startswith(_CLASSES)}
    model.load_state_dict(fitting, strict=False)


def _require_any_size(tower: ImageTower) -> None:
    """Refuse a tower of one size only, and keep what the maps do not depend on as it is.

    What has no gradient on one rank would keep all others waiting.
    """
    parameters = [p for p in tower.backbone.parameters() if p.requires_grad]
    training = tower.training
    try:
        maps = tower.eval().maps(torch.zeros(1, tower.in_chans, 64, 96), STRIDES)
        sizes = [tuple(each.shape[-2:]) for each in maps]
        if sizes != [(64 // stride, 96 // stride) for stride in STRIDES]:
            raise ValueError(f"its maps of 64 x 96 pixels have sizes {sizes}")
        total = torch.stack([each.float().sum() for each in maps]).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"image_tower.model {tower.model} does not take images of any size, as detection "
            f"needs: {reason}"
        ) from error
    finally:
        tower.train(training)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def open_sets(recipe: DetectionRecipe) -> tuple[DetectionSet, ...]:
    """Open the sets that a recipe trains on.

    Raises:
        UsageError: there is no such set, or it is of no known layout.
    """
    specs = (recipe.data.train, *recipe.detection.sets)
    return tuple(_open(spec, "train") for spec in specs)


# A recipe's classes are asked of the data before the run is built; a large JSON takes a minute.
@functools.lru_cache(maxsize=8)
def _open(spec: str, split: str) -> DetectionSet:
    return open_detection_set(spec, split=split, root=_ROOT)


def open_held_out(spec: str) -> DetectionSet:
    """Open the part of a set that is measured during training, `val`.

    Raises:
        UsageError: there is no such part; a file, or the part's own folder, has no others.
    """
    return _open(spec, "val")


def join(recipe: DetectionRecipe, sets: Sequence[DetectionSet]) -> JoinedSets:
    """Join sets under the recipe's classes; without classes each object is just an object.

    Raises:
        UsageError: the recipe names other classes than the data have.
    """
    if recipe.detection.classes == "none":
        return JoinedSets(sets, Vocabulary.of_objects(sets))
    vocabulary = Vocabulary.join(sets)
    own = [normalise(name) for name in vocabulary.names]
    named = [normalise(name) for name in recipe.detection.class_names]
    if own != named:
        odd = sorted(set(own) ^ set(named)) or ["their order"]
        raise UsageError(
            f"detection.class_names differ from the {len(own)} classes of the data in "
            f"{odd[0]!r}; leave class_names out to take those of the data"
        )
    return JoinedSets(sets, vocabulary)


def _train_loader(
    recipe: DetectionRecipe, samples: JoinedSets, ranks: Ranks
) -> BatchLoader[DetectionBatch]:
    data, detection, seed = recipe.data, recipe.detection, recipe.trainer.seed
    reader = DetectionReader(
        samples,
        SampleOrder(samples.shard_sizes, seed=seed, window=data.shuffle_window),
        TrainTransform(
            detection.min_sizes, detection.max_size, flip=data.flip, crop_scale=data.crop_scale
        ),
        seed,
        data.max_image_pixels,
        max(detection.min_sizes) * detection.max_size,
    )
    return BatchLoader(
        reader,
        batch_size=recipe.trainer.batch_size,
        num_workers=data.num_workers,
        max_skipped_share=data.max_skipped_share,
        ranks=ranks,
    )


def _evaluators(recipe: DetectionRecipe, ranks: Ranks) -> list[AveragePrecision]:
    if recipe.evaluation.data is None:
        return []
    images = open_held_out(recipe.evaluation.data)
    loaders = build_loaders(
        images,
        recipe.detection,
        batch_size=recipe.evaluation.batch_size,
        num_workers=recipe.data.num_workers,
        ranks=ranks,
    )
    return [
        AveragePrecision(
            images, loaders, recipe.detection, tokenize=build_tokenizer(recipe), ranks=ranks
        )
    ]
