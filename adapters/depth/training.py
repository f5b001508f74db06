"""From a recipe of images with depth to what it trains, and back from a run to its model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from adapters.depth.config import DepthConfig, DepthRecipe
from adapters.depth.rgbd import RgbdDecoder
from adapters.depth.sets import open_rgbd_folder
from unicl.build import Parts, build_evaluators, build_train_loader, contrastive_parts
from unicl.config import override_section
from unicl.data.augment import EvalTransform, TrainTransform
from unicl.data.image_sets.samples import SetSamples
from unicl.data.reader import Transform
from unicl.distributed import Ranks
from unicl.errors import UsageError
from unicl.models import (
    build_image_tower,
    build_tokenizer,
    build_towers,
    identity_of,
    load_run,
    start_from,
    with_locks,
)
from unicl.towers.image import check_image_size
from unicl.towers.pretrained import Pretrained
from unicl.towers.two_tower import TwoTower

CHANNELS = 4
_MAX_PIXELS = 1 << 30


def build_model(recipe: DepthRecipe, *, start: bool) -> TwoTower:
    """Build the towers of a recipe; `start` loads weights, of RGB or of four channels.

    Raises:
        UniclError: there are no such weights, or they do not fit.
    """
    tower = build_image_tower(recipe, start=start, in_chans=CHANNELS)
    model = build_towers(recipe, tower)
    return start_from(recipe, model) if start else with_locks(recipe, model)


def build(recipe: DepthRecipe, ranks: Ranks, *, start: bool) -> Parts:
    """Build a run on a class folder of images with depth, by the contrastive loss.

    Raises:
        UsageError: data are missing, or a setting does not fit them.
        UniclError: the weights to start from are missing or do not fit.
    """
    model = build_model(recipe, start=start)
    size, data = recipe.image_tower.image_size, recipe.data
    check_image_size(model.image, size)
    transform = TrainTransform(size, scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip)
    decode = _decoder(transform, recipe.depth, data.max_image_pixels)
    samples = _open_samples(Path(data.train), split="train")
    eval_decode = _decoder(EvalTransform(size), recipe.depth, data.max_image_pixels)
    return contrastive_parts(
        recipe,
        ranks,
        model,
        loader=build_train_loader(recipe, ranks, samples=samples, decode=decode),
        evaluators=build_evaluators(recipe, ranks, open_samples=_open_samples, decode=eval_decode),
        image_shape=(CHANNELS, size, size),
    )


def load(path: Path, recipe: DepthRecipe) -> Pretrained:
    """Load a run's model with its own way of reading images with depth, and those without.

    Raises:
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    size = recipe.image_tower.image_size
    return Pretrained(
        name=str(path),
        model=load_run(path, build_model(recipe, start=False)),
        tokenize=build_tokenizer(recipe),
        transform=DepthlessTransform(size),
        decode=_lenient_decoder(size, recipe.depth),
        image_size=size,
        context_length=recipe.text_tower.context_length,
        identity=identity_of(recipe, in_chans=CHANNELS),
        medium="depth",
        reading=asdict(recipe.depth),
    )


def adapt(model: Pretrained, overrides: Mapping[str, str]) -> Pretrained:
    """Let a model read images with depth: one of RGB sees the image in the file.

    Raises:
        UsageError: a key is unknown, or has no effect on a model of RGB.
    """
    if not model.medium:
        if overrides:
            raise UsageError(f"{min(overrides)} has no effect: {model.name} sees no depth")
        return model
    depth = override_section(DepthConfig(**model.reading), overrides, prefix="depth")
    decode = _lenient_decoder(model.image_size, depth)
    return replace(model, decode=decode, reading=asdict(depth))


@dataclass(frozen=True)
class DepthlessTransform:
    """An image alone as one of whose depth nothing is known.

    Args:
        size: Side in pixels.
    """

    size: int

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Return bytes [4, size, size] of an opened image."""
        rgb = EvalTransform(self.size)(image)
        return torch.cat([rgb, torch.zeros_like(rgb[:1])])


def _decoder(transform: Transform, depth: DepthConfig, max_pixels: int) -> RgbdDecoder:
    return RgbdDecoder(transform, max_pixels, unit=depth.unit, nearest=depth.nearest)


def _lenient_decoder(size: int, depth: DepthConfig) -> RgbdDecoder:
    return replace(_decoder(EvalTransform(size), depth, _MAX_PIXELS), depthless=True)


def _open_samples(path: Path, split: str = "test") -> SetSamples:
    return SetSamples(open_rgbd_folder(path, split=split))
