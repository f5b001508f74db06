"""Our own format: weights and recipe, which any place that takes a model takes, and a card."""

from pathlib import Path

from safetensors.torch import save_file

from unicl.export.card import Card, render
from unicl.export.folder import new_folder
from unicl.towers.two_tower import TwoTower

_USAGE = """
import unicl

predictor = unicl.Predictor.load("{folder}")  # this folder
predictor.classify(["photo.jpg"], ["cat", "dog"])
"""


def export_safetensors(
    model: TwoTower, folder: Path, *, recipe: str, card: Card | None = None
) -> Path:
    """Write `model.safetensors`, `recipe.toml` and `README.md`.

    Args:
        model: The two towers.
        folder: Where to; it must not be there yet, or be empty.
        recipe: The full recipe that the towers are built from, as TOML.
        card: What the model card says; unset takes the folder's name and nothing else.

    Raises:
        UsageError: The folder is not empty.
        UniclError: It cannot be written; nothing is left behind.
    """
    card = card or Card(name=folder.name)
    with new_folder(folder) as partial:
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "recipe.toml").write_text(recipe, encoding="utf-8")
        text = render(card, library="unicl", usage=_USAGE.format(folder=folder.name))
        (partial / "README.md").write_text(text, encoding="utf-8")
    return folder
