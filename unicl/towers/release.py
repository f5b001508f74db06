"""The checkpoints that microsoft/UniCL released: a Swin and CLIP's text tower, as our two towers.

Layout and settings are those of that repository's configurations and model code: a width of 64 per
head, QuickGELU, norms with an eps of 1e-12, and images of 224 pixels out of 256.
"""

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from unicl.errors import UniclError, UsageError
from unicl.towers.image import ImageTower, carry_backbone
from unicl.towers.open_clip import PixelTransform
from unicl.towers.pretrained import Pretrained
from unicl.towers.text import VOCABULARY_SIZE, from_open_clip, tokenize
from unicl.towers.two_tower import TwoTower

# Names of the parts, in the order in which the release renamed them.
_IMAGE = ("image_encoder.", "visual.")
_TEXT = ("text_encoder.", "lang_encoder.", "text.")
_IMAGE_PROJECTION = ("image_projection", "vision_projection")
_TEXT_PROJECTION = ("text_projection", "lang_projection")

# By width, depths and window: timm's name, and the side of the images.
_SWINS: dict[tuple[int, tuple[int, ...], int], tuple[str, int]] = {
    (96, (2, 2, 6, 2), 7): ("swin_tiny_patch4_window7_224", 224),
    (96, (2, 2, 18, 2), 7): ("swin_small_patch4_window7_224", 224),
    (128, (2, 2, 18, 2), 7): ("swin_base_patch4_window7_224", 224),
    (128, (2, 2, 18, 2), 12): ("swin_base_patch4_window12_384", 384),
    (192, (2, 2, 18, 2), 7): ("swin_large_patch4_window7_224", 224),
    (192, (2, 2, 18, 2), 12): ("swin_large_patch4_window12_384", 384),
}
_SUPPORTED = "only Swin's tiny, small, base and large with window 7 or 12 are supported"

# Settings that the weights do not show.
_NORM_EPS = 1e-12
_CHANNELS_PER_HEAD = 64
_MAX_SCALE = 100.0


class _ConfigNode:
    """What stands in for the configuration's class, yacs.config.CfgNode: a plain dictionary."""

    def __new__(cls, *_: object) -> Any:
        """Return an empty dictionary, of a type that torch's reader lets entries be put into."""
        return OrderedDict()


