"""Runs of seconds on composed clips: tiny towers, 32 pixels, 4 frames, two steps."""

from pathlib import Path

from benchmarks import motion
from unicl.build import train
from unicl.config import Recipe, parse_recipe

NUM_CLIPS = 12
TINY = {
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
    "trainer.batch_size": "6",
    "trainer.save_every": "1",
    "trainer.log_every": "1",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "schedule.warmup_steps": "1",
}
CLIPS = {"task": "video", "video.num_frames": "4"}


def write_corpus(folder: Path) -> Path:
    """Write class folders `classes`, and shards `clips` and `images`, each in train and test."""
    for seed, part in enumerate(("train", "test")):
        motion.write_class_folder(folder / "classes" / part, NUM_CLIPS, seed=seed)
        motion.write_clip_shards(folder / "clips" / part, NUM_CLIPS, seed=seed)
        motion.write_image_shards(folder / "images" / part, NUM_CLIPS, seed=seed)
    return folder


def image_recipe(corpus: Path, **overrides: str) -> Recipe:
    """Return a recipe of images; `data__train="..."` sets data.train."""
    return _recipe({**TINY, "data.train": str(corpus / "images/train")}, overrides)


def clip_recipe(corpus: Path, **overrides: str) -> Recipe:
    """Return a recipe of clips and their captions."""
    return _recipe({**TINY, **CLIPS, "data.train": str(corpus / "clips/train")}, overrides)


def head_recipe(corpus: Path, **overrides: str) -> Recipe:
    """Return a recipe of clips and a head for their motions."""
    own = {"data.train": str(corpus / "classes"), "video.targets": "classes"}
    return _recipe({**TINY, **CLIPS, **own}, overrides)


def write_runs(folder: Path) -> Path:
    """Train image, and from its weights texts, head and frames, beside their corpus."""
    write_corpus(folder)
    train(image_recipe(folder), folder / "image")
    weights = str(folder / "image")
    train(clip_recipe(folder, weights=weights), folder / "texts")
    train(clip_recipe(folder, weights=weights, video__tower="frames"), folder / "frames")
    train(head_recipe(folder, weights=weights), folder / "head")
    return folder


def _recipe(keys: dict[str, str], overrides: dict[str, str]) -> Recipe:
    return parse_recipe("", {**keys, **{k.replace("__", "."): v for k, v in overrides.items()}})
