"""Our own format: weights and recipe, which any place that takes a model takes, and a card."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from unicl.data.tensors import write_tensors
from unicl.errors import UniclError
from unicl.export.card import Card, render
from unicl.export.folder import new_folder
from unicl.towers.two_tower import TwoTower

_WEIGHTS = "model.safetensors"

_USAGE = """
import unicl

predictor = unicl.Predictor.load("{folder}")  # this folder
predictor.classify(["photo.jpg"], ["cat", "dog"])
"""


def export_safetensors(
    model: TwoTower, folder: Path, *, recipe: str, card: Card | None = None
) -> Path:
    """Write `model.safetensors`, `recipe.toml` and `README.md`, and compare every bit of weights.

    Args:
        model: The two towers.
        folder: Where to; it must not be there yet, or be empty.
        recipe: The full recipe that the towers are built from, as TOML.
        card: What the model card says; unset takes the folder's name and nothing else.

    Raises:
        UsageError: The folder is not empty.
        UniclError: It cannot be written, or other weights come back; nothing is left behind.
    """
    card = card or Card(name=folder.name)
    with new_folder(folder) as partial:
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        write_tensors(partial / _WEIGHTS, weights, metadata={"format": "pt"})
        _compare(weights, partial / _WEIGHTS)
        (partial / "recipe.toml").write_text(recipe, encoding="utf-8")
        text = render(card, library="unicl", usage=_USAGE.format(folder=folder.name))
        (partial / "README.md").write_text(text, encoding="utf-8")
    return folder


def _compare(weights: Mapping[str, Tensor], path: Path) -> None:
    written = load_file(path)
    wrong = sorted(weights.keys() ^ written.keys()) or [
        name for name, weight in weights.items() if not _same_bits(weight, written[name])
    ]
    if wrong:
        raise UniclError(f"{wrong[0]} comes back otherwise than it was; nothing was exported")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # As bytes, so that a NaN equals itself.
    return torch.equal(*(tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (one, other)))
