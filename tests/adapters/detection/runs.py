"""Detectors of seconds on composed scenes: tiny towers, 64 pixels, two steps."""

from pathlib import Path

from benchmarks.scenes import write_scenes
from unicl.build import train
from unicl.config import parse_recipe

TINY = {
    "name": "tiny",
    "task": "detection",
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
    "detection.width": "16",
    "detection.num_blocks": "1",
    "detection.num_levels": "3",
    "detection.min_sizes": "64",
    "detection.test_sizes": "64",
    "detection.max_size": "96",
    # What has learned next to nothing is sure of nothing.
    "detection.score_threshold": "0.001",
}


def write_runs(folder: Path) -> Path:
    """Train texts, numbers, and from the weights of texts none, beside their scenes."""
    scenes = write_scenes(folder / "scenes", num_train=8, num_valid=3, num_test=14)
    own = {**TINY, "data.train": str(scenes)}
    train(parse_recipe("", own), folder / "texts")
    train(parse_recipe("", {**own, "detection.classes": "numbers"}), folder / "numbers")
    proposing = {"detection.classes": "none", "weights": str(folder / "texts")}
    train(parse_recipe("", {**own, **proposing}), folder / "none")
    return folder
