"""Runs of seconds on composed scenes: tiny towers, 32 pixels, one layer of co-attention."""

from pathlib import Path

from benchmarks.quiz import write_captions, write_pairs, write_questions
from unicl.build import train
from unicl.config import Recipe, parse_recipe

TOWERS = {
    "name": "tiny",
    "embed_dim": "16",
    "data.num_workers": "0",
    "data.templates": "none",
    "data.crop_scale": "1,1",
    "image_tower.model": "coswin_nano",
    "image_tower.image_size": "32",
    "text_tower.width": "16",
    "text_tower.num_layers": "1",
    "text_tower.num_heads": "2",
    "text_tower.context_length": "24",
    "trainer.steps": "2",
    "trainer.batch_size": "4",
    "trainer.save_every": "1",
    "trainer.log_every": "1",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "schedule.warmup_steps": "1",
}
FUSION = {
    "task": "vqa",
    "vqa.width": "16",
    "vqa.num_layers": "2",
    "vqa.num_heads": "2",
    "vqa.dropout": "0",
    "vqa.max_text_length": "24",
}
DATA = {"pretraining": "pairs", "answers": "questions", "captions": "pairs"}


def recipe_of(folder: Path, objective: str, **overrides: str) -> Recipe:
    """Return a recipe of an objective; `vqa__width="32"` sets vqa.width."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    own = {"vqa.objective": objective, "data.train": str(folder / DATA[objective])}
    if objective == "pretraining" and "weights" not in given:
        own["vqa.negatives"] = "random"
    if objective == "answers":
        own["vqa.min_answer_count"] = "1"
    return parse_recipe("", {**TOWERS, **FUSION, **own, **given})


def write_data(folder: Path) -> Path:
    """Write pairs, questions and captions of a few scenes."""
    write_pairs(folder / "pairs", 12)
    write_questions(folder / "questions", num_train=6, num_val=3)
    write_captions(folder / "coco", num_train=6, num_val=3, num_test=4)
    return folder


def write_runs(folder: Path) -> Path:
    """Write data, and train on them: towers, and from their weights each objective."""
    write_data(folder)
    towers = {**TOWERS, "data.train": str(folder / "pairs")}
    train(parse_recipe("", towers), folder / "towers")
    for objective in DATA:
        recipe = recipe_of(folder, objective, weights=str(folder / "towers"))
        train(recipe, folder / objective)
    return folder
