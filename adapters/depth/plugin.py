"""Depth as a plug-in of `unicl`: what the entry point `depth` names. Imports torch when asked."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from adapters.depth.config import DepthRecipe
from unicl.config import Recipe
from unicl.errors import UsageError


class DepthPlugin:
    """Training on class folders of images with depth, and evaluation; see `unicl.config.Plugin`."""

    name = "depth"
    recipe = DepthRecipe
    recipes = files("adapters.depth") / "recipes"
    evaluations = ("zero-shot", "linear-probe", "few-shot", "fine-tune")
    free_on_resume: frozenset[str] = frozenset()
    fine_tuning = {"classes": ("depth_classes", 10)}  # noqa: RUF012

    def complete(self, recipe: DepthRecipe) -> DepthRecipe:
        """Return the recipe: nothing in it follows from its data."""
        return recipe

    def build(self, recipe: DepthRecipe, ranks: Any, *, start: bool) -> Any:
        """Build what a recipe trains."""
        from adapters.depth.training import build

        return build(recipe, ranks, start=start)

    def load(self, path: Path, recipe: DepthRecipe) -> Any:
        """Load a run's model."""
        from adapters.depth.training import load

        return load(path, recipe)

    def adapt(self, model: Any, overrides: Mapping[str, str]) -> Any:
        """Let a model read images with depth, its own way unless overrides say another."""
        from adapters.depth.training import adapt

        return adapt(model, overrides)

    def holds(self, spec: str) -> bool:
        """Say whether a path leads to images with depth maps."""
        from adapters.depth.sets import has_depth

        return has_depth(Path(spec))

    def open_source(self, spec: str) -> Any:
        """Refuse to write shards, which have no place for a depth map.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"{spec} holds images with depth maps, which are trained on as they lie: "
            f"unicl train depth_classes --data.train {spec}"
        )

    def open_set(self, spec: str, *, split: str, root: Path, kind: Any) -> Any:
        """Open a class folder of images with depth maps."""
        from adapters.depth.sets import open_rgbd_folder

        if kind == "captions":
            raise UsageError(f"{spec} has classes, but captions are needed; choose another set")
        return open_rgbd_folder(Path(spec), split=split)

    def open_items(self, spec: str, *, split: str, root: Path) -> Any:
        """Open the same without asking for its classes."""
        return self.open_set(spec, split=split, root=root, kind=None)

    def follow(self, recipe: DepthRecipe, towers: Recipe) -> DepthRecipe:
        """Read depth maps as the run did that is fine-tuned, if it was of depth."""
        return replace(recipe, depth=towers.depth) if isinstance(towers, DepthRecipe) else recipe

    def picture(self, encoded: bytes) -> bytes | None:
        """Return the image of an image with depth; None for others."""
        from adapters.depth.rgbd import part
        from unicl.data.shards import SampleError

        try:
            return part(encoded)[0]
        except SampleError:
            return None


plugin = DepthPlugin()
