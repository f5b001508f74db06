"""Does a detector learn names, and find objects that it knows by name only?

The scenes of `benchmarks.scenes`: four of the 24 combinations of colour and shape are in no
training image, neither of the towers nor of the detectors.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import unicl
from adapters.detection.measuring import build_loaders, find_all
from adapters.detection.metrics import agnostic, coco_metrics
from adapters.detection.pretrained import Detect, overridden
from adapters.detection.sets import DetectionSet, open_detection_set
from benchmarks import scenes
from benchmarks.record import Bar, Result
from unicl.config import parse_recipe
from unicl.engine.metrics import read_metrics
from unicl.models import load
from unicl.towers.pretrained import Pretrained

_TOWERS = {
    "embed_dim": "64",
    "image_tower.model": "coswin_nano",
    "image_tower.image_size": "48",
    "text_tower.width": "64",
    "text_tower.num_layers": "2",
    "text_tower.num_heads": "2",
    "text_tower.context_length": "16",
}
_TRAINING = {
    "data.templates": "none",
    "data.num_workers": "0",
    "optimizer.weight_decay": "0.05",
    "schedule.warmup_steps": "50",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
}
_DETECTOR = {
    "task": "detection",
    "detection.width": "48",
    "detection.num_blocks": "1",
    "detection.num_levels": "4",
    "detection.anchor_scale": "4",
    "data.crop_scale": "1.0,1.0",
    "data.flip": "true",
    "trainer.batch_size": "8",
}


def measure(*, quick: bool) -> Result:
    """Train towers, a detector by name, and class-agnostic proposals; look for the unseen.

    One process of as many threads as torch is told; about ten minutes on 2 cores.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 2 if quick else 1000
        towers = _train_towers(folder, 48 if quick else 4000, 2 if quick else 1200)
        composed = _write(folder, scenes.COMPOSED, quick=quick)
        seen, mixed = (_open(composed, split) for split in ("val", "test"))
        named = _train(composed, folder / "named", towers, scenes.SIDE, steps)
        found = {
            "seen names": _measured(named, seen),
            "all names, mixed images": _measured(named, mixed),
            "held-out names, mixed images": _measured(named, mixed, scenes.COMPOSED.held_out),
            "names shuffled": _measured(named, _open(folder / "shuffled", "test")),
        }
        proposals = _train(
            composed,
            folder / "proposals",
            towers,
            scenes.SIDE,
            steps,
            {"detection.classes": "none"},
        )
        recall = _measured(proposals, mixed, by_name=False)["ar100"]
        rules = {
            rule: {
                part: _measured(proposals, mixed, names, {"detection.regions": rule})
                for part, names in (
                    ("all names", scenes.COMPOSED.names),
                    ("held-out names", scenes.COMPOSED.held_out),
                )
            }
            for rule in ("crop", "pool")
        }
        curve = _curve(folder / "named")
    held_out = rules["crop"]["held-out names"]
    return Result(
        bars=[
            _share("AP, seen names, 1,000 steps", found["seen names"]["ap"], 0.7),
            _share("AP50, seen names, 1,000 steps", found["seen names"]["ap50"], 0.9),
            _share(
                "AP50, images of seen and held-out names, among all",
                found["all names, mixed images"]["ap50"],
                0.8,
            ),
            _share("AP50, names shuffled", found["names shuffled"]["ap50"], 0.1, "at most"),
            _share("AR@100 of class-agnostic proposals", recall, None),
            _share("AP50, zero-shot, held-out names, cut out", held_out["ap50"], 0.5),
        ],
        tables={
            "Detection by name": [{"names": k, **_figures(v)} for k, v in found.items()],
            "Zero-shot detection, by what the towers see of a proposal": [
                {"regions": rule, "names": part, **_figures(metrics)}
                for rule, parts in rules.items()
                for part, metrics in parts.items()
            ],
            "Seen names by steps": curve,
        },
        facts={"held_out": list(scenes.COMPOSED.held_out), "steps": steps},
    )


def _train_towers(folder: Path, num_images: int, steps: int) -> Path:
    scenes.write_object_shards(folder / "objects", num_images, seed=1)
    keys = {
        **_TOWERS,
        **_TRAINING,
        "data.train": str(folder / "objects"),
        "trainer.batch_size": "64",
        "optimizer.learning_rate": "2e-3",
        "trainer.steps": str(steps),
    }
    return unicl.train(parse_recipe("", keys), folder / "towers").path


def _write(folder: Path, world: scenes.World, *, quick: bool) -> Path:
    sizes = {"num_train": 8, "num_valid": 4, "num_test": 4} if quick else _SIZES
    scenes.write_scenes(folder / world.name, world, **sizes, seed=0)
    if world is scenes.COMPOSED:
        wrong = {**sizes, "num_train": 1, "num_valid": 1}
        scenes.write_scenes(folder / "shuffled", world, **wrong, seed=0, shuffled_names=True)
    return folder / world.name


_SIZES = {"num_train": 4000, "num_valid": 200, "num_test": 200}


def _train(
    data: Path,
    run: Path,
    towers: Path,
    side: int,
    steps: int,
    settings: Mapping[str, str] | None = None,
) -> Pretrained:
    keys = {
        **_TOWERS,
        **_TRAINING,
        **_DETECTOR,
        "detection.min_sizes": str(side),
        "detection.max_size": str(side),
        "detection.test_sizes": str(side),
        "data.train": str(data),
        "evaluation.data": str(data),
        "optimizer.learning_rate": "1e-3",
        "trainer.steps": str(steps),
        "trainer.eval_every": "250",
        "weights": str(towers),
        **(settings or {}),
    }
    return load(unicl.train(parse_recipe("", keys), run).path)


def _open(folder: Path, split: str) -> DetectionSet:
    return open_detection_set(str(folder), split=split, root=folder)


def _measured(
    model: Pretrained,
    images: DetectionSet,
    of: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    by_name: bool = True,
) -> dict[str, float]:
    """Look for all names of a set, and compare the objects of some of them, or of all."""
    detect = model.skills["detect"]
    assert isinstance(detect, Detect)
    config = overridden(detect.config, overrides or {})
    finder = detect.finder(images.class_names if by_name else None, config=config)
    loaders = build_loaders(images, config, batch_size=256, num_workers=0)
    results = find_all(finder, images, loaders).results
    truth = images.truth()
    if not by_name:
        truth = agnostic(truth)
    if of is not None:
        kept = {each["id"] for each in truth["categories"] if each["name"] in of}
        results = [each for each in results if each["category_id"] in kept]
        truth = _only(truth, kept)
    return coco_metrics(truth, results)


def _only(truth: dict[str, Any], kept: set[int]) -> dict[str, Any]:
    return {
        **truth,
        "categories": [each for each in truth["categories"] if each["id"] in kept],
        "annotations": [each for each in truth["annotations"] if each["category_id"] in kept],
    }


def _curve(run: Path) -> list[dict[str, float]]:
    return [
        {"step": int(row["step"]), **{k: row[f"detection/{k}"] for k in ("ap", "ap50", "ap75")}}
        for row in read_metrics(run / "metrics.jsonl")
        if "detection/ap" in row
    ]


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("ap", "ap50", "ap75", "ar100")}


def _share(what: str, measured: float, limit: float | None, better: Any = "at least") -> Bar:
    return Bar(what, 100 * measured, None if limit is None else 100 * limit, "%", better)
