"""3D-CoSwin: the CoSwin of clips, and its start from the weights of images (Florence 2.6, 3.8).

Kernels and windows get an extent in time: patch embedding becomes tube embedding, merging overlaps
in time too, windows are shifted along time as along space. All else is the image model's. Florence
says that windows are small early and large late, but gives no extent in time of kernels, strides or
windows: those here are ours, and each is an argument.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cosswin import ConvShape, CoSwin, WindowAttention, carry_weights
from cosswin.model import MERGE, STEM
from unicl.errors import UsageError

_STEM_KERNEL = "patch_embed.proj.weight"


def coswin3d(  # noqa: PLR0913 - timm's vocabulary, and the extents in time
    variant: str,
    *,
    tube_frames: int = 2,
    tube_stride: int = 2,
    merge_steps: int = 3,
    time_windows: Sequence[int] | None = None,
    space_windows: int | Sequence[int] | None = None,
    num_classes: int = 0,
    in_chans: int = 3,
    img_size: int | None = None,
    drop_path_rate: float = 0.0,
    layer_scale: float | None = None,
    checkpointing: bool = False,
) -> CoSwin:
    """Build the 3D-CoSwin of a registered CoSwin; it takes clips [n, in_chans, frames, h, w].

    A map of it is [n, steps, h, w, c], with one time step for each `tube_stride` frames begun; time
    is not merged further. Any number of frames runs, one included, and any size of frames. A window
    that is longer than the clip shrinks to it.

    Args:
        variant: Name of the image model, such as "coswin_tiny".
        tube_frames: Frames that a tube, the stem's kernel, spans; Video-Swin's 2.
        tube_stride: Frames from one tube to the next.
        merge_steps: Time steps that the merging between stages sees at once; 1 keeps them apart,
            which is nearer to the 647M parameters that Florence gives for video.
        time_windows: Time steps that a window spans, one number a stage. Unset, 2, 4, 8, 16: they
            double while maps are halved, and the last spans the 16 steps of the usual 32 frames as
            it spans the whole map of 224 pixels.
        space_windows: Side of a window on the map, one number, or one a stage; unset, the
            variant's own.
        num_classes: Classes of the linear head; 0 leaves it out.
        in_chans: Channels of a frame.
        img_size: Nominal side of a frame, which timm records; unset, the variant's own.
        drop_path_rate: Stochastic depth of the last block.
        layer_scale: Initial LayerScale; unset for none.
        checkpointing: Recompute the blocks' activations in the backward pass.

    Raises:
        UsageError: No CoSwin has that name, or a number is not positive or not given per stage.
    """
    windows = _image_windows(variant)
    for name, number in (
        ("tube_frames", tube_frames),
        ("tube_stride", tube_stride),
        ("merge_steps", merge_steps),
    ):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    time = _per_stage("time_windows", time_windows, [2 ** (i + 1) for i in range(len(windows))])
    if isinstance(space_windows, int):
        space_windows = [space_windows] * len(windows)
    if space_windows is not None:
        sides = _per_stage("space_windows", space_windows, range(len(windows)))
        windows = [(side, side) for side in sides]
    nominal = {} if img_size is None else {"img_size": img_size}
    model: Any = timm.create_model(
        variant,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        layer_scale=layer_scale,
        stem=_in_time(STEM, kernel=tube_frames, stride=tube_stride),
        merge=_in_time(MERGE, kernel=merge_steps, stride=1),
        window_size=[(t, *space) for t, space in zip(time, windows, strict=True)],
        **nominal,  # type: ignore[arg-type]
    )
    model.set_grad_checkpointing(checkpointing)
    return model


def load_image_weights(
    model: CoSwin,
    weights: Mapping[str, Any],
    *,
    window_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    source: Path | str = "the state dict",
) -> None:
    """Start a 3D-CoSwin from the weights of an image CoSwin, inflated (Florence 2.6).

    With the same windows on the map, a clip of one still image then has that image's features at
    every time step. A head of other classes stays as it is.

    Args:
        model: What takes the weights, by `coswin3d`.
        weights: State dict of an image CoSwin, alone or under one prefix in a larger model.
        window_size: Its window, or one for each stage; needed only where it is no square.
        source: Where the weights are from, for the errors.

    Raises:
        UsageError: The weights are of clips already, or of another architecture.
    """
    if _dimensions(model, weights, source) == 3:
        raise UsageError(
            f"{source} has the weights of a 3D-CoSwin, which need no inflation: "
            "take them with load_video_weights"
        )
    _load(model, weights, window_size, source)


def load_video_weights(
    model: CoSwin,
    weights: Mapping[str, Any],
    *,
    window_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    source: Path | str = "the state dict",
) -> None:
    """Start a 3D-CoSwin from the weights of another whose windows or classes may differ.

    Args:
        model: What takes the weights, by `coswin3d`.
        weights: State dict of a 3D-CoSwin, alone or under one prefix in a larger model.
        window_size: Its windows, one for each stage; needed where they differ from the model's in
            time and on the map at once.
        source: Where the weights are from, for the errors.

    Raises:
        UsageError: The weights are of images, or of another architecture.
    """
    if _dimensions(model, weights, source) == 2:
        raise UsageError(
            f"{source} has the weights of an image CoSwin: inflate them with load_image_weights"
        )
    _load(model, weights, window_size, source)


def _image_windows(variant: str) -> list[tuple[int, ...]]:
    """Return the variant's own window of each stage."""
    model: nn.Module | None = None
    if timm.is_model(variant):
        with torch.device("meta"):
            model = timm.create_model(variant, num_classes=0)
    if not isinstance(model, CoSwin):
        names = timm.list_models("coswin_*")
        nearest = difflib.get_close_matches(variant, names, n=3) or ["coswin_tiny"]
        raise UsageError(f"there is no CoSwin {variant!r}; there is {', '.join(nearest)}")
    attentions = [
        next(module for module in stage.modules() if isinstance(module, WindowAttention))
        for stage in model.layers
    ]
    return [attention.window_size for attention in attentions]


