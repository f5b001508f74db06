"""open_clip's format: a folder that `open_clip.create_model_and_transforms` loads."""

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import cosswin
from unicl.data.tensors import write_tensors
from unicl.errors import UniclError, UsageError
from unicl.export.card import Card, render
from unicl.export.folder import new_folder
from unicl.towers.image import ImageTower
from unicl.towers.open_clip import CONFIG, OpenClipImageTower, OpenClipTextTower, quiet
from unicl.towers.text import TextTower, to_open_clip, tokenize
from unicl.towers.two_tower import TwoTower

_WEIGHTS = "open_clip_model.safetensors"
_TOLERANCE = 1e-4
_TEXTS = ("a photo of a cat", "two dogs")

_USAGE = """
import open_clip
{imports}
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
"""
_BY_NAME = """By name:

```python
open_clip.add_model_config("{name}/{name}.json")
model, _, preprocess = open_clip.create_model_and_transforms(
    "{name}",
    pretrained="{name}/{weights}",
    image_mean={mean},
    image_std={std},
)
```"""
_COSSWIN = """The image tower is a CoSwin, which open_clip does not bring along: `import cosswin`,
of the package `unicl`, registers it with timm."""
_CROP = """open_clip's preprocessing takes the whole middle square of an image. Where these weights
were evaluated with a margin cut away, figures differ a little; embeddings of equal pixels do
not. It also takes pixels as they are stored: a photo whose EXIF tag rotates it, or one of 16 bits
per colour, has to be turned or brought to 8 bits before."""


def export_open_clip(
    model: TwoTower, folder: Path, *, image_size: int, card: Card | None = None
) -> Path:
    """Write a folder that open_clip loads, and compare what it gives there.

    The folder has `open_clip_config.json`, `open_clip_model.safetensors`, the model's configuration
    for `open_clip.add_model_config`, and a card. A CoSwin's LayerScale, which open_clip has no
    setting for, becomes part of the weights that it multiplies.

    Args:
        model: The two towers; it is not changed.
        folder: Where to; it must not be there yet, or be empty. Its name is the model's.
        image_size: Side of the images in pixels.
        card: What the model card says; unset takes the folder's name and nothing else.

    Raises:
        UsageError: open_clip cannot express a tower, or the folder is not empty.
        UniclError: The folder cannot be written, or open_clip gives other embeddings; nothing is
            left behind.
    """
    card = card or Card(name=folder.name)
    # On the CPU, in fp32 and in eval mode, whatever the caller is about to do with his.
    model = copy.deepcopy(model).cpu().float().eval()
    if isinstance(model.image, OpenClipImageTower):
        config, preprocess = _their_config(model.image), model.image.preprocess
    else:
        config, preprocess = _own_config(model, image_size), _own_preprocess(model, image_size)
    weights = _their_weights(model)
    with new_folder(folder) as partial:
        content = {"model_cfg": config, "preprocess_cfg": preprocess}
        (partial / CONFIG).write_text(json.dumps(content, indent=2), encoding="utf-8")
        named = partial / f"{folder.name}.json"
        named.write_text(json.dumps(config, indent=2), encoding="utf-8")
        _check_shapes(config, weights)
        write_tensors(partial / _WEIGHTS, weights, metadata={"format": "pt"})
        _compare(model, partial, image_size=image_size)
        text = _card_text(card, model, folder.name, preprocess)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return folder


def has_coswin(model: TwoTower) -> bool:
    """Whether open_clip can build the image tower only after `import cosswin`."""
    return any(isinstance(module, cosswin.CoSwin) for module in model.image.modules())


def _own_config(model: TwoTower, image_size: int) -> dict[str, Any]:
    image, text = model.image, model.text
    if not isinstance(image, ImageTower) or not isinstance(text, TextTower):
        raise UsageError(
            f"open_clip cannot express the towers {type(image).__name__} and {type(text).__name__}"
        )
    if not text.causal:
        raise UsageError(
            "open_clip cannot express a bidirectional text tower: its configuration has no setting "
            "that hides the padding; export to onnx or safetensors instead"
        )
    block: Any = text.blocks[0]
    width, mlp_width = text.token_embedding.embedding_dim, block.fc1.out_features
    text_config = {
        "context_length": text.context_length,
        "vocab_size": text.token_embedding.num_embeddings,
        "width": width,
        "heads": block.num_heads,
        "layers": len(text.blocks),
        # open_clip cuts width * mlp_ratio to a whole number, which rounding must not change.
        "mlp_ratio": mlp_width / width if mlp_width % width == 0 else (mlp_width + 0.5) / width,
        "norm_kwargs": {"eps": text.norm.eps},
    }
    vision_config = {
        "timm_model_name": _timm_name(image),
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": image_size,
    }
    return {
        "embed_dim": text.embed_dim,
        "vision_cfg": vision_config,
        "text_cfg": text_config,
        # timm's models keep their own activation.
        "quick_gelu": text.activation == "quick_gelu",
        "custom_text": True,
    }


