"""A model by its name: a run, a checkpoint, an exported folder, open_clip's, UniCL's release."""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from unicl.config import PRETRAINING, Medium, Recipe, find_plugin, parse_recipe
from unicl.config.schema import ImageTowerConfig, TextTowerConfig
from unicl.data.augment import EvalTransform
from unicl.distributed import local_rank
from unicl.engine.checkpoint import (
    DamagedCheckpointError,
    checkpoints,
    load_state,
    load_weights,
    set_weights,
    verify_checkpoint,
)
from unicl.errors import UniclError, UsageError, no_model
from unicl.towers.image import ImageTower, read_safetensors
from unicl.towers.open_clip import CONFIG, LOCAL, absolute_name, load_open_clip
from unicl.towers.pretrained import Pretrained
from unicl.towers.text import TextTower, tokenize
from unicl.towers.two_tower import TwoTower, carry_model

logger = logging.getLogger("unicl")

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
Section = TypeVar("Section")

OPEN_CLIP = "open_clip:"
"""What the names of open_clip's models begin with."""

# How UniCL's released checkpoints are called.
_RELEASE = (".pth", ".pt")
# Settings of a tower that change how it learns, not what it computes.
_FOR_TRAINING = ("checkpointing", "drop_path_rate", "locked", "weights")


def build_model(recipe: Recipe, *, start: bool = True) -> TwoTower:
    """Build the two towers with fresh weights, drawn from torch's global generator.

    Args:
        recipe: the architecture, and the weights to start from.
        start: load those weights; others need not, if they load their own.

    Raises:
        UniclError: there are no such weights, or they do not fit.
    """
    if recipe.model is not None:
        model = _build_open_clip(recipe, recipe.model, start=start)
    else:
        model = build_towers(recipe, build_image_tower(recipe, start=start))
    return start_from(recipe, model) if start else with_locks(recipe, model)


def start_from(recipe: Recipe, model: TwoTower) -> TwoTower:
    """Load the whole model's weights that a recipe starts from, if it names any, and lock towers.

    Raises:
        UniclError: there are no such weights, or they do not fit.
    """
    if recipe.weights is not None:
        file, weights = read_weights(Path(recipe.weights))
        if recipe.model is None:
            weights = carry_model(weights, model, source=file)
        set_weights(weights, model, source=file)
    return with_locks(recipe, model)


def with_locks(recipe: Recipe, model: TwoTower) -> TwoTower:
    """Lock the towers that a recipe wants locked."""
    if recipe.image_tower.locked:
        model.lock("image")
    if recipe.text_tower.locked:
        model.lock("text")
    return model


def _build_open_clip(recipe: Recipe, name: str, *, start: bool) -> TwoTower:
    own_start = start and recipe.weights is None
    model = load_open_clip(name.removeprefix(OPEN_CLIP), weights=own_start).model
    towers: dict[str, Any] = {"image": model.image, "text": model.text}
    for tower, config in (("image", recipe.image_tower), ("text", recipe.text_tower)):
        if config.checkpointing:
            towers[tower].set_grad_checkpointing()
    return model


def build_image_tower(recipe: Recipe, *, start: bool = True, **besides: Any) -> ImageTower:
    """Build a recipe's image tower; `start` loads its own weights to start from.

    What an adapter builds it with besides, such as a backbone, goes to `ImageTower`.
    """
    image = recipe.image_tower
    return ImageTower(
        image.model,
        embed_dim=recipe.embed_dim,
        image_size=image.image_size,
        window_size=image.window_size,
        drop_path_rate=image.drop_path_rate,
        layer_scale=image.layer_scale,
        checkpointing=image.checkpointing,
        weights=Path(image.weights) if start and image.weights else None,
        **besides,
    )


def build_towers(recipe: Recipe, image_tower: ImageTower) -> TwoTower:
    """Build a recipe's text tower, and a model of it and an image tower."""
    return TwoTower(
        image_tower,
        TextTower(**text_settings(recipe)),
        initial_scale=recipe.loss.initial_scale,
        max_scale=recipe.loss.max_scale,
    )


def text_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe's text tower is built with."""
    settings = asdict(recipe.text_tower) | {"embed_dim": recipe.embed_dim}
    del settings["locked"]
    return settings


