"""What a pair of towers is worth to a detector: emoji in scenes, found by their names."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from adapters.detection.drawing import draw
from adapters.detection.writing import write_part
from unicl.adapting import curves, train_both
from unicl.data.augment import open_image
from unicl.data.emoji_scenes import EMOJI, Scene, encode, make_generator, paint_emoji
from unicl.evaluation.report import Comparison, Shown
from unicl.predictor import Predictor

_SIDE, _SIZES, _MOST = 128, (28, 56), 4
_NUM_TRAIN, _NUM_VALID, _SHOWN = 1500, 100, 4
_THRESHOLD, _ENLARGED = 0.4, 2
_KEYS = {
    "task": "detection",
    "detection.width": "48",
    "detection.num_blocks": "1",
    "detection.num_levels": "4",
    "detection.anchor_scale": "4",
    "detection.min_sizes": str(_SIDE),
    "detection.max_size": str(_SIDE),
    "detection.test_sizes": str(_SIDE),
    "optimizer.learning_rate": "1e-3",
    "optimizer.weight_decay": "0.05",
    "trainer.batch_size": "8",
}


def demonstrate(towers: Path, folder: Path, *, steps: int) -> Comparison:
    """Train a detector by name on a run's towers and on random ones, with scenes that it draws.

    Args:
        towers: The run.
        folder: Everything is written below it.
        steps: From each start twice as many, of 8 scenes each.
    """
    steps *= 2  # boxes take longer to learn than what is in them
    data = folder / "data"
    if not (data / "valid").exists():
        write_part(data / "train", map(_draw_train, range(_NUM_TRAIN)), EMOJI, kind="emoji")
        write_part(data / "valid", map(_draw_valid, range(_NUM_VALID)), EMOJI, kind="emoji")
    keys = {**_KEYS, "data.train": str(data), "evaluation.data": str(data)}
    runs = train_both(keys, towers, folder, steps=steps)
    detectors = [Predictor.load(run) for run in runs.values()]
    return Comparison(
        title="Detection",
        words=f"Dynamic Head with ATSS finds {len(EMOJI)} kinds of emoji by their names: {steps:,} "
        f"steps of 8 scenes; measured on {_NUM_VALID} others.",
        metric="detection/ap50",
        called="average precision at overlap 0.5",
        curves=curves(runs),
        shown=[_show(detectors, _draw_valid(index)) for index in range(_SHOWN)],
    )


def _draw_train(index: int) -> Scene:
    return _draw("train", index)


def _draw_valid(index: int) -> Scene:
    return _draw("valid", index)


def _draw(part: str, index: int) -> Scene:
    rng = make_generator(0, f"detection {part}", index)
    names = rng.choice(EMOJI, rng.integers(1, _MOST, endpoint=True), replace=False)
    return paint_emoji(rng, names, side=_SIDE, sizes=_SIZES)


def _show(detectors: list[Predictor], scene: Scene) -> Shown:
    return Shown(
        text=", ".join(scene.names),
        found=[_found(detector, scene.pixels) for detector in detectors],
    )


def _found(detector: Predictor, pixels: np.ndarray) -> tuple[bytes, str, bool | None]:
    (objects,) = detector.detect([pixels], threshold=_THRESHOLD)
    large = open_image(encode(pixels)).resize((_ENLARGED * _SIDE,) * 2)  # letters need room
    drawn = draw(
        large,
        _ENLARGED * torch.tensor([each.box for each in objects]).view(-1, 4),
        [each.name for each in objects],
        torch.tensor([each.score for each in objects]),
    )
    file = BytesIO()
    drawn.save(file, "JPEG", quality=90)
    return file.getvalue(), f"{len(objects)} found", None
