"""Detection as a plug-in of `unicl`: what the entry point `detection` names.

Imports torch when asked.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from adapters.detection.config import READING, DetectionRecipe


class DetectionPlugin:
    """Training detectors, measuring them, and finding objects; see `unicl.config.Skill`."""

    name = "detection"
    recipe = DetectionRecipe
    recipes = files("adapters.detection") / "recipes"
    evaluations = ("map", "zero-shot", "few-shot", "fine-tune")
    free_on_resume = frozenset((*READING, "checkpointing")) - {"max_size"}

    def complete(self, recipe: DetectionRecipe) -> DetectionRecipe:
        """Name the classes, where the recipe leaves them to the data."""
        from adapters.detection.building import complete

        return complete(recipe)

    def build(self, recipe: DetectionRecipe, ranks: Any, *, start: bool) -> Any:
        """Build what a recipe trains."""
        from adapters.detection.building import build

        return build(recipe, ranks, start=start)

    def load(self, path: Path, recipe: DetectionRecipe) -> Any:
        """Load a run's detector."""
        from adapters.detection.pretrained import load

        return load(path, recipe)

    def evaluate(
        self,
        evaluation: str,
        model: str | Path,
        data: Sequence[str],
        options: Any,
        overrides: Mapping[str, str],
    ) -> Any:
        """Measure average precision: as trained, by names alone, or after training on a set."""
        from adapters.detection.evaluating import evaluate

        return evaluate(evaluation, model, data, options, overrides)

    def add_commands(self, commands: Any) -> None:
        """Add `unicl detect`."""
        from adapters.detection.command import add_detect

        add_detect(commands)

    def demonstrate(self, towers: Path, folder: Path, *, steps: int) -> Any:
        """Compare a detector on a run's towers with one on random towers."""
        from adapters.detection.demonstration import demonstrate

        return demonstrate(towers, folder, steps=steps)


plugin = DetectionPlugin()
