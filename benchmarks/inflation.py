"""In how many steps does 3D-CoSwin learn motions, inflated from images and from a random start?

The clips of `benchmarks.motion`: only the order of their frames tells what happens.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

import unicl
from benchmarks import motion
from benchmarks.record import Bar, Result
from cosswin.variants import coswin_nano
from unicl.config import parse_recipe
from unicl.engine.metrics import read_metrics
from unicl.evaluation.embeddings import embed_texts
from unicl.models import load
from unicl.towers.pretrained import Pretrained

_EVERY = 50
_ENOUGH = 0.9

default_cfgs = generate_default_cfgs({"coswin_motion.untrained": {"input_size": (3, 64, 64)}})


@register_model
def coswin_motion(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A CoSwin of three stages: 0.3M parameters in two dimensions."""
    sizes = {"embed_dim": 24, "depths": (1, 1, 1), "num_heads": (2, 4, 8), "window_size": 4}
    return coswin_nano(pretrained, **{**sizes, "img_size": 64, **kwargs})


_TOWERS = {
    "embed_dim": "64",
    "image_tower.model": "coswin_motion",
    "image_tower.image_size": "64",
    "text_tower.width": "64",
    "text_tower.num_layers": "1",
    "text_tower.num_heads": "2",
    "text_tower.context_length": "16",
}
_TRAINING = {
    "data.templates": "none",
    "data.crop_scale": "1.0,1.0",
    "data.crop_ratio": "1.0,1.0",
    "data.num_workers": "0",
    "optimizer.weight_decay": "0.05",
    "schedule.warmup_steps": "50",
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.log_every": str(_EVERY),
}
_CLIPS = {
    "task": "video",
    "video.num_frames": "8",
    "video.sampling": "uniform",
    "video.frame_stride": "1",
    "video.time_windows": "2,4,4",
    "trainer.batch_size": "32",
    "trainer.eval_every": str(_EVERY),
}
_HEAD = {"video.targets": "classes"}


def measure(*, quick: bool) -> Result:
    """Train a head on motions from both starts, and captions from the inflated one.

    One process of as many threads as torch is told; about half an hour on 2 cores.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, 48 if quick else 2304)
        steps = 2 if quick else 1000
        _train(folder, "images", 2 if quick else 1200, "2e-3", {"trainer.batch_size": "64"})
        start = {"weights": str(folder / "run-images")}
        curves = {
            "inflated": _train(folder, "motions", steps, "1e-3", {**_CLIPS, **_HEAD, **start}),
            "random": _train(folder, "motions", steps, "1e-3", {**_CLIPS, **_HEAD}, run="random"),
        }
        captions = _train(folder, "captions", steps, "1e-3", {**_CLIPS, **start})
        head = load(folder / "run-motions")
        seen = _controls(head, quick=quick)
        by_caption = _motions_by_caption(load(folder / "run-captions"), quick=quick)
    needed = {
        start: next((step for step, share in curve.items() if share >= _ENOUGH), steps)
        for start, curve in curves.items()
    }
    retrieved = list(captions.values())[-1]
    return Result(
        bars=[
            _share("motion accuracy, inflated, 1,000 steps", seen["as they are"], 0.95),
            _share("text-to-video R@1 of 144 clips, inflated, 1,000 steps", retrieved, 0.6),
            Bar(
                "steps to 90% motion accuracy, inflated over random start",
                needed["inflated"] / needed["random"],
                0.5,
                "x",
                "at most",
            ),
            _share("motion accuracy, frames shuffled", seen["frames shuffled"], 0.5, "at most"),
            _share("motion accuracy, one frame repeated", seen["one frame"], 0.25, "at most"),
            _share("motion of the nearest caption, trained on captions", by_caption, None),
        ],
        tables={
            "Motion accuracy and R@1 of held-out clips by steps": [
                {
                    "step": step,
                    "inflated": curves["inflated"][step],
                    "random start": curves["random"].get(step),
                    "R@1, inflated": captions.get(step),
                }
                for step in curves["inflated"]
            ]
        },
        facts={"steps_to_90_percent": needed},
    )


def _write(folder: Path, num_clips: int) -> None:
    held_out = len(motion.COMBINATIONS)
    motion.write_image_shards(folder / "images" / "train", 2 * num_clips, seed=3)
    motion.write_image_shards(folder / "images" / "test", held_out, seed=4)
    for part, number, seed in (("train", num_clips, 1), ("test", held_out, 2)):
        motion.write_clip_shards(folder / "captions" / part, number, seed=seed)
        motion.write_clip_shards(folder / "motions" / part, number, seed=seed, text="motion")


def _train(
    folder: Path,
    data: str,
    steps: int,
    rate: str,
    settings: Mapping[str, str],
    *,
    run: str | None = None,
) -> dict[int, float]:
    """Train, and return accuracy or R@1 by steps."""
    keys = {
        **_TOWERS,
        **_TRAINING,
        **settings,
        "data.train": str(folder / data / "train"),
        "evaluation.data": str(folder / data / "test"),
        "optimizer.learning_rate": rate,
        "trainer.steps": str(steps),
    }
    path = folder / f"run-{run or data}"
    unicl.train(parse_recipe("", keys), path)
    figures = ("recognition/top1", "retrieval/t2i_r1")
    rows = read_metrics(path / "metrics.jsonl")
    return {int(row["step"]): row[name] for row in rows for name in figures if name in row}


def _controls(head: Pretrained, *, quick: bool) -> dict[str, float]:
    """Return how often a head is right on clips as they are, shuffled, and of one frame."""
    clips, motions = _held_out(quick)
    rng = np.random.default_rng(0)
    num_frames = clips.shape[2]
    shuffled = torch.stack([clip[:, rng.permutation(num_frames)] for clip in clips])
    chosen = [clip[:, [frame] * num_frames] for clip, frame in
              zip(clips, rng.integers(num_frames, size=len(clips)), strict=True)]  # fmt: skip
    targets = torch.tensor([head.classes.index(name) for name in motions])
    sides = {"as they are": clips, "frames shuffled": shuffled, "one frame": torch.stack(chosen)}
    with torch.no_grad():
        return {
            name: (head.model.encode_image(side).argmax(-1) == targets).double().mean().item()
            for name, side in sides.items()
        }


def _motions_by_caption(model: Pretrained, *, quick: bool) -> float:
    """Return how often the nearest of all captions has a clip's motion."""
    clips, motions = _held_out(quick)
    captions = [motion.caption(*each) for each in motion.COMBINATIONS]
    texts = embed_texts(model.model, captions, model.tokenize)
    with torch.no_grad():
        nearest = (model.model.encode_image(clips) @ texts.T).argmax(-1).tolist()
    found = [motion.COMBINATIONS[number][2] for number in nearest]
    return float(np.mean([a == b for a, b in zip(found, motions, strict=True)]))


def _held_out(quick: bool) -> tuple[Tensor, list[str]]:
    clips = [motion.draw_clip(2, index) for index in range(12 if quick else 144)]
    frames = [torch.from_numpy(clip.frames).permute(3, 0, 1, 2) for clip in clips]
    return torch.stack(frames), [clip.motion for clip in clips]


def _share(what: str, measured: float, limit: float | None, better: Any = "at least") -> Bar:
    return Bar(what, 100 * measured, None if limit is None else 100 * limit, "%", better)
