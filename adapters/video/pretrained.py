"""Models of videos: built from a recipe, loaded from a run, or made of a model of images."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from adapters.video.clips import MAX_PIXELS, ClipSampling, EvalClipDecoder
from adapters.video.config import READING, TOWER, VideoConfig, VideoRecipe
from adapters.video.coswin3d import coswin3d, load_image_weights
from adapters.video.towers import VideoClassifier, VideoTwoTower
from cosswin import CoSwin
from unicl.config import override_section
from unicl.data.augment import EvalTransform
from unicl.data.reader import Decode
from unicl.errors import UsageError
from unicl.models import (
    build_image_tower,
    build_tokenizer,
    build_towers,
    identity_of,
    load_run,
    read_weights,
    start_from,
    with_locks,
)
from unicl.models import (
    build_model as build_image_model,
)
from unicl.towers.image import ImageTower, backbone_weights, carry_backbone
from unicl.towers.pretrained import Pretrained
from unicl.towers.two_tower import TwoTower

# CLIP4Clip's: 12 frames spread over the video (Luo et al. 2021).
_OF_IMAGES = VideoConfig(tower="frames", num_frames=12, sampling="uniform", frame_stride=1)


def build_model(recipe: VideoRecipe, *, start: bool) -> VideoTwoTower | VideoClassifier:
    """Build the model of a recipe; `start` loads the weights to start from, inflated if need be.

    Raises:
        UniclError: there are no such weights, or they do not fit.
    """
    video = recipe.video
    dims = view_dims(video)
    if video.tower == "frames" and video.targets == "texts":
        return VideoTwoTower.of(build_image_model(recipe, start=start), view_dims=dims)
    tower = _build_tower(recipe, start=start)
    if video.targets == "texts":
        model = VideoTwoTower.of(build_towers(recipe, tower), view_dims=dims)
        (start_from if start else with_locks)(recipe, model)
        return model
    if start and recipe.weights is not None:
        file, weights = read_weights(Path(recipe.weights))
        weights = backbone_weights(weights)
        if not weights:
            raise UsageError(f"{file} has no whole model's weights: it lacks image.backbone.*")
        tower.backbone.load_state_dict(carry_backbone(weights, tower.backbone, source=file))
    classifier = VideoClassifier(
        tower,
        num_classes=len(video.class_names),
        width=tower.projection.in_features,
        dropout=video.dropout,
        view_dims=dims,
    )
    with_locks(recipe, classifier)
    return classifier


def _build_tower(recipe: VideoRecipe, *, start: bool) -> ImageTower:
    image, video = recipe.image_tower, recipe.video
    backbone = None
    if video.tower == "3d":
        backbone = coswin3d(
            image.model,
            **_tower_settings(video, space_windows=image.window_size),
            img_size=image.image_size,
            drop_path_rate=image.drop_path_rate,
            layer_scale=image.layer_scale,
        )
    return build_image_tower(recipe, start=start, backbone=backbone)


def view_dims(video: VideoConfig) -> int:
    """Return the dimensions of a view: those of a frame, or of a clip."""
    return 4 if video.tower == "3d" else 3


def eval_decoder(
    video: VideoConfig, size: int, *, crop: float | None = None, max_pixels: int = MAX_PIXELS
) -> Decode:
    """Build what makes the views of an encoded video, or of an image as a still clip."""
    decode = EvalClipDecoder(
        size,
        ClipSampling(video.num_frames, video.sampling, video.frame_stride),
        num_clips=video.num_clips,
        num_crops=video.num_crops,
        crop=crop,
        max_pixels=max_pixels,
    )
    return decode if video.tower == "3d" else FramesDecoder(decode)


@dataclass(frozen=True)
class FramesDecoder:
    """Each frame of a clip, or of each view, as a view of its own: for a tower of images."""

    decode: Decode
    """Makes clips [3, frames, h, w] or views [views, 3, frames, h, w]."""

    def __call__(self, encoded: bytes, seed: int = 0) -> Tensor:
        """Return frames [views * frames, 3, h, w] of an encoded video."""
        return self._frames(self.decode(encoded, seed)[None])[0]

    def empty(self) -> Tensor:
        """Return no videos, of the shape that their frames have."""
        return self._frames(self.decode.empty())

    def _frames(self, clips: Tensor) -> Tensor:
        frames = clips.movedim(-3, -4)  # before the channels
        return frames if frames.ndim == 5 else frames.flatten(1, 2)


def load(path: Path, recipe: VideoRecipe) -> Pretrained:
    """Load a run's model with its own way of reading videos, and images as still clips.

    Raises:
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    video = recipe.video
    model = load_run(path, build_model(recipe, start=False))
    size = recipe.image_tower.image_size
    tokenize: Any = build_tokenizer(recipe)
    if video.targets == "classes":
        tokenize = functools.partial(_no_texts, str(path))
    return Pretrained(
        name=str(path),
        model=model,
        tokenize=tokenize,
        transform=_still(video, size),
        decode=eval_decoder(video, size),
        image_size=size,
        context_length=recipe.text_tower.context_length,
        identity=identity_of(
            recipe, model=recipe.model, classes=video.class_names, **_kept(video, TOWER)
        ),
        classes=video.class_names,
        medium="video",
        reading=_kept(video, READING),
    )