def complete(recipe: Recipe, loaded: Pretrained | None = None) -> Recipe:
    """Return a recipe that knows the sizes of the open_clip model that it names.

    A folder or file in the name becomes absolute: the recipe holds in any working directory.

    Args:
        recipe: the recipe.
        loaded: the model, where it is loaded already.

    Raises:
        UsageError: open_clip has no such model.
    """
    if recipe.model is None:
        return recipe
    name = lasting_name(recipe.model)
    found = _sizes(name) if loaded is None else _reading(loaded)
    return replace(
        recipe,
        model=name,
        embed_dim=found.embed_dim,
        image_tower=replace(recipe.image_tower, image_size=found.image_size),
        text_tower=replace(recipe.text_tower, context_length=found.context_length),
    )


@dataclass(frozen=True)
class _Reading:
    """How a model of open_clip reads images and texts."""

    tokenize: Callable[[Sequence[str]], torch.Tensor]
    transform: Callable[[Image.Image, int], torch.Tensor]
    image_size: int
    context_length: int
    embed_dim: int
    identity: str


@functools.cache  # of a folder what it held at first: who changes it starts another process
def _sizes(name: str) -> _Reading:
    return _reading(load_open_clip(name.removeprefix(OPEN_CLIP), weights=False))


def _reading(found: Pretrained) -> _Reading:
    tokens = found.tokenize(["a"]).to(found.model.logit_scale.device)
    with torch.no_grad():
        text = found.model.encode_text(tokens)
    return _Reading(
        found.tokenize,
        found.transform,
        found.image_size,
        found.context_length,
        text.shape[1],
        found.identity,
    )


def build_transform(recipe: Recipe) -> Callable[[Image.Image, int], torch.Tensor]:
    """Build what makes an opened image the image tower's input, in evaluation."""
    if recipe.model is not None:
        return _sizes(recipe.model).transform
    return EvalTransform(recipe.image_tower.image_size)


def build_tokenizer(recipe: Recipe) -> Callable[..., torch.Tensor]:
    """Build the function from texts to tokens of the text tower's context length."""
    if recipe.model is not None:
        return _sizes(recipe.model).tokenize
    return functools.partial(tokenize, context_length=recipe.text_tower.context_length)


_SHAPE_OF_IMAGE_TOWER = ("model", "image_size", "window_size", "layer_scale")
_SHAPE_OF_TEXT_TOWER = (
    *("width", "num_layers", "num_heads", "mlp_width", "context_length", "causal"),
    *("activation", "norm_eps"),
)


def with_towers_of(recipe: AnyRecipe, run: Recipe) -> AnyRecipe:
    """Return a recipe with the towers of another one, but for what it sets itself."""
    changed: dict[str, Any] = {
        "image_tower": like(recipe.image_tower, run.image_tower, _SHAPE_OF_IMAGE_TOWER),
        "text_tower": like(recipe.text_tower, run.text_tower, _SHAPE_OF_TEXT_TOWER),
    }
    if recipe.embed_dim == Recipe.embed_dim:
        changed["embed_dim"] = run.embed_dim
    return replace(recipe, **changed)


def like(config: Section, other: Section, names: Sequence[str]) -> Section:
    """Return a section whose keys of these names are another's where they are the defaults."""
    defaults = {item.name: item.default for item in fields(config)}  # type: ignore[arg-type]
    left = [name for name in names if getattr(config, name) == defaults[name]]
    return replace(config, **{name: getattr(other, name) for name in left})  # type: ignore[type-var]


def recipe_of_run(path: Path) -> Recipe:
    """Return the recipe of a run, given it or one of its checkpoints.

    Raises:
        UsageError: the folder is no run's, or its recipe says what none can.
        UniclError: it cannot be read.
    """
    return read_recipe(_run_of(path))


