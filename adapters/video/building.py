"""From a recipe of videos to what it trains."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from adapters.video.action import ActionRecognition, Recognition
from adapters.video.clips import ClipSampling, TrainClipDecoder
from adapters.video.config import VideoRecipe
from adapters.video.files import refuse_pictures
from adapters.video.pretrained import FramesDecoder, build_model, eval_decoder, view_dims
from adapters.video.sets import open_video_samples
from adapters.video.towers import VideoClassifier
from unicl.build import (
    Parts,
    TextSamples,
    build_eval_loader,
    build_evaluators,
    build_train_loader,
    contrastive_parts,
    open_shards,
)
from unicl.data.hash_table import normalise
from unicl.data.image_sets import ClassificationSet
from unicl.data.image_sets.samples import SetSamples
from unicl.data.reader import Decode
from unicl.data.shard_index import DATASET_FILE
from unicl.distributed import Ranks
from unicl.engine.task import TaskInputs
from unicl.errors import UsageError
from unicl.pretraining import count_flops


def complete(recipe: VideoRecipe) -> VideoRecipe:
    """Name the classes of a head after all those of the set, in its order.

    Of shards they are the texts, in alphabetical order.
    """
    video = recipe.video
    if video.targets == "texts" or video.class_names or not recipe.data.train:
        return recipe
    samples = open_samples(Path(recipe.data.train), split="train")
    if isinstance(samples, SetSamples) and isinstance(samples.images, ClassificationSet):
        names = samples.images.class_names  # a class may have no video in this part
    else:
        names = tuple(sorted(samples.table().texts))
    return replace(recipe, video=replace(video, class_names=names))


def build(recipe: VideoRecipe, ranks: Ranks, *, start: bool) -> Parts:
    """Build a run on videos: contrastive on texts, or a head on classes.

    Raises:
        UsageError: data are missing, or a setting does not fit them.
        UniclError: the weights to start from are missing or do not fit.
    """
    model = build_model(recipe, start=start)
    samples = open_samples(Path(recipe.data.train), split="train")
    decode = _train_decoder(recipe)
    loader = build_train_loader(recipe, ranks, samples=samples, decode=decode)
    shape = tuple(decode.empty().shape[1:])
    dims = view_dims(recipe.video)
    view, num_views = shape[-dims:], math.prod(shape[:-dims])
    if isinstance(model, VideoClassifier):
        labels = _labels(recipe, samples)
        per_clip = 3 * num_views * count_flops(model.image, (1, *view), torch.float32)

        def flops(inputs: TaskInputs) -> float:
            return per_clip * len(inputs.towers["image"])

        return Parts(
            ActionRecognition(
                model, labels, label_smoothing=recipe.video.label_smoothing, ranks=ranks
            ),
            loader,
            _recognition(recipe, ranks),
            flops,
        )
    how = {"open_samples": _open_held_out, "decode": _eval_decoder(recipe)}
    return contrastive_parts(
        recipe,
        ranks,
        model,
        loader=loader,
        evaluators=build_evaluators(recipe, ranks, **how),
        image_shape=view,
        images_per_sample=num_views,
    )


def open_samples(path: Path, *, split: str) -> TextSamples:
    """Open prepared shards, or part of a set of videos; all of a set that has no parts."""
    if (path / DATASET_FILE).is_file():
        shards = open_shards(path)
        refuse_pictures(shards.first_tar)
        return shards
    return open_video_samples(str(path), split=split, root=Path("data"))


def _open_held_out(path: Path) -> TextSamples:
    return open_samples(path, split="test")


def _recognition(recipe: VideoRecipe, ranks: Ranks) -> list[Recognition]:
    if recipe.evaluation.data is None:
        return []
    samples = _open_held_out(Path(recipe.evaluation.data))
    loader = build_eval_loader(recipe, samples, ranks, decode=_eval_decoder(recipe))
    return [Recognition(loader, _labels(recipe, samples))]


def _labels(recipe: VideoRecipe, samples: TextSamples) -> list[int]:
    """Return the labels of the head's classes, which must be all that the samples have."""
    table, names = samples.table(), [normalise(name) for name in recipe.video.class_names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"two classes of the head are called {twice[0]!r}; give each a name of its own"
        )
    if table.num_empty:
        raise UsageError(
            f"{table.num_empty} samples of the data have an empty text, which is no class of a "
            "head; take them out, or set video.targets to texts"
        )
    unknown = sorted(set(table.texts).difference(names))
    if unknown:
        raise UsageError(
            f"{len(unknown)} texts of the data are no class of the head, such as {unknown[0]!r}; "
            "set video.class_names to all of them, or leave it out"
        )
    return [table.label(name, "") for name in names]


def _train_decoder(recipe: VideoRecipe) -> Decode:
    data, video = recipe.data, recipe.video
    augmented = video.randaugment_ops > 0
    decode = TrainClipDecoder(
        recipe.image_tower.image_size,
        ClipSampling(video.num_frames, video.sampling, video.frame_stride),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        rand_augment=(video.randaugment_ops, video.randaugment_magnitude) if augmented else None,
        max_pixels=data.max_image_pixels,
    )
    return decode if video.tower == "3d" else FramesDecoder(decode)


def _eval_decoder(recipe: VideoRecipe) -> Decode:
    size, max_pixels = recipe.image_tower.image_size, recipe.data.max_image_pixels
    return eval_decoder(recipe.video, size, max_pixels=max_pixels)
