"""From a name to a model: find its configuration, build it, take its towers over."""

import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl.errors import UniclError, UsageError
from unicl.towers.open_clip.inputs import OpenClipTokenizer, PixelTransform
from unicl.towers.open_clip.messages import (
    creation_error,
    first_line,
    hub,
    hub_cache,
    no_download,
    quiet,
)
from unicl.towers.open_clip.names import CONFIG, HUB, LOCAL, has_scheme, parse_name
from unicl.towers.open_clip.towers import (
    OpenClipImageTower,
    OpenClipTextTower,
    own_text_tower,
)
from unicl.towers.pretrained import Pretrained
from unicl.towers.text import tokenize
from unicl.towers.two_tower import TwoTower

logger = logging.getLogger("unicl")

_CLIP_MAX_SCALE = 100.0
_SECONDS_TO_ANSWER = 10
# What published weights say of their preprocessing; the size is the architecture's.
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def load_open_clip(name: str, *, weights: bool = True) -> Pretrained:
    """Load a model of open_clip.

    The published weights' own activation is taken: `ViT-B-32/openai` has QuickGELU, as
    `ViT-B-32-quickgelu/openai` does, where open_clip warns and takes the architecture's. A file is
    taken with the architecture's.

    Args:
        name: `ARCHITECTURE`, which is random; `ARCHITECTURE/TAG` for published weights;
            `ARCHITECTURE/PATH` for a file, never unpickled; `FOLDER` or `local-dir:FOLDER` with an
            `open_clip_config.json`; `hf-hub:ORG/NAME`.
        weights: Load or download them; without, the model is random, for weights that follow.

    Raises:
        UsageError: There is no such architecture, tag or file, or the weights do not fit.
        UniclError: The weights are damaged, or cannot be downloaded.
    """
    architecture, source = parse_name(name, weights=weights)
    full_name = f"open_clip:{architecture if has_scheme(architecture) else name}"
    if weights and source is None and not has_scheme(architecture):
        logger.warning("%s has random weights; %s/TAG has trained ones", full_name, full_name)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        config = _config(architecture, full_name)
        model, config = _create(
            architecture, source, config, weights=weights, full_name=full_name, scratch=scratch
        )
    return _pretrained(model.eval(), config, architecture=architecture, full_name=full_name)


def _config(architecture: str, full_name: str) -> dict[str, Any]:
    """Return the whole configuration: `model_cfg`, and what there is of `preprocess_cfg`."""
    import open_clip

    if not has_scheme(architecture):
        return {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    if architecture.startswith(LOCAL):
        path = Path(architecture.removeprefix(LOCAL)) / CONFIG
    else:
        path = _download_config(architecture.removeprefix(HUB), full_name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UniclError(f"{path} is damaged: {first_line(error)}; fetch it again") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise UsageError(f"{path} is no configuration of open_clip: it lacks model_cfg")
    return {"preprocess_cfg": {}, **config}


def _announce_download(repository: str, full_name: str) -> None:
    """Say that something of a repository will be fetched, if nothing of it is here yet.

    Raises:
        UniclError: The hub does not answer. Its client would try again and again for a minute.
    """
    from huggingface_hub.utils import get_session

    if (Path(hub_cache()) / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir():
        return
    address = f"{hub()}/{repository}"
    logger.info("fetching %s from %s to %s", full_name, address, hub_cache())
    try:
        get_session().head(hub(), timeout=_SECONDS_TO_ANSWER)
    except Exception as error:  # the client's library, which has changed, raises its own
        raise no_download(full_name, address, hub_cache(), error) from error


def _download_config(repository: str, full_name: str) -> Path:
    from huggingface_hub import hf_hub_download

    _announce_download(repository, full_name)
    try:
        return Path(hf_hub_download(repository, CONFIG))
    except Exception as error:  # no network, no such repository, no access, ...
        raise no_download(full_name, f"{hub()}/{repository}", hub_cache(), error) from error


def _create(
    architecture: str,
    source: str | None,
    config: dict[str, Any],
    *,
    weights: bool,
    full_name: str,
    scratch: str,
) -> tuple[Any, dict[str, Any]]:
    """Build the model, and complete its configuration by what the published weights say."""
    import open_clip

    published = open_clip.get_pretrained_cfg(architecture, source) if source else {}
    model_config = config["model_cfg"]
    if published.get("quick_gelu") and not model_config.get("quick_gelu"):
        model_config["quick_gelu"] = True
    repository = published.get("hf_hub") or model_config["text_cfg"].get("hf_model_name", "")
    if architecture.startswith(HUB):
        repository = architecture.removeprefix(HUB)
    if architecture.startswith(HUB) and not weights:
        # open_clip would download the weights, even if it does not load them.
        (Path(scratch) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        architecture = f"{LOCAL}{scratch}"
    if weights and published.get("hf_hub"):
        _announce_download("/".join(published["hf_hub"].split("/")[:2]), full_name)
    trained = weights and (source is not None or has_scheme(architecture))
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=source if weights else None,
            load_weights=weights,
            force_custom_text=True,  # keeps the text tower a module of its own
            force_quick_gelu=bool(model_config.get("quick_gelu")),
            force_preprocess_cfg={k: v for k, v in published.items() if k in _PREPROCESS},
            pretrained_text=False,
            require_pretrained=trained,
        )
    except Exception as error:  # of open_clip, torch, safetensors and the network
        by_url = "url" in published and not published.get("hf_hub")
        raise creation_error(
            error,
            full_name=full_name,
            address=published["url"] if by_url else f"{hub()}/{repository}".rstrip("/"),
            cache="~/.cache/clip" if by_url else hub_cache(),
            local=architecture.startswith(LOCAL),
        ) from error
    return model, config


def _pretrained(
    model: Any, config: Mapping[str, Any], *, architecture: str, full_name: str
) -> Pretrained:
    from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
    from torchvision.transforms import Normalize

    preprocess = model.visual.preprocess_cfg
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise UsageError(f"{full_name} takes images of {size} pixels; only square ones are known")
    steps = image_transform_v2(PreprocessCfg(**preprocess), is_train=False).transforms
    text_config = config["model_cfg"]["text_cfg"]
    context_length = text_config.get("context_length", 77)
    own_tokens = not text_config.get("hf_tokenizer_name") and not text_config.get(
        "tokenizer_kwargs"
    )
    two_tower = TwoTower(
        OpenClipImageTower(
            model.visual, name=full_name, config=config["model_cfg"], preprocess=preprocess
        ),
        own_text_tower(model.text) or OpenClipTextTower(model.text, name=full_name),
        max_scale=_max_scale(model),
    )
    two_tower.logit_scale.data.copy_(model.logit_scale.detach().reshape(1))
    return Pretrained(
        name=full_name,
        model=two_tower.eval(),
        tokenize=functools.partial(tokenize, context_length=context_length)
        if own_tokens
        else OpenClipTokenizer(architecture),
        transform=PixelTransform(
            [step for step in steps if not isinstance(step, MaybeToTensor | Normalize)]
        ),
        image_size=sides.pop(),
        context_length=context_length,
        identity=json.dumps(
            {"open_clip": config["model_cfg"], "preprocess": preprocess}, sort_keys=True
        ),
    )


def _max_scale(model: Any) -> float:
    """Return a bound that leaves the model's own scale as it is.

    A sigmoid loss has no bound; known by its bias, so that it does not depend on the weights.
    """
    if model.logit_bias is not None:
        return float("inf")
    return max(_CLIP_MAX_SCALE, model.logit_scale.exp().item())
