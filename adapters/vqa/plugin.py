"""Question answering as a plug-in of `unicl`: what the entry point `vqa` names.

Imports torch when asked.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from adapters.vqa.config import READING, VqaRecipe


class VqaPlugin:
    """Co-attention: pretraining it, questions, captions, re-ranking; see `unicl.config.Skill`."""

    name = "vqa"
    recipe = VqaRecipe
    recipes = files("adapters.vqa") / "recipes"
    evaluations = ("accuracy", "captions", "rerank")
    free_on_resume = frozenset((*READING, "checkpointing"))

    def complete(self, recipe: VqaRecipe) -> VqaRecipe:
        """Take towers of the run to start from, and answers of the data."""
        from adapters.vqa.building import complete

        return complete(recipe)

    def build(self, recipe: VqaRecipe, ranks: Any, *, start: bool) -> Any:
        """Build what a recipe trains."""
        from adapters.vqa.building import build

        return build(recipe, ranks, start=start)

    def load(self, path: Path, recipe: VqaRecipe) -> Any:
        """Load a run's model."""
        from adapters.vqa.pretrained import load

        return load(path, recipe)

    def evaluate(
        self,
        evaluation: str,
        model: str | Path,
        data: Sequence[str],
        options: Any,
        overrides: Mapping[str, str],
    ) -> Any:
        """Measure answers, captions, or retrieval whose candidates are looked at again."""
        from adapters.vqa.evaluating import evaluate

        return evaluate(evaluation, model, data, options, overrides)

    def add_commands(self, commands: Any) -> None:
        """Add `unicl answer` and `unicl caption`."""
        from adapters.vqa.command import add_answer, add_caption

        add_answer(commands)
        add_caption(commands)

    def demonstrate(self, towers: Path, folder: Path, *, steps: int) -> Any:
        """Compare co-attention on a run's towers with the same on random towers."""
        from adapters.vqa.demonstration import demonstrate

        return demonstrate(towers, folder, steps=steps)


plugin = VqaPlugin()