def load_release(path: str | Path) -> Pretrained:
    """Load a released checkpoint of UniCL: a `.pth` file with `model` and `config`.

    Nothing of the file is executed. Texts are padded with 0 and the padding is hidden, as when the
    release was trained; a causal tower, which all released Swins have, never sees it.

    Raises:
        UsageError: There is no such file, it holds something else, or another architecture.
        UniclError: The file is damaged.
    """
    path = Path(path)
    weights, config = _read(path)
    image = _part(weights, _IMAGE, path)
    name, size = _swin(image, path)
    text = _part(weights, _TEXT, path)
    image_projection = _one(weights, _IMAGE_PROJECTION, path)
    text_projection = _one(weights, _TEXT_PROJECTION, path)
    if len(text.get("token_embedding.weight", ())) != VOCABULARY_SIZE:
        raise UsageError(f"{path} has a text tower with another tokenizer than CLIP's")
    causal = bool(_setting(config, "AUTOGRESSIVE", True))  # the release's spelling
    tower = ImageTower(name, embed_dim=image_projection.shape[1], image_size=size)
    tower.backbone.load_state_dict(carry_backbone(image, tower.backbone, source=path))
    tower.projection.weight.data.copy_(image_projection.T)
    width = text_projection.shape[0]
    scale = _one(weights, ("logit_scale",), path).reshape(1)
    model = TwoTower(
        tower,
        from_open_clip(
            {_open_clip_name(key): weight for key, weight in text.items()}
            | {"text_projection": text_projection},
            num_heads=width // _CHANNELS_PER_HEAD,
            causal=causal,
            activation="quick_gelu",
            norm_eps=_NORM_EPS,
        ),
        max_scale=max(_MAX_SCALE, scale.exp().item()),
    )
    model.logit_scale.data.copy_(scale)
    context_length = len(text["positional_embedding"])
    return Pretrained(
        name=str(path),
        model=model.eval(),
        tokenize=partial(tokenize, context_length=context_length),
        transform=_transform(size),
        image_size=size,
        context_length=context_length,
        identity=json.dumps({"unicl_release": name, "image_size": size, "causal": causal}),
    )


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read the weights and the configuration of a checkpoint, or of a file of weights alone."""
    try:
        with torch.serialization.safe_globals([(_ConfigNode, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        what = f": it needs {needed[1]}" if needed else ""
        raise UsageError(
            f"{path} holds more than weights and a configuration{what}; nothing of it is executed, "
            "save its ['model'] alone where you trust it"
        ) from error
    except (EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UniclError(f"{path} is damaged: {reason}; fetch it again") from error
    config = content.get("config") if isinstance(content, Mapping) else None
    weights = content.get("model", content) if isinstance(content, Mapping) else {}
    if not isinstance(weights, Mapping) or not all(isinstance(k, str) for k in weights):
        weights = {}
    return {
        key.removeprefix("module."): weight.float()
        for key, weight in weights.items()
        if isinstance(weight, Tensor)
    }, config


def _part(
    weights: Mapping[str, Tensor], prefixes: tuple[str, ...], path: Path
) -> dict[str, Tensor]:
    for prefix in prefixes:
        part = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        if part:
            return part
    raise _not_released(path, f"{prefixes[0]}*")


def _one(weights: Mapping[str, Tensor], names: tuple[str, ...], path: Path) -> Tensor:
    for name in names:
        if name in weights:
            return weights[name]
    raise _not_released(path, names[0])


def _not_released(path: Path, lacking: str) -> UsageError:
    return UsageError(f"{path} is no checkpoint of UniCL's release: it lacks {lacking}")


def _swin(weights: Mapping[str, Tensor], path: Path) -> tuple[str, int]:
    """Return timm's name of a Swin and the side of its images, from the shapes of its weights.

    Raises:
        UsageError: It is another architecture, or a Swin of another size.
    """
    tables = {
        (int(found[1]), int(found[2])): table
        for key, table in weights.items()
        if (
            found := re.fullmatch(
                r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", key
            )
        )
    }
    patches = weights.get("patch_embed.proj.weight", torch.empty(0)).shape
    if not tables or tuple(patches[1:]) != (3, 4, 4):
        raise UsageError(f"{path} has {_family(weights)} as image tower; {_SUPPORTED}")
    stages = [stage for stage, _ in tables]
    depths = tuple(stages.count(stage) for stage in range(max(stages) + 1))
    window = (round(len(tables[0, 0]) ** 0.5) + 1) // 2
    if (patches[0], depths, window) not in _SWINS:
        raise UsageError(
            f"{path} has a Swin of width {patches[0]}, depths {'-'.join(map(str, depths))} and "
            f"window {window} as image tower; {_SUPPORTED}"
        )
    return _SWINS[patches[0], depths, window]


def _family(weights: Mapping[str, Tensor]) -> str:
    """Name an architecture by what only it has."""
    signs = {
        ".modulation.": "a FocalNet",
        ".channel_block.": "a DaViT",
        ".attn.pool_layers.": "a Focal Transformer",
        ".attn.relative_position_bias_table_to_neighbors": "a Focal Transformer",
        ".downsample.proj.": "a CoSwin",
    }
    for sign, family in signs.items():
        if any(sign in key for key in weights):
            return family
    return f"an unknown architecture ({next(iter(weights))}, ...)"


def _setting(config: Any, name: str, default: Any) -> Any:
    """Return the setting of that name, wherever in the tree it is."""
    if not isinstance(config, Mapping):
        return default
    if name in config:
        return config[name]
    found = (_setting(branch, name, None) for branch in config.values())
    return next((value for value in found if value is not None), default)


def _open_clip_name(key: str) -> str:
    return f"transformer.{key}" if key.startswith("resblocks.") else key


def _transform(size: int) -> PixelTransform:
    resize = Resize(int(256 / 224 * size), InterpolationMode.BICUBIC)
    return PixelTransform([_rgb, resize, CenterCrop(size)])


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