def adapt(model: Pretrained, overrides: Mapping[str, str]) -> Pretrained:
    """Let a model see videos.

    A run on videos reads them as it was trained, unless overrides say otherwise. A model of images
    sees 12 frames spread over the video, each alone (CLIP4Clip's mean); `video.tower` 3d inflates
    its CoSwin without any training, as Florence's zero-shot retrieval does (3.8, 3.9).

    Args:
        model: of videos or of images.
        overrides: keys of how videos are read, such as {"video.num_clips": "4"}; for a model of
            images also those of the tower.

    Raises:
        UsageError: a key has no effect at evaluation, or is none.
    """
    if not model.medium:
        return _adapt_images(model, overrides)
    _refuse(overrides, READING)
    towers = model.model
    assert isinstance(towers, VideoTwoTower | VideoClassifier)
    tower: Any = "3d" if towers.view_dims == 4 else "frames"
    video = override_section(VideoConfig(tower=tower, **model.reading), overrides, prefix="video")
    return replace(
        model,
        transform=_still(video, model.image_size),
        decode=eval_decoder(video, model.image_size),
        reading=_kept(video, READING),
    )


def _adapt_images(model: Pretrained, overrides: Mapping[str, str]) -> Pretrained:
    inflates = overrides.get("video.tower") == "3d"
    _refuse(overrides, (*READING, *(TOWER if inflates else ("tower",))))
    video = override_section(_OF_IMAGES, overrides, prefix="video")
    crop = getattr(model.transform, "crop", 1.0)  # open_clip's see all of the shorter side
    towers, transform, identity = model.model, model.transform, model.identity
    if inflates:
        towers = _inflated(towers, video, model)
        transform = _still(video, model.image_size, crop=crop)
        identity = f"{identity} {json.dumps(_kept(video, TOWER))}"
    return replace(
        model,
        model=VideoTwoTower.of(towers, view_dims=view_dims(video)).eval(),
        transform=transform,
        decode=eval_decoder(video, model.image_size, crop=crop),
        identity=identity,
        reading=_kept(video, READING),
    )


def _refuse(overrides: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Refuse keys that would have no effect."""
    keys = [f"video.{name}" for name in allowed]
    others = {f"video.{name}" for name in asdict(_OF_IMAGES)}.difference(keys)
    if given := sorted(others.intersection(overrides)):
        raise UsageError(f"{given[0]} has no effect here; there are {', '.join(keys)}")


def _inflated(model: TwoTower, video: VideoConfig, of: Pretrained) -> TwoTower:
    """Return a model with the 3D-CoSwin in place of its CoSwin; they share the other weights."""
    image: Any = model.image
    backbone = getattr(image, "backbone", None)
    if not isinstance(backbone, CoSwin):
        raise UsageError(
            f"video.tower 3d inflates a CoSwin only, which {of.name} has not; leave it out"
        )
    stages: Any = backbone.layers
    windows = tuple(stage.blocks[0].attn.window_size[0] for stage in stages)
    inflated = coswin3d(
        image.model,
        img_size=of.image_size,
        layer_scale=None if stages[0].blocks[0].gamma is None else 1.0,
        **_tower_settings(video, space_windows=windows),
    )
    load_image_weights(inflated, backbone.state_dict(), source=of.name)
    tower = ImageTower(image.model, embed_dim=image.projection.out_features, backbone=inflated)
    tower.projection = image.projection
    towers = TwoTower(tower.to(model.logit_scale.device), model.text, max_scale=model.max_scale)
    towers.logit_scale = model.logit_scale
    return towers


def _tower_settings(
    video: VideoConfig, *, space_windows: int | Sequence[int] | None
) -> dict[str, Any]:
    return {
        "tube_frames": video.tube_frames,
        "tube_stride": video.tube_stride,
        "merge_steps": video.merge_steps,
        "time_windows": video.time_windows or None,
        "space_windows": video.space_windows or space_windows,
    }


def _kept(video: VideoConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(video, name) for name in names}


def _still(video: VideoConfig, size: int, *, crop: float | None = None) -> Callable[..., Tensor]:
    """Build what makes an opened image a view: itself, or a clip in which nothing moves."""
    transform = EvalTransform(size, crop=crop)
    return transform if video.tower == "frames" else StillClip(transform, video.num_frames)


def _no_texts(name: str, texts: Sequence[str]) -> Tensor:
    raise UsageError(
        f"{name} has a classification head and no text tower; evaluate it by video-recognition "
        "or video-linear-probe"
    )


@dataclass(frozen=True)
class StillClip:
    """An image as a clip in which nothing moves.

    Args:
        transform: Makes bytes [3, size, size] of an opened image.
        num_frames: Frames of the clip.
    """

    transform: EvalTransform
    num_frames: int

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Return a clip [3, num_frames, size, size] of an opened image."""
        still = self.transform(image)
        return still[:, None].expand(-1, self.num_frames, -1, -1).contiguous()
