"""The sizes of CoSwin, registered with timm: `timm.create_model("coswin_tiny")`.

Florence gives only the total of the image tower, 637M; `coswin_huge` is the configuration with even
depths that has it.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from cosswin.model import CoSwin
from cosswin.resize import carry_weights

_HEADS = (3, 6, 12, 24)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": _HEADS}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": _HEADS}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_XLARGE = {"embed_dim": 256, "depths": (2, 2, 18, 2), "num_heads": (8, 16, 32, 64)}
_HUGE = {"embed_dim": 256, "depths": (2, 2, 24, 6), "num_heads": (8, 16, 32, 64)}
# The window that divides every map of 384-pixel images.
_HIRES = {"img_size": 384, "window_size": 12}


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **overrides,
    }


_HIRES_CFG = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "coswin_nano.untrained": _cfg(input_size=(3, 48, 48), pool_size=(2, 2), crop_pct=1.0),
        "coswin_tiny.untrained": _cfg(),
        "coswin_small.untrained": _cfg(),
        "coswin_base.untrained": _cfg(),
        "coswin_large.untrained": _cfg(),
        "coswin_xlarge.untrained": _cfg(),
        "coswin_huge.untrained": _cfg(),
        "coswin_tiny_window12_384.untrained": _cfg(**_HIRES_CFG),
        "coswin_small_window12_384.untrained": _cfg(**_HIRES_CFG),
        "coswin_base_window12_384.untrained": _cfg(**_HIRES_CFG),
        "coswin_large_window12_384.untrained": _cfg(**_HIRES_CFG),
        "coswin_xlarge_window12_384.untrained": _cfg(**_HIRES_CFG),
        "coswin_huge_window12_384.untrained": _cfg(**_HIRES_CFG),
    }
)


def _filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return carry_weights(state_dict, model)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    num_stages = len(kwargs["depths"])
    return build_model_with_cfg(
        CoSwin,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": tuple(range(num_stages)), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def coswin_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin for 48-pixel images: tests, and training on a CPU."""
    args = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 6}
    return _create("coswin_nano", pretrained, **{**args, "img_size": 48, **kwargs})


@register_model
def coswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-T: 29.5M parameters."""
    return _create("coswin_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def coswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-S: 50.8M parameters."""
    return _create("coswin_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def coswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-B: 90.2M parameters."""
    return _create("coswin_base", pretrained, **{**_BASE, **kwargs})


@register_model
def coswin_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-L: 202.8M parameters."""
    return _create("coswin_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def coswin_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-XL: 360.3M parameters."""
    return _create("coswin_xlarge", pretrained, **{**_XLARGE, **kwargs})


@register_model
def coswin_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-H: 637.4M parameters, the image tower of Florence."""
    return _create("coswin_huge", pretrained, **{**_HUGE, **kwargs})


@register_model
def coswin_tiny_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-T for 384-pixel images."""
    settings = {**_TINY, **_HIRES, **kwargs}
    return _create("coswin_tiny_window12_384", pretrained, **settings)


@register_model
def coswin_small_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-S for 384-pixel images."""
    settings = {**_SMALL, **_HIRES, **kwargs}
    return _create("coswin_small_window12_384", pretrained, **settings)


@register_model
def coswin_base_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-B for 384-pixel images."""
    settings = {**_BASE, **_HIRES, **kwargs}
    return _create("coswin_base_window12_384", pretrained, **settings)


@register_model
def coswin_large_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-L for 384-pixel images."""
    settings = {**_LARGE, **_HIRES, **kwargs}
    return _create("coswin_large_window12_384", pretrained, **settings)


@register_model
def coswin_xlarge_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-XL for 384-pixel images."""
    settings = {**_XLARGE, **_HIRES, **kwargs}
    return _create("coswin_xlarge_window12_384", pretrained, **settings)


@register_model
def coswin_huge_window12_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoSwin-H for 384-pixel images."""
    settings = {**_HUGE, **_HIRES, **kwargs}
    return _create("coswin_huge_window12_384", pretrained, **settings)
