"""`unicl export`: a model by its name, taken elsewhere."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unicl.config import PRETRAINING, Recipe, recipe_to_toml
from unicl.errors import UsageError
from unicl.evaluation.results import read_results
from unicl.evaluator import results_folder
from unicl.export import FORMATS
from unicl.export.card import Card
from unicl.export.folder import require_new
from unicl.export.hub import push_to_hub, require_pushable
from unicl.export.onnx import export_onnx
from unicl.export.open_clip import export_open_clip, has_coswin
from unicl.export.safetensors import export_safetensors
from unicl.models import OPEN_CLIP, load, recipe_of
from unicl.towers.open_clip import LOCAL, OpenClipTokenizer, parse_name
from unicl.towers.two_tower import TwoTower

logger = logging.getLogger("unicl")


def export(
    model: str | Path,
    out: Path,
    *,
    to: str,
    license: str = "other",
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write a model in another format, compared with the original; perhaps upload it.

    Compared are the embeddings that come out of open_clip's and ONNX's, and every bit of the
    weights of safetensors.

    Args:
        model: what `unicl.models.load` takes.
        out: folder to write; it must not be there yet, or be empty.
        to: open_clip, onnx or safetensors.
        license: a hub's identifier of the licence of the weights, such as apache-2.0.
        push: a hub's repository to upload the folder to, `ORGANISATION/NAME`.
        private: only you can see a repository that is created.

    Raises:
        UsageError: there is no such model or format, or the format cannot express it.
        UniclError: the export gives other embeddings or weights, or cannot be written or uploaded.
    """
    if to not in FORMATS:
        raise UsageError(f"there is no format {to!r}: choose from {', '.join(FORMATS)}")
    require_new(out)
    if push is not None:
        require_pushable(push)
    loaded = load(model)
    recipe = recipe_of(model, loaded)
    if to != "safetensors" and recipe.task != PRETRAINING:
        raise UsageError(
            f"{model} is a run of {recipe.task}, which {to} cannot express; export it with "
            "--format safetensors"
        )
    if to == "safetensors" and (folder := _folder_of_open_clip(recipe)):
        raise UsageError(
            f"{model} is built from the folder {folder}, which a safetensors export would need "
            "wherever it goes; export it with --format open_clip"
        )
    card = Card(
        name=out.name,
        license=license,
        description=recipe.description,
        trained_on=recipe.data.train,
        metrics=_metrics(model),
    )
    size = loaded.image_size
    if to == "open_clip":
        export_open_clip(loaded.model, out, image_size=size, card=card)
    elif to == "onnx":
        own = loaded.tokenize
        export_onnx(
            loaded.model,
            out,
            image_size=size,
            context_length=loaded.context_length,
            crop=getattr(loaded.transform, "crop", 1.0),
            tokenizer=own.name if isinstance(own, OpenClipTokenizer) else None,
            card=card,
        )
    else:
        # What the weights were started from and averaged of is behind them.
        final = replace(
            recipe,
            model=recipe.model and recipe.model.partition("//")[0],  # a file's path is absolute
            weights=None,
            image_tower=replace(recipe.image_tower, weights=None, locked=False),
            text_tower=replace(recipe.text_tower, locked=False),
            optimizer=replace(recipe.optimizer, ema_decay=None),
        )
        export_safetensors(loaded.model, out, recipe=recipe_to_toml(final), card=card)
    logger.info("exported %s to %s (%s)", model, out, to)
    if push is not None:
        logger.info("uploaded: %s", push_to_hub(out, push, private=private))
    logger.info("%s", _how_to_use(out, to, loaded.model))
    return out


def _folder_of_open_clip(recipe: Recipe) -> str:
    """Return the folder in open_clip's format that the towers are built from, or nothing."""
    if recipe.model is None:
        return ""
    place, _ = parse_name(recipe.model.removeprefix(OPEN_CLIP), weights=False)
    return place.removeprefix(LOCAL) if place.startswith(LOCAL) else ""


def _how_to_use(out: Path, to: str, model: TwoTower) -> str:
    if to == "onnx":
        return f"{out / 'README.md'} shows its use with onnxruntime"
    here = f"name it {out} wherever unicl takes a model"
    if to == "safetensors":
        return here
    first = "import cosswin; " if has_coswin(model) else ""
    return f'{here}; in open_clip: {first}open_clip.create_model_and_transforms("local-dir:{out}")'


def _metrics(model: str | Path) -> Mapping[str, float]:
    """What `unicl eval` has measured of it, for the card."""
    return {
        f"{result.task} {result.name}: {result.headline}": result.metrics[result.headline]
        for result in read_results(results_folder(model))
    }