def _per_stage(name: str, given: Sequence[int] | None, default: Sequence[int]) -> Sequence[int]:
    if given is None:
        return default
    if len(given) != len(default) or min(given) < 1:
        raise UsageError(
            f"{name} must be {len(default)} positive numbers, one for each stage, got {list(given)}"
        )
    return given


def _in_time(image: ConvShape, *, kernel: int, stride: int) -> ConvShape:
    # Where tubes overlap, the first starts as far before the clip as the last ends after it.
    before = max(0, kernel - stride) // 2
    return ConvShape((kernel, *image.kernel), (stride, *image.stride), (before, *image.padding))


def _dimensions(model: CoSwin, weights: Mapping[str, Any], source: Path | str) -> int | None:
    """Return how many dimensions the weights are of; None where that cannot be seen."""
    if model.dims != 3:
        raise UsageError("the model is a CoSwin of images; build one of clips with coswin3d")
    nested = [key for key, value in weights.items() if isinstance(value, Mapping)]
    if nested:
        raise UsageError(
            f"{source} is no state dict but holds others: pass what lies under {nested[0]!r}"
        )
    stems = [value for key, value in weights.items() if key.endswith(_STEM_KERNEL)]
    return stems[0].ndim - 2 if len(stems) == 1 else None


def _load(
    model: CoSwin,
    weights: Mapping[str, Any],
    window_size: Sequence[int] | Sequence[Sequence[int]] | None,
    source: Path | str,
) -> None:
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(carry_weights(tensors, model, window_size=window_size))
    except ValueError as error:
        raise UsageError(
            f"{source} does not fit the 3D-CoSwin: {error}; "
            "build it from the variant that the weights were trained as"
        ) from error