def choose_device(device: str) -> torch.device:
    """Turn "auto" into this rank's GPU where there is one; refuse a device that is not there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not num_gpus):
        return torch.device("cpu")
    if device in ("auto", "cuda"):
        device = f"cuda:{local_rank()}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        seen = f"only {num_gpus}" if num_gpus else "none"
        raise UsageError(f"device is {device}, but of GPUs torch sees {seen}; use cpu or auto")
    return chosen


def load(name: str | Path, *, device: str = "cpu") -> Pretrained:
    """Load a model by its name, with all that its use takes; nothing is unpickled.

    Args:
        name: a run's folder or one of its checkpoints, a folder that `unicl export` or open_clip
            wrote, `open_clip:NAME[/WEIGHTS]`, or a `.pth` file of UniCL's release.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: there is no such model or `device`, or its architecture is not supported.
        UniclError: the model is damaged.
    """
    chosen = choose_device(device)
    full = full_name(name)
    if full.startswith(OPEN_CLIP):
        pretrained = load_open_clip(full.removeprefix(OPEN_CLIP))
        pretrained = replace(pretrained, name=str(name))
    elif Path(name).suffix in _RELEASE:
        from unicl.towers.release import load_release

        pretrained = load_release(Path(name))
    else:
        pretrained = _load_own(Path(name))
    pretrained.model.to(chosen).eval()
    return pretrained


def load_for(
    medium: Medium | None,
    name: str | Path,
    *,
    device: str = "cpu",
    overrides: Mapping[str, str] | None = None,
) -> Pretrained:
    """Load a model as `load` does, and let it see a medium if one is given."""
    return let_see(medium, load(name, device=device), overrides or {})


def let_see(medium: Medium | None, model: Pretrained, overrides: Mapping[str, str]) -> Pretrained:
    """Let a model see a medium in its own way, but for the overrides.

    Raises:
        UsageError: the model sees another medium, or an override has no effect.
    """
    if medium is None:
        return model
    if model.medium not in ("", medium.name):
        raise UsageError(f"{model.name} was trained on {model.medium}, not on {medium.name}")
    adapted: Pretrained = medium.adapt(model, overrides)
    mark = ", ".join(f"{key}={value}" for key, value in sorted(overrides.items()))
    return replace(adapted, medium=medium.name, mark=mark)


def full_name(name: str | Path) -> str:
    """Return a model's name, that of a folder in open_clip's format with `open_clip:` before it.

    Raises:
        UsageError: there is no such file or folder.
    """
    path = Path(name)
    if str(name).startswith(OPEN_CLIP):
        return str(name)
    if not path.exists():
        raise no_model(str(name))
    is_own = path.suffix in _RELEASE or (_run_of(path) / "recipe.toml").is_file()
    return f"{OPEN_CLIP}{LOCAL}{name}" if not is_own and (path / CONFIG).is_file() else str(name)


def lasting_name(name: str | Path) -> str:
    """Return a model's name that means the same in any working directory: paths are absolute.

    Raises:
        UsageError: open_clip has no such model.
    """
    if str(name).startswith(OPEN_CLIP):
        return f"{OPEN_CLIP}{absolute_name(str(name).removeprefix(OPEN_CLIP))}"
    return str(Path(name).resolve())


def _load_own(path: Path) -> Pretrained:
    recipe = read_recipe(_run_of(path))
    if recipe.task != PRETRAINING:
        loaded: Pretrained = find_plugin(recipe.task).load(path, recipe)
        return loaded
    model, recipe = load_model(path)
    transform = build_transform(recipe)
    if recipe.model is not None:
        identity = _sizes(recipe.model).identity
    else:
        identity = identity_of(recipe, crop=getattr(transform, "crop", None))
    return Pretrained(
        name=str(path),
        model=model,
        tokenize=build_tokenizer(recipe),
        transform=transform,
        image_size=recipe.image_tower.image_size,
        context_length=recipe.text_tower.context_length,
        identity=identity,
    )


def identity_of(recipe: Recipe, **besides: Any) -> str:
    """Return what tells the embeddings of a recipe's towers from others, but for the weights."""
    architecture: dict[str, Any] = {
        tower: {k: v for k, v in asdict(config).items() if k not in _FOR_TRAINING}
        for tower, config in (("image", recipe.image_tower), ("text", recipe.text_tower))
    }
    return json.dumps({**besides, **architecture}, sort_keys=True)


def recipe_of(name: str | Path, loaded: Pretrained | None = None) -> Recipe:
    """Return the recipe whose towers are those of a model that is named as in `load`.

    Args:
        name: the model.
        loaded: the same, where it is loaded already.

    Raises:
        UsageError: there is no such model, or its towers cannot be built from a recipe.
        UniclError: it is damaged.
    """
    name = full_name(name)
    if name.startswith(OPEN_CLIP):
        return complete(Recipe(model=name), loaded)
    if Path(name).suffix not in _RELEASE:
        return read_recipe(_run_of(Path(name)))
    found = load(name) if loaded is None else loaded
    image, text = found.model.image, found.model.text
    assert isinstance(image, ImageTower)
    assert isinstance(text, TextTower)
    return Recipe(
        embed_dim=text.embed_dim,
        image_tower=ImageTowerConfig(model=image.model, image_size=found.image_size),
        text_tower=TextTowerConfig(
            width=text.token_embedding.embedding_dim,
            num_layers=len(text.blocks),
            num_heads=text.blocks[0].num_heads,  # type: ignore[arg-type]
            mlp_width=text.blocks[0].fc1.out_features,  # type: ignore[union-attr, arg-type]
            context_length=text.context_length,
            causal=text.causal,
            activation=text.activation,
            norm_eps=text.norm.eps,
        ),
    )


