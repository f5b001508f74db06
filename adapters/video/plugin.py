"""Video as a plug-in of `unicl`: what the entry point `video` names. Imports torch when asked."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from adapters.video.config import OF_MODEL, VideoRecipe
from unicl.config import Recipe
from unicl.errors import UsageError

# Of fine-tuning a whole model by class prompts (Florence 3.3).
_RATE_OF_CLIP = 2e-5


class VideoPlugin:
    """Training on videos, and evaluation and search over them; see `unicl.config.Plugin`."""

    name = "video"
    recipe = VideoRecipe
    recipes = files("adapters.video") / "recipes"
    evaluations = (
        *("zero-shot", "linear-probe", "few-shot", "retrieval", "fine-tune"),
        "recognition",
    )
    free_on_resume = frozenset(("num_clips", "num_crops"))
    fine_tuning = {"classes": ("video_classes", 30), "captions": ("video_captions", 5)}  # noqa: RUF012

    def complete(self, recipe: VideoRecipe) -> VideoRecipe:
        """Name the classes of the head, where the recipe leaves them to the data."""
        from adapters.video.building import complete

        return complete(recipe)

    def build(self, recipe: VideoRecipe, ranks: Any, *, start: bool) -> Any:
        """Build what a recipe trains."""
        from adapters.video.building import build

        return build(recipe, ranks, start=start)

    def load(self, path: Path, recipe: VideoRecipe) -> Any:
        """Load a run's model."""
        from adapters.video.pretrained import load

        return load(path, recipe)

    def adapt(self, model: Any, overrides: Mapping[str, str]) -> Any:
        """Let a model see videos, its own way unless overrides say another."""
        from adapters.video.pretrained import adapt

        return adapt(model, overrides)

    def holds(self, spec: str) -> bool:
        """Say whether a path leads to videos."""
        from adapters.video.files import holds_videos

        return holds_videos(spec)

    def open_source(self, spec: str) -> Any:
        """Open a set of videos to write shards of it."""
        from adapters.video.source import open_video_source

        return open_video_source(spec)

    def open_set(self, spec: str, *, split: str, root: Path, kind: Any) -> Any:
        """Open a set of videos with classes or captions."""
        from adapters.video.sets import open_video_set

        return open_video_set(spec, split=split, root=root, kind=kind)

    def open_items(self, spec: str, *, split: str, root: Path) -> Any:
        """Open a set, or any folder of videos."""
        from adapters.video.sets import open_videos

        return open_videos(spec, split=split, root=root)

    def follow(self, recipe: VideoRecipe, towers: Recipe) -> VideoRecipe:
        """Take the clips and the tower of a run on videos; inflate a CoSwin, average others.

        Raises:
            UsageError: Texts are to be learned, and the run has a head in place of a text tower.
        """
        video = recipe.video
        if isinstance(towers, VideoRecipe):
            if video.targets == "texts" and towers.video.targets == "classes":
                raise UsageError(
                    "a run with a classification head has no text tower, which captions need; "
                    "start from another model"
                )
            kept: Any = {name: getattr(towers.video, name) for name in OF_MODEL}
            video = replace(video, **kept)
        if towers.model is not None:  # of open_clip; its towers take no head and have no layers
            of_frames: Any = {"tower": "frames", "targets": "texts", "dropout": 0.0}
            rates = replace(
                recipe.optimizer,
                layer_decay=1.0,
                learning_rate=min(recipe.optimizer.learning_rate, _RATE_OF_CLIP),
            )
            return replace(recipe, optimizer=rates, video=replace(video, **of_frames))
        if isinstance(towers, VideoRecipe):
            return replace(recipe, video=video)
        is_coswin = towers.image_tower.model.startswith("coswin")
        tower: Any = "3d" if is_coswin else "frames"
        return replace(recipe, video=replace(recipe.video, tower=tower))

    def picture(self, encoded: bytes) -> bytes | None:
        """Return a video's key frame as an image file; None for what is no video."""
        from adapters.video.files import video_type

        if video_type(encoded) is None:
            return None
        from adapters.video.decoding import key_frame  # needs PyAV, which images do without

        return key_frame(encoded)

    def demonstrate(self, towers: Path, folder: Path, *, steps: int) -> Any:
        """Compare 3D-CoSwin on a run's towers, inflated, with one on random towers."""
        from adapters.video.demonstration import demonstrate

        return demonstrate(towers, folder, steps=steps)


plugin = VideoPlugin()
