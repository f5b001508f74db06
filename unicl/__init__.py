"""Florence-style pretraining: CoSwin and text towers under the UniCL loss, on labels from texts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unicl.build import train as train
    from unicl.config import Recipe as Recipe
    from unicl.config import load_recipe as load_recipe
    from unicl.evaluator import evaluate as evaluate
    from unicl.loss import unicl_loss as unicl_loss
    from unicl.predictor import Predictor as Predictor

__version__ = "0.1.0"

__all__ = ["Predictor", "Recipe", "evaluate", "load_recipe", "train", "unicl_loss"]

# Imported on first use, so that `import unicl` and `unicl --help` answer without torch.
_HOMES = {
    "Predictor": "unicl.predictor",
    "Recipe": "unicl.config",
    "evaluate": "unicl.evaluator",
    "load_recipe": "unicl.config",
    "train": "unicl.build",
    "unicl_loss": "unicl.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unicl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
