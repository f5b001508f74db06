"""Any model of open_clip as our two towers: an architecture, its published weights, or a file."""

import difflib
import functools
import json
import logging
import pickle
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from unicl.errors import UniclError, UsageError
from unicl.towers.pretrained import Pretrained
from unicl.towers.text import Activation, TextTower, from_open_clip, tokenize
from unicl.towers.two_tower import TwoTower

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer

logger = logging.getLogger("unicl")

CONFIG = "open_clip_config.json"
"""The file that makes a folder one of open_clip's."""

LOCAL = "local-dir:"
"""What the name of a folder in its format begins with."""

_HUB = "hf-hub:"
_CLIP_MAX_SCALE = 100.0
_SECONDS_TO_ANSWER = 10
# Levels of loggers belong to all threads: each has to find them as they were.
_ONE_AT_A_TIME = threading.RLock()
# What open_clip says when it cannot download.
_DOWNLOAD_FAILED = (
    *("Failed to download", "Failed initial", "Required pretrained weights"),
    "couldn't connect",  # transformers, for the configuration of its text towers
)
# What published weights say of their preprocessing; the size is the architecture's.
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class OpenClipImageTower(nn.Module):
    """Images into image features by open_clip's own image tower.

    Its last projection becomes a module of its own, where it is not part of the pooling.

    Args:
        visual: The image tower of an open_clip model, which is taken over.
        name: What the model is called, for the errors.
        config: The model's configuration in open_clip's words, and with it the text tower's.
        preprocess: Its preprocessing in open_clip's words; bytes are normalised by its mean and
            standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        *,
        name: str,
        config: Mapping[str, Any],
        preprocess: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.projection = _take_projection(visual)
        self.visual: Any = visual
        self.name = name
        self.config = dict(config)
        self.preprocess = dict(preprocess)
        for statistic in ("mean", "std"):
            buffer = 255 * torch.tensor(preprocess[statistic])[:, None, None]
            self.register_buffer(statistic, buffer, persistent=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them.

        Raises:
            UsageError: The model cannot do that.
        """
        # open_clip's wrapper of timm's models turns their refusal into a log line, and its ResNets
        # do nothing at all.
        model = getattr(self.visual, "trunk", self.visual)
        able = hasattr(self.visual, "trunk") or hasattr(self.visual, "transformer")
        try:
            if not able:
                raise AttributeError
            model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):
            raise UsageError(
                f"image_tower.checkpointing has no effect on {self.name}; leave it out"
            ) from None

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer: by timm's groups, or by those that open_clip locks.

        Raises:
            UsageError: The model has no such groups.
        """
        trunk: Any = getattr(self.visual, "trunk", None)
        names = [name for name, _ in self.named_parameters()]
        if hasattr(trunk, "group_matcher"):
            within = [name.removeprefix("visual.trunk.") for name in names if ".trunk." in name]
            top = "<head>"  # no rule matches it
            named = iter([(name, None) for name in (*within, top)])
            depths = group_with_matcher(named, trunk.group_matcher(), reverse=True)
            head = depths.pop(top)
            return {name: depths.get(name.removeprefix("visual.trunk."), head) for name in names}
        if not hasattr(self.visual, "transformer"):
            raise UsageError(f"optimizer.layer_decay has no effect on {self.name}; leave it out")
        bottom = ("conv1.", "class_embedding", "positional_embedding", "ln_pre.")
        return _block_depths(names, "visual.", bottom=bottom, last=("ln_post.",))

    def forward(
        self, images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch embed_dim"]:
        """Return image features; bytes are normalised first, floats are taken as they are."""
        return self.projection(self.pool(images))

    def pool(
        self, images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch width"]:
        """Return the features before the projection: what a linear probe looks at."""
        if not images.is_floating_point():
            images = images.to(self.mean.dtype).sub_(self.mean).div_(self.std)
        return _pooled(self.visual(images))

    def open_clip_state(self) -> dict[str, Tensor]:
        """Return the weights under the names of the tower that was taken over."""
        weights = self.visual.state_dict()
        if isinstance(self.projection, nn.Linear):
            return weights | {"proj": self.projection.weight.detach().T}
        return weights | {f"head.{name}": w for name, w in self.projection.state_dict().items()}


class OpenClipTextTower(nn.Module):
    """Tokens into text features by open_clip's own text tower, where ours does not equal it.

    Args:
        text: The text tower of an open_clip model, projection included.
        name: What the model is called, for the errors.
    """

    trims = False
    """Padding counts: some pool the last position, some have another token at the end."""

    def __init__(self, text: nn.Module, *, name: str) -> None:
        super().__init__()
        self.text: Any = text
        self.name = name

    @property
    def tokenizer(self) -> str:
        """What `open_clip.get_tokenizer` takes for the tower's tokenizer."""
        name = self.name.removeprefix("open_clip:")
        return name if _has_scheme(name) else name.partition("/")[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them."""
        self.text.set_grad_checkpointing(enable)

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer: embeddings, blocks, and on top norm and projection.

        Raises:
            UsageError: The tower is not open_clip's own, so its blocks are not known.
        """
        names = [name for name, _ in self.named_parameters()]
        if not any(name.startswith("text.transformer.resblocks.") for name in names):
            raise UsageError(f"optimizer.layer_decay has no effect on {self.name}; leave it out")
        bottom = ("token_embedding.", "positional_embedding", "cls_emb")
        return _block_depths(names, "text.", bottom=bottom)

    def forward(self, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts embed_dim"]:
        """Return text features."""
        return _pooled(self.text(tokens))


class PixelTransform:
    """An image into bytes, by steps that take and return PIL images; can be pickled.

    Args:
        steps: What is done to the image; the last step's result is square and RGB.
    """

    def __init__(self, steps: Sequence[Callable[[Image.Image], Image.Image]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image, seed: int = 0) -> UInt8[Tensor, "3 size size"]:
        """Carry out the steps; the seed has no effect.

        Raises:
            OSError: Pillow cannot decode the image.
        """
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # bad files make Pillow raise all sorts
            raise OSError(str(error) or type(error).__name__) from error
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class OpenClipTokenizer:
    """A model's own tokenizer, which may have to be downloaded, once texts are there.

    Args:
        name: The model in open_clip's words.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        """Turn texts into padded token numbers.

        Raises:
            UniclError: The tokenizer cannot be loaded or downloaded.
        """
        return self._tokenizer(list(texts))

    def __getstate__(self) -> dict[str, str]:
        """Leave the tokenizer out: each process loads its own."""
        return {"name": self.name}

    @functools.cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        import open_clip

        try:
            with quiet():
                return open_clip.get_tokenizer(self.name)
        except Exception as error:  # transformers and its downloads raise all sorts
            raise UniclError(
                f"cannot load the tokenizer of {self.name}: {_reason(error)}; it comes from "
                f"{_hub()} and is kept in {_hub_cache()}"
            ) from error


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
    architecture, source = _parse(name, weights=weights)
    full_name = f"open_clip:{architecture if _has_scheme(architecture) else name}"
    if weights and source is None and not _has_scheme(architecture):
        logger.warning("%s has random weights; %s/TAG has trained ones", full_name, full_name)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        config = _config(architecture, full_name)
        model, config = _create(
            architecture, source, config, weights=weights, full_name=full_name, scratch=scratch
        )
    return _pretrained(model.eval(), config, architecture=architecture, full_name=full_name)


def _parse(name: str, *, weights: bool) -> tuple[str, str | None]:
    """Split a name into architecture, or scheme and place, and the tag or file of its weights.

    A file whose weights are not needed may be gone.

    Raises:
        UsageError: There is no such architecture, tag, file or folder.
    """
    import open_clip

    if name.startswith(_HUB):
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", name.removeprefix(_HUB)):
            raise UsageError(f"open_clip:{name} must be open_clip:{_HUB}ORG/NAME")
        return name, None
    if name.startswith(LOCAL):
        path = Path(name.removeprefix(LOCAL)) / CONFIG
        if not path.is_file():
            raise UsageError(f"open_clip:{name}: there is no {path}; name a folder that has one")
        return name, None
    architecture, _, source = name.partition("/")
    models = open_clip.list_models()
    if architecture not in models and Path(name).is_dir():
        return _parse(f"{LOCAL}{name}", weights=weights)
    if architecture not in models:
        nearest = _nearest(architecture, models, "see open_clip.list_models()")
        raise UsageError(f"open_clip has no architecture {architecture!r}; {nearest}")
    if not source:
        return architecture, None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    tag = source.lower().replace("-", "_")  # as open_clip spells them
    if tag in tags:
        return architecture, tag
    is_path = "/" in source or bool(Path(source).suffix)
    if Path(source).is_file() or (is_path and not weights):
        return architecture, source
    if is_path:
        raise UsageError(f"open_clip:{name}: there is no file {source}; give one, or a tag")
    nearest = _nearest(tag, tags, f"it has {', '.join(tags) or 'none'}")
    raise UsageError(f"open_clip has no weights {source!r} of {architecture}; {nearest}")


def _nearest(word: str, words: Sequence[str], otherwise: str) -> str:
    found = difflib.get_close_matches(word, words, n=3, cutoff=0.4)
    return f"did you mean {', '.join(found)}?" if found else otherwise


def _has_scheme(architecture: str) -> bool:
    return architecture.startswith((_HUB, LOCAL))


def _config(architecture: str, full_name: str) -> dict[str, Any]:
    """Return the whole configuration: `model_cfg`, and what there is of `preprocess_cfg`."""
    import open_clip

    if not _has_scheme(architecture):
        return {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    if architecture.startswith(LOCAL):
        path = Path(architecture.removeprefix(LOCAL)) / CONFIG
    else:
        path = _download_config(architecture.removeprefix(_HUB), full_name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UniclError(f"{path} is damaged: {_reason(error)}; fetch it again") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise UsageError(f"{path} is no configuration of open_clip: it lacks model_cfg")
    return {"preprocess_cfg": {}, **config}


def _announce_download(repository: str, full_name: str) -> None:
    """Say that something of a repository will be fetched, if nothing of it is here yet.

    Raises:
        UniclError: The hub does not answer. Its client would try again and again for a minute.
    """
    from huggingface_hub.utils import get_session

    if (Path(_hub_cache()) / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir():
        return
    address = f"{_hub()}/{repository}"
    logger.info("fetching %s from %s to %s", full_name, address, _hub_cache())
    try:
        get_session().head(_hub(), timeout=_SECONDS_TO_ANSWER)
    except Exception as error:  # the client's library, which has changed, raises its own
        raise _no_download(full_name, address, _hub_cache(), error) from error


def _download_config(repository: str, full_name: str) -> Path:
    from huggingface_hub import hf_hub_download

    _announce_download(repository, full_name)
    try:
        return Path(hf_hub_download(repository, CONFIG))
    except Exception as error:  # no network, no such repository, no access, ...
        raise _no_download(full_name, f"{_hub()}/{repository}", _hub_cache(), error) from error


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
    if architecture.startswith(_HUB):
        repository = architecture.removeprefix(_HUB)
    if architecture.startswith(_HUB) and not weights:
        # open_clip would download the weights, even if it does not load them.
        (Path(scratch) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        architecture = f"{LOCAL}{scratch}"
    if weights and published.get("hf_hub"):
        _announce_download("/".join(published["hf_hub"].split("/")[:2]), full_name)
    trained = weights and (source is not None or _has_scheme(architecture))
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
        raise _creation_error(
            error,
            full_name=full_name,
            address=published["url"] if by_url else f"{_hub()}/{repository}".rstrip("/"),
            cache="~/.cache/clip" if by_url else _hub_cache(),
            local=architecture.startswith(LOCAL),
        ) from error
    return model, config


def _creation_error(
    error: Exception, *, full_name: str, address: str, cache: str, local: bool
) -> UniclError:
    """Say in one line why open_clip could not build a model."""
    reason = _reason(error)
    if "Required pretrained weights" in reason and local:
        return UsageError(
            f"{full_name}: the folder has no weights; add open_clip_model.safetensors"
        )
    if reason.startswith("Error(s) in loading state_dict"):
        missing = str(error).strip().splitlines()[1].strip()
        return UsageError(f"{full_name}: the weights are of another architecture: {missing[:200]}")
    if isinstance(error, pickle.UnpicklingError):
        return UsageError(
            f"{full_name}: the file holds more than weights, and is not executed; convert it where "
            "you trust it: safetensors.torch.save_file(weights, 'weights.safetensors')"
        )
    if isinstance(error, SafetensorError | EOFError):
        return UniclError(f"{full_name}: the weights are damaged: {reason}; fetch them again")
    if any(sign in reason for sign in _DOWNLOAD_FAILED):
        return _no_download(full_name, address, cache, error)
    return UsageError(f"open_clip cannot build {full_name}: {reason}")


def _no_download(full_name: str, address: str, cache: str, error: Exception) -> UniclError:
    return UniclError(
        f"cannot download {full_name} from {address} to {cache}: {_reason(error)}; fetch it where "
        "there is a network and copy it there, or name a file: open_clip:ARCHITECTURE/PATH"
    )


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
        _own_text_tower(model.text) or OpenClipTextTower(model.text, name=full_name),
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


def _own_text_tower(text: nn.Module) -> TextTower | None:
    """Build ours, which is faster, with the weights of a text tower that is CLIP's causal one."""
    from open_clip.transformer import TextTransformer

    if not isinstance(text, TextTransformer) or not (activation := _plain_activation(text)):
        return None
    return from_open_clip(
        text.state_dict(),
        num_heads=text.heads,
        activation=activation,
        norm_eps=text.ln_final.eps,
    )


def _plain_activation(text: "TextTransformer") -> Activation | None:
    """Return the activation of a text tower that has nothing which ours has not."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    blocks: list[Any] = list(text.transformer.resblocks)
    plain = (
        text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type == "argmax"
        and isinstance(text.text_projection, nn.Parameter)
        and all(type(block) is ResidualAttentionBlock for block in blocks)
        and all(isinstance(block.ls_1, nn.Identity) for block in blocks)
    )
    kinds = {(type(block.mlp.gelu), getattr(block.mlp.gelu, "approximate", "")) for block in blocks}
    if not plain or len(kinds) != 1:
        return None
    known: dict[Any, Activation] = {(nn.GELU, "none"): "gelu", (QuickGELU, ""): "quick_gelu"}
    return known.get(kinds.pop())


def _block_depths(
    names: Sequence[str], prefix: str, *, bottom: tuple[str, ...], last: tuple[str, ...] = ()
) -> dict[str, int]:
    """Number the parameters of a transformer of open_clip: bottom 0, blocks from 1 on, rest top.

    `last` belongs to the last block.
    """
    blocks = f"{prefix}transformer.resblocks."
    number = {
        name: int(name[len(blocks) :].split(".")[0]) for name in names if name.startswith(blocks)
    }
    top = max(number.values()) + 2
    depths = {}
    for name in names:
        within = name.removeprefix(prefix)
        if name in number:
            depths[name] = number[name] + 1
        else:
            depths[name] = 0 if within.startswith(bottom) else top - within.startswith(last or "\n")
    return depths


def _take_projection(visual: Any) -> nn.Module:
    """Take the last projection out of an image tower; nothing where it is part of its pooling."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        weight, visual.proj = visual.proj.detach().T.contiguous(), None
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        projection.weight.data = weight
        return projection
    if hasattr(visual, "trunk") and not hasattr(visual.head, "pool"):
        projection, visual.head = visual.head, nn.Identity()
        return projection
    return nn.Identity()


def _pooled(output: Any) -> Tensor:
    # Towers that also feed a decoder (CoCa) return their tokens, too.
    return output[0] if isinstance(output, tuple) else output


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's talk out of the log, each step to the root logger, and the hub's of retries.

    The handler also keeps open_clip from installing one of its own, for good.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    with _ONE_AT_A_TIME:
        levels = {logger: logger.level for logger in (root, logging.getLogger("huggingface_hub"))}
        root.addHandler(handler)
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            root.removeHandler(handler)