def load_model(path: str | Path) -> tuple[TwoTower, Recipe]:
    """Load the two towers of a run's best checkpoint, or of its newest if it kept no best.

    Nothing is unpickled.

    Args:
        path: the run's folder, or one checkpoint inside of it.

    Raises:
        UsageError: there is no such run or checkpoint.
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    path = Path(path)
    recipe = read_recipe(_run_of(path))
    if recipe.task != PRETRAINING:
        raise UsageError(f"{path} is a run of {recipe.task}, not of {PRETRAINING}")
    return load_run(path, build_model(recipe, start=False)), recipe


def load_run(path: Path, model: TwoTower) -> TwoTower:
    """Load a run's best or newest weights, or those of one of its checkpoints, into its model.

    Raises:
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    load_weights(_weights_of(path), model)
    return model.eval()


def read_weights(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Read the weights that a run, a checkpoint or a file has, and say from which file."""
    if path.suffix in _RELEASE:
        from unicl.towers.release import load_release

        return path, load_release(path).model.state_dict()
    if path.suffix != ".safetensors":
        if not path.is_dir():
            raise UsageError(
                f"weights names no run, checkpoint, .safetensors or UniCL's .pth file: {path}"
            )
        if full_name(path).startswith(OPEN_CLIP):
            raise UsageError(
                f"{path} is a whole model of open_clip; set model to {OPEN_CLIP}{path}, "
                "and no weights"
            )
        path = _weights_of(path)
    return path, read_safetensors(path, key="weights")


def _run_of(path: Path) -> Path:
    """Return the folder of the run, given it or one of its checkpoints."""
    inside = path.parent.name == "checkpoints" and not (path / "recipe.toml").is_file()
    return path.parent.parent if inside else path


def _weights_of(path: Path) -> Path:
    """Return the file with the weights of a run or checkpoint, once it is known to be whole.

    These are the averaged ones where the run keeps an average.
    """
    averages = read_recipe(_run_of(path)).optimizer.ema_decay is not None
    name = "ema.safetensors" if averages else "model.safetensors"
    if (path / name).is_file() and (path / "recipe.toml").is_file():
        return path / name  # an exported folder
    if _run_of(path) == path:
        path = _best_checkpoint(path, name)
    elif path.is_dir():
        verify_checkpoint(path, only=name)
    else:
        found = ", ".join(checkpoint.name for checkpoint in checkpoints(path.parent))
        raise UsageError(f"there is no checkpoint {path}; there is {found or 'none yet'}")
    return path / name


def _best_checkpoint(run: Path, file: str) -> Path:
    """Return a run's best checkpoint, or its newest, of those that have the file whole."""
    found = checkpoints(run / "checkpoints")
    if not found:
        raise UniclError(f"{run} has no checkpoint yet; train it a little longer")
    best = None
    with contextlib.suppress(DamagedCheckpointError):
        best = load_state(found[-1])["best"]
    wanted = f"step-{best[1]:08d}" if best else found[-1].name
    # Sorting is stable: after the wanted one the newest comes first.
    for path in sorted(reversed(found), key=lambda path: path.name != wanted):
        try:
            verify_checkpoint(path, only=file)
        except DamagedCheckpointError as error:
            logger.warning("%s; looking for another checkpoint", error)
        else:
            return path
    raise UniclError(f"no checkpoint of {run} is whole; train it again, with another --out")


def read_recipe(run: Path) -> Recipe:
    """Read the full configuration that a run's folder holds.

    Raises:
        UsageError: the folder is no run's, or its recipe says what none can.
        UniclError: it cannot be read.
    """
    path = run / "recipe.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        inside = sorted(run.glob("*/recipe.toml"))
        others = f"name a run, a folder that export wrote, or {OPEN_CLIP}NAME"
        hint = f"perhaps you mean {inside[0].parent}" if inside else others
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UniclError(f"cannot read {path}: {error.strerror}") from error
        raise UsageError(
            f"{run} is not a run: cannot read {path}: {error.strerror}; {hint}"
        ) from error
    except UnicodeDecodeError as error:
        raise UniclError(f"{path} is damaged: it is not UTF-8 text") from error
    return parse_recipe(text, source=str(path))
