"""The image tower: any timm model, pooled, and a linear projection (Florence, section 2.3)."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import cosswin  # also registers coswin_* with timm
from cosswin.resize import adapt_channels
from unicl.errors import UniclError, UsageError

# Where a two-tower model has its backbone.
BACKBONE = "image.backbone."
# What timm's models call the initial LayerScale.
_LAYER_SCALE = ("layer_scale", "init_values", "ls_init_value")
# Of input channels beside RGB, in 0..1: a byte of 0, which is nothing measured, adds nothing.
_OTHER_MEAN, _OTHER_STD = 0.0, 0.25


class ImageTower(nn.Module):
    """Images into image features: backbone, pooling, projection.

    Args:
        model: Name of a CoSwin or any other timm model.
        embed_dim: Width of the features that come out.
        image_size: Side of the square input in pixels; models that take any size ignore it.
        in_chans: Channels of the input, RGB first. Weights of RGB models are carried over: they
            give the same features, whatever the other channels hold, until these are trained.
        window_size: Side of the attention windows; unset takes the model's own.
        drop_path_rate: Stochastic depth of the last block.
        layer_scale: Initial LayerScale; unset takes the model's own.
        checkpointing: Recompute activations in the backward pass.
        weights: A safetensors file with weights of the backbone, or of a whole run's model.
        backbone: The backbone itself, where it is not timm's `model` as it is but made of it.

    Raises:
        UsageError: Unknown model, a setting that it does not have, or weights that do not fit.
    """

    backbone: Any  # timm's models share conventions, but no type
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        *,
        embed_dim: int = 512,
        image_size: int = 224,
        in_chans: int = 3,
        window_size: int | None = None,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
        weights: Path | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 3:
            raise UsageError(f"an image tower takes RGB and more, got {in_chans} channels")
        self.model = model
        self.in_chans = in_chans
        if backbone is None:
            backbone = _build_backbone(
                model,
                img_size=image_size,
                in_chans=None if in_chans == 3 else in_chans,
                window_size=window_size,
                drop_path_rate=drop_path_rate,
                layer_scale=layer_scale,
            )
        self.backbone = backbone
        if weights is not None:
            load_backbone(self.backbone, weights)
        if checkpointing:
            self.set_grad_checkpointing()
        # num_features is the width before a head's own layers (MobileNetV3), this is after them.
        width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        others = in_chans - 3
        mean = (*IMAGENET_DEFAULT_MEAN, *[_OTHER_MEAN] * others)
        std = (*IMAGENET_DEFAULT_STD, *[_OTHER_STD] * others)
        for name, values in (("mean", mean), ("std", std)):
            buffer = 255 * torch.tensor(values)[:, None, None]
            self.register_buffer(name, buffer, persistent=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them."""
        try:
            self.backbone.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):  # how timm's models say no
            raise _without_effect("checkpointing", self.model) from None

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer by the backbone's `group_matcher`; on top the projection.

        These are timm's layers of the backbone under a classifier: what the matcher does not know,
        such as a last norm, belongs to the top.

        Raises:
            UsageError: The model has no such groups.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise UsageError(f"optimizer.layer_decay has no effect on {self.model}; leave it out")
        top = "<projection>"  # no rule matches it
        named = [(name, None) for name, _ in self.backbone.named_parameters()] + [(top, None)]
        depths = group_with_matcher(iter(named), self.backbone.group_matcher(), reverse=True)
        projection = {"projection.weight": depths.pop(top)}
        return {f"backbone.{name}": depth for name, depth in depths.items()} | projection

    def forward(
        self, images: UInt8[Tensor, "batch channels *size"] | Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch embed_dim"]:
        """Return image features; bytes are normalised first, floats are taken as they are."""
        return self.projection(self.pool(images))

    def pool(
        self, images: UInt8[Tensor, "batch channels *size"] | Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch width"]:
        """Return the backbone's features, before the projection: what a linear probe looks at."""
        return self.backbone(self._normalised(images))

    def maps(
        self,
        images: UInt8[Tensor, "batch channels *size"] | Float[Tensor, "batch channels *size"],
        strides: Sequence[int],
    ) -> list[Float[Tensor, "batch _ *_"]]:
        """Return the backbone's maps of these strides, channels first; the last one normed.

        Raises:
            UsageError: The model has no such maps.
        """
        stages = [stage for stage, _ in self._stages(strides)]
        return self.backbone.forward_intermediates(
            self._normalised(images), indices=stages, norm=True, intermediates_only=True
        )

    def map_widths(self, strides: Sequence[int]) -> list[int]:
        """Return the channels of the maps of these strides.

        Raises:
            UsageError: The model has no such maps.
        """
        return [width for _, width in self._stages(strides)]

    def tokens(
        self, images: UInt8[Tensor, "batch channels *size"] | Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch places token_width"]:
        """Return the backbone's last map, normed, one token per place, row by row.

        Raises:
            UsageError: The model has no such map.
        """
        self._require_maps()
        (last,) = self.backbone.forward_intermediates(
            self._normalised(images), indices=1, norm=True, intermediates_only=True
        )
        return last.flatten(2).transpose(1, 2)

    @property
    def token_width(self) -> int:
        """Channels of the tokens.

        Raises:
            UsageError: The model has none.
        """
        self._require_maps()
        return self.backbone.feature_info[-1]["num_chs"]

    def _require_maps(self) -> None:
        has_info = bool(getattr(self.backbone, "feature_info", ()))
        if not has_info or not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(
                f"image_tower.model {self.model} gives no map of its image; take another, such as "
                "coswin_tiny"
            )

    def _stages(self, strides: Sequence[int]) -> list[tuple[int, int]]:
        """Return number and channels of the last stage of each stride."""
        infos = list(getattr(self.backbone, "feature_info", ()))
        found = {info["reduction"]: (stage, info["num_chs"]) for stage, info in enumerate(infos)}
        if not found.keys() >= set(strides) or not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(
                f"image_tower.model {self.model} has no maps of strides "
                f"{', '.join(map(str, strides))}; take a model of several stages, such as "
                "coswin_tiny"
            )
        return [found[stride] for stride in strides]

    def _normalised(self, images: Tensor) -> Tensor:
        """Return bytes as the backbone takes them; floats are taken as they are."""
        if images.is_floating_point():
            return images
        per_channel = (-1, *[1] * (images.ndim - 2))
        mean, std = self.mean.view(per_channel), self.std.view(per_channel)
        return images.to(self.mean.dtype).sub_(mean).div_(std)


def check_image_size(tower: nn.Module, size: int) -> None:
    """Try a size of input on tensors that have shapes, but neither memory nor values.

    Raises:
        UsageError: The tower cannot take square images of `size` pixels.
    """
    training = tower.training
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            channels = getattr(tower, "in_chans", 3)
            device = next(tower.parameters()).device
            tower.eval()(torch.zeros(1, channels, size, size, device=device))
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass  # What such a model does can be known by running it only.
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"image_tower.image_size {size} does not suit image_tower.model: {reason}"
        ) from error
    finally:
        tower.train(training)


def lock_tokenless(tower: ImageTower, size: int) -> None:
    """Keep what of a backbone its tokens do not depend on as it is, such as a head's layers.

    What has no gradient on one rank would keep all others waiting. Nothing is computed.
    """
    parameters = [p for p in tower.backbone.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = tower.projection.weight.device
        tokens = tower.tokens(torch.zeros(1, tower.in_chans, size, size, device=device))
        found = torch.autograd.grad(tokens.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load a backbone's weights, carried to its window and resolution where its family can do that.

    A classifier in the file is left out. Weights of a whole two-tower model give their image tower.

    Raises:
        UsageError: The file is not safetensors, cannot be read, or does not fit.
        UniclError: The file is damaged.
    """
    weights = read_safetensors(path, key="image_tower.weights")
    weights = backbone_weights(weights) or weights
    backbone.load_state_dict(carry_backbone(weights, backbone, source=path))


def backbone_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's part of the weights of a whole two-tower model."""
    return {k.removeprefix(BACKBONE): w for k, w in weights.items() if k.startswith(BACKBONE)}


def carry_backbone(
    weights: dict[str, Tensor], backbone: nn.Module, *, source: Path
) -> dict[str, Tensor]:
    """Return a backbone's weights in the names and shapes of `backbone`.

    Raises:
        UsageError: They are of another architecture; `source` is where they are from.
    """
    try:
        weights = _carry(weights, backbone)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"{source} does not fit image_tower.model: {error}") from error
    target = backbone.state_dict()
    odd = sorted(
        weights.keys() ^ target.keys()
        | {k for k in weights.keys() & target.keys() if weights[k].shape != target[k].shape}
    )
    if odd:
        what = "missing" if odd[0] not in weights else "unknown or of another shape"
        raise UsageError(
            f"{source} does not fit image_tower.model: {odd[0]} is {what} ({len(odd)} in all); "
            "give the model that the weights were trained as"
        )
    return weights


def _build_backbone(model: str, **settings: Any) -> nn.Module:
    if not timm.is_model(model):
        nearest = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "see timm.list_models()"
        raise UsageError(f"image_tower.model names no timm model: {model}; {hint}")
    chosen = {name for name in settings if name != "img_size" and settings[name]}
    settings = {name: value for name, value in settings.items() if value is not None}
    spelling = {name: [name] for name in settings} | {"layer_scale": list(_LAYER_SCALE)}
    while True:
        arguments = {spelling[name][0]: value for name, value in settings.items()}
        try:
            return timm.create_model(model, pretrained=False, num_classes=0, **arguments)
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            names = [n for n in settings if refused and spelling[n][0] == refused[1]]
            if not names:
                raise
        (name,) = names
        if len(spelling[name]) > 1:
            spelling[name].pop(0)
        elif name in chosen:
            raise _without_effect(name, model)
        else:
            del settings[name]


def _without_effect(setting: str, model: str) -> UsageError:
    return UsageError(f"image_tower.{setting} has no effect on {model}; leave it out")


def read_safetensors(path: Path, *, key: str) -> dict[str, Tensor]:
    """Read the weights that the recipe's `key` names.

    Raises:
        UsageError: The file is not safetensors, or cannot be read.
        UniclError: The file is damaged.
    """
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{key} must be a .safetensors file, got {path}; convert it where you "
            "trust it: safetensors.torch.save_file(torch.load(...), 'weights.safetensors')"
        )
    try:
        return load_file(path)
    except OSError as error:
        # safetensors raises some without the system's words for it.
        reason = error.strerror or ("no such file" if not path.exists() else str(error))
        raise UsageError(f"cannot read {key} {path}: {reason}") from error
    except SafetensorError as error:
        raise UniclError(f"{path} is damaged: {error}; fetch or write it again") from error


def _carry(weights: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    # What is added to RGB's embedding begins as nothing (Omnivore, Girdhar et al. 2022, adds an
    # embedding of depth); timm's rule would take weights from RGB and see colours in depth.
    if isinstance(backbone, cosswin.CoSwin):
        return cosswin.carry_weights(weights, backbone, more_channels="zero")
    weights = _with_more_channels(weights, backbone)
    # By timm's convention a family's module says how its weights are carried over.
    carry = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    weights = carry(weights, backbone) if carry else weights
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return {k: w for k, w in weights.items() if not k.startswith(tuple(f"{h}." for h in heads))}


def _with_more_channels(weights: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Give an RGB stem's kernel the further input channels of any timm model."""
    stem = backbone.pretrained_cfg.get("first_conv")
    conv = dict(backbone.named_modules()).get(stem)
    if not isinstance(conv, nn.Conv2d) or conv.in_channels <= 3:
        return weights
    name = f"{stem}.weight"
    return {
        key: adapt_channels(kernel, in_chans=conv.in_channels, more="zero")
        if f".{key}".endswith(f".{name}") and kernel.ndim == 4 and kernel.shape[1] == 3
        else kernel
        for key, kernel in weights.items()
    }
