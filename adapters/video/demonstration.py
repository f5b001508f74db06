"""What a pair of towers is worth to video: emoji that move, found by what happens."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from adapters.video.writing import encode
from unicl.adapting import curves, train_both
from unicl.data.composition import Stream, background
from unicl.data.emoji_scenes import EMOJI, make_generator, turned
from unicl.data.shards import ShardWriter
from unicl.evaluation.report import Comparison, Shown
from unicl.predictor import Predictor

_SIDE, _SIZES, _FRAMES = 48, (24, 30), 8
_MOTIONS = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
}
_NAMES = tuple(f"{name} {motion}" for name, motion in product(EMOJI, _MOTIONS))
_NUM_TRAIN, _SHOWN = 16 * len(_NAMES), 4
_CLIPS_PER_SHARD = 320
_KEYS = {
    "task": "video",
    "video.num_frames": str(_FRAMES),
    "video.sampling": "uniform",
    "video.frame_stride": "1",
    "video.time_windows": "2,4,4,4",
    "optimizer.learning_rate": "1e-3",
    "optimizer.weight_decay": "0.05",
    "trainer.batch_size": "32",
}


@dataclass(frozen=True)
class _Clip:
    frames: UInt8[np.ndarray, "time side side 3"]
    name: str


def demonstrate(towers: Path, folder: Path, *, steps: int) -> Comparison:
    """Train on captions of clips with a run's towers, inflated, and with random ones.

    Args:
        towers: The run.
        folder: Everything is written below it.
        steps: Of 32 clips, from each start.
    """
    data = folder / "data"
    if not (data / "val" / "dataset.json").exists():
        _write(data / "train", "train", _NUM_TRAIN)
        _write(data / "val", "val", len(_NAMES))
    keys = {
        **_KEYS,
        "data.train": str(data / "train"),
        "evaluation.data": str(data / "val"),
        "evaluation.templates": "none",
    }
    runs = train_both(keys, towers, folder, steps=steps)
    models = [Predictor.load(run) for run in runs.values()]
    # Ones that move in different ways.
    chosen = [number * (len(_NAMES) // _SHOWN + 1) for number in range(_SHOWN)]
    return Comparison(
        title="Video",
        words=f"3D-CoSwin, inflated, and the text tower tell {len(_NAMES)} captions apart, of "
        f"{len(EMOJI)} kinds of emoji in {len(_MOTIONS)} motions: {steps:,} steps of 32 clips of "
        f"{_FRAMES} frames; measured on one other clip of each.",
        metric="retrieval/t2i_r1",
        called="text to video, R@1",
        curves=curves(runs),
        shown=[_show(models, _draw("val", number), folder) for number in chosen],
    )


def _draw(part: str, index: int) -> _Clip:
    """Draw an emoji that crosses half of the picture; any 160 in a row have all captions."""
    name = _NAMES[index % len(_NAMES)]
    emoji, _, motion = name.partition(" moving ")
    rng = make_generator(0, f"moving {part}", index)
    picture = turned(rng, emoji, _SIZES)
    ground = background(Stream(int(rng.integers(2**63))), _SIDE)
    room = np.array([_SIDE - picture.width, _SIDE - picture.height])
    direction = np.array(_MOTIONS[f"moving {motion}"])
    frames = []
    start = np.where(direction == 0, rng.uniform(0, room), np.where(direction > 0, 0, room))
    for step in np.linspace(0, 1, _FRAMES):
        image = Image.fromarray(ground)
        left, top = (start + direction * step * room).round().astype(int).tolist()
        image.paste(picture, (left, top), picture)
        frames.append(np.asarray(image))
    return _Clip(np.stack(frames), name)


def _write(folder: Path, part: str, count: int) -> None:
    # Shuffled, as all captions of one emoji would lie together.
    order = make_generator(0, f"order {part}", 0).permutation(count)
    with ShardWriter(folder, samples_per_shard=_CLIPS_PER_SHARD) as writer:
        for place, index in enumerate(order.tolist()):
            clip = _draw(part, index)
            writer.write(f"{place:06d}", encode(clip.frames), "mp4", clip.name)


def _show(models: Sequence[Predictor], clip: _Clip, folder: Path) -> Shown:
    path = folder / f"{clip.name.replace(' ', '_')}.mp4"
    path.write_bytes(encode(clip.frames))
    strip = Image.fromarray(np.concatenate(list(clip.frames[:: _FRAMES // 4]), axis=1))
    file = BytesIO()
    strip.save(file, "PNG")
    found: list[tuple[None, str, bool]] = []
    for model in models:
        (((said, _),),) = model.classify([path], _NAMES, templates=["{}"], top_k=1)
        found.append((None, said, said == clip.name))
    return Shown(text=clip.name, image=file.getvalue(), found=found)