def _timm_name(image: ImageTower) -> str:
    """Return the name by which timm builds the tower, a CoSwin's window included."""
    windows = {
        module.window_size
        for module in image.backbone.modules()
        if isinstance(module, cosswin.WindowAttention)
    }
    hires = f"{image.model}_window12_384"
    return hires if windows == {(12, 12)} and timm.is_model(hires) else image.model


def _own_preprocess(model: TwoTower, image_size: int) -> dict[str, Any]:
    image: Any = model.image
    statistics = {
        name: [round(value, 6) for value in (getattr(image, name).flatten() / 255).tolist()]
        for name in ("mean", "std")
    }
    return {"size": [image_size, image_size], "interpolation": "bicubic", **statistics}


def _their_config(image: OpenClipImageTower) -> dict[str, Any]:
    """Return the configuration that a model of open_clip came with, less what was not taken."""
    config = copy.deepcopy(image.config)
    if config["text_cfg"].get("hf_tokenizer_name"):
        raise UsageError(
            f"{image.name} has a tokenizer that open_clip looks for beside the model, and that is "
            "not ours to copy; export to safetensors instead"
        )
    for part in ("multimodal_cfg", "init_logit_bias"):
        config.pop(part, None)
    for part in ("vision_cfg", "text_cfg"):
        config[part].pop("output_tokens", None)
    return {**config, "custom_text": True}


def _their_weights(model: TwoTower) -> dict[str, Tensor]:
    """Return all weights under open_clip's names."""
    image: Any = model.image
    text: Any = model.text
    weights = {"logit_scale": model.logit_scale.detach()[0]}
    if isinstance(image, OpenClipImageTower):
        weights |= {f"visual.{name}": w for name, w in image.open_clip_state().items()}
    else:
        weights |= {f"visual.trunk.{name}": w for name, w in _trunk(image).items()}
        weights["visual.head.proj.weight"] = image.projection.weight.detach()
    if isinstance(text, OpenClipTextTower):
        weights |= {f"text.{name}": w for name, w in text.text.state_dict().items()}
    else:
        weights |= {f"text.{name}": w for name, w in to_open_clip(text).items()}
    return {name: weight.contiguous() for name, weight in weights.items()}


def _trunk(image: ImageTower) -> dict[str, Tensor]:
    """Return the backbone's weights, a CoSwin's LayerScale folded into what it multiplies."""
    weights = image.backbone.state_dict()
    if isinstance(image.backbone, cosswin.CoSwin):
        for name, module in image.backbone.named_modules():
            if isinstance(module, cosswin.Block) and module.gamma is not None:
                gamma = weights.pop(f"{name}.gamma")
                for last in (f"{name}.attn.proj", f"{name}.mlp.fc2"):
                    weights[f"{last}.weight"] = weights[f"{last}.weight"] * gamma[:, None]
                    weights[f"{last}.bias"] = weights[f"{last}.bias"] * gamma
    return weights


def _check_shapes(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Compare the weights with what open_clip builds: it passes few settings on to timm."""
    from open_clip.model import CustomTextCLIP

    settings = {name: value for name, value in config.items() if name != "custom_text"}
    with torch.device("meta"):
        theirs = CustomTextCLIP(**settings).state_dict()
    ours = {name: weight.shape for name, weight in weights.items()}
    for name in [*theirs, *ours]:
        expected = tuple(theirs[name].shape) if name in theirs else "none"
        got = tuple(ours[name]) if name in ours else "none"
        if expected != got:
            model = config["vision_cfg"].get("timm_model_name", "the model")
            raise UsageError(
                f"open_clip builds {model} by its name alone, with {name} of shape {expected}; "
                f"these weights have {got}; export to onnx or safetensors instead"
            )


def _compare(model: TwoTower, folder: Path, *, image_size: int) -> None:
    """Load the folder as open_clip does, and compare tokens and embeddings."""
    import open_clip

    text: Any = model.text
    with quiet(), torch.no_grad():
        theirs = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(_TEXTS))
        images = torch.rand(2, 3, image_size, image_size)
        pairs = {
            "images": (model.encode_image(images), theirs.encode_image(images)),
            "texts": (model.encode_text(tokens), theirs.encode_text(tokens)),
        }
    if isinstance(text, TextTower) and not torch.equal(
        tokens, tokenize(_TEXTS, text.context_length)
    ):
        raise UniclError("open_clip's tokens of this model differ; nothing was exported")
    for what, (ours, embeddings) in pairs.items():
        difference = (ours - F.normalize(embeddings, dim=-1)).abs().max().item()
        if not difference < _TOLERANCE:
            raise UniclError(
                f"open_clip's embeddings of {what} differ by {difference:.2g}; nothing was exported"
            )


def _card_text(card: Card, model: TwoTower, name: str, preprocess: dict[str, Any]) -> str:
    own = has_coswin(model)
    by_name = _BY_NAME.format(
        name=name, weights=_WEIGHTS, mean=preprocess["mean"], std=preprocess["std"]
    )
    return render(
        card,
        library="open_clip",
        usage=_USAGE.format(
            name=name, imports="import cosswin  # brings the image tower\n" if own else ""
        ),
        notes=[
            by_name,
            *([_COSSWIN] if own else []),
            *([_CROP] if isinstance(model.image, ImageTower) else []),
        ],
    )
