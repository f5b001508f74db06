"""Runs of seconds on composed scenes: tiny towers, 64 pixels, one block, two steps."""

from pathlib import Path

from benchmarks.scenes import write_object_shards, write_scenes
from unicl.build import train
from unicl.config import Recipe, parse_recipe

TOWERS = {
    "name": "tiny",
    "embed_dim": "16",
    "data.num_workers": "0",
    "image_tower.model": "coswin_nano",
    "image_tower.image_size": "32",
    "image_tower.drop_path_rate": "0",
    "text_tower.width": "16",
    "text_tower.num_layers": "1",
    "text_tower.num_heads": "2",
    "text_tower.context_length": "16",
    "trainer.steps": "2",
    "trainer.batch_size": "4",
    "trainer.save_every": "1",
    "trainer.log_every": "1",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "schedule.warmup_steps": "1",
}
DETECTOR = {
    "task": "detection",
    "data.crop_scale": "1,1",
    "detection.width": "32",
    "detection.num_blocks": "1",
    "detection.num_levels": "3",
    "detection.min_sizes": "64",
    "detection.test_sizes": "64",
    "detection.max_size": "96",
    # What has learned next to nothing is sure of nothing.
    "detection.score_threshold": "0.001",
}
TINY = {**TOWERS, **DETECTOR}


def recipe_of(folder: Path, **overrides: str) -> Recipe:
    """Return a recipe of scenes; `detection__classes="numbers"` sets detection.classes."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return parse_recipe("", {**TOWERS, **DETECTOR, "data.train": str(folder / "scenes"), **given})


def write_runs(folder: Path) -> Path:
    """Write scenes, and train on them: towers, then texts, numbers and none from their weights."""
    write_scenes(folder / "scenes", num_train=8, num_valid=3, num_test=14)
    write_object_shards(folder / "objects", 12)
    objects = {**TOWERS, "data.train": str(folder / "objects"), "data.crop_scale": "0.9,1"}
    train(parse_recipe("", objects), folder / "towers")
    for classes in ("texts", "numbers", "none"):
        recipe = recipe_of(folder, weights=str(folder / "towers"), detection__classes=classes)
        train(recipe, folder / classes)
    return folder
