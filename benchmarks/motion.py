"""Composed clips: one object of 6 colours and 4 shapes in one of 6 motions, which the order tells.

Place and size of the object each run through a track of as many values as the clip has frames. The
motion says which of the three follows its track, and in which direction; the other two stand still
at a random value of theirs. So a frame of a clip, taken at random, has the same distribution
whatever the motion, and the set of all frames tells only which of the three changes: without the
order, no classifier can be right more often than one time in six, and one time in two.
"""

from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

from adapters.video.writing import encode as encode
from unicl.data.shards import ShardWriter

SIDE = 64
COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 185, 50),
    "blue": (40, 70, 230),
    "yellow": (235, 220, 40),
    "purple": (170, 45, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "bar", "triangle", "cross")
MOTIONS = {
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up": (1, -1),
    "moving down": (1, 1),
    "growing": (2, 1),
    "shrinking": (2, -1),
}
"""Which of x, y and radius changes, and in which direction."""
COMBINATIONS = tuple(product(COLOURS, SHAPES, MOTIONS))
"""All 144, as (colour, shape, motion)."""

# Of x, y and radius in pixels: between which bounds a track has its middle, and how far it leads.
_MIDDLES = ((24.0, 24.0, 12.5), (40.0, 40.0, 13.5))
_LENGTHS = np.array((20.0, 20.0, 9.0))
# Of a shard; a corpus of a few hundred clips has several.
_SAMPLES_PER_SHARD = 256


@dataclass(frozen=True)
class MotionClip:
    """A clip and what it shows."""

    colour: str
    shape: str
    motion: str
    frames: UInt8[np.ndarray, "time 64 64 3"]

    @property
    def caption(self) -> str:
        """Say what happens: "a red circle moving left"."""
        return caption(self.colour, self.shape, self.motion)

    @property
    def still_caption(self) -> str:
        """Say what each frame shows: "a red circle"."""
        return f"a {self.colour} {self.shape}"


def caption(colour: str, shape: str, motion: str) -> str:
    return f"a {colour} {shape} {motion}"


def motion_captions(motion: str) -> list[str]:
    """Return the captions of all clips of a motion: an ensemble of prompts for its name."""
    return [caption(colour, shape, motion) for colour, shape in product(COLOURS, SHAPES)]


def draw_clip(seed: int, index: int, *, num_frames: int = 8) -> MotionClip:
    """Compose a clip, a pure function of its arguments.

    Any 144 clips in a row show all combinations; shuffle them for training.
    """
    rng = np.random.default_rng((seed, index))
    colour, shape, motion = COMBINATIONS[index % len(COMBINATIONS)]
    tracks = draw_tracks(rng, motion, num_frames)
    coverage = _coverage(shape, tracks.astype(np.float32))[..., None]
    paint = (np.array(COLOURS[colour]) + rng.uniform(-10, 10, 3)).astype(np.float32)
    ground = rng.uniform(80, 140) + 10 * rng.standard_normal((SIDE, SIDE, 1), np.float32)
    frames = (ground + coverage * (paint - ground)).round().clip(0, 255).astype(np.uint8)
    return MotionClip(colour, shape, motion, frames)


def draw_tracks(
    rng: np.random.Generator, motion: str, num_frames: int
) -> Float64[np.ndarray, "time 3"]:
    """Draw x, y and radius of the object in every frame, in pixels."""
    changing, direction = MOTIONS[motion]
    steps = np.arange(num_frames)
    phases = np.repeat(rng.integers(num_frames, size=(1, 3)), num_frames, axis=0)
    phases[:, changing] = steps[::direction]
    offsets = phases / max(num_frames - 1, 1) - 0.5
    return rng.uniform(*_MIDDLES) + offsets * _LENGTHS


def _coverage(
    shape: str, tracks: Float32[np.ndarray, "time 3"]
) -> Float32[np.ndarray, "time 64 64"]:
    """Return how much of every pixel the object covers."""
    pixels = np.arange(SIDE, dtype=tracks.dtype) + 0.5
    x, y, radius = (value[:, None, None] for value in tracks.T)
    x, y = pixels[None, None, :] - x, pixels[None, :, None] - y
    if shape == "circle":
        inside = radius - np.hypot(x, y)
    elif shape == "bar":
        inside = np.minimum(1.2 * radius - np.abs(x), 0.5 * radius - np.abs(y))
    elif shape == "triangle":
        inside = np.minimum(radius - y, (y + radius) / 2 - np.abs(x))
    else:
        far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        inside = np.minimum(radius - far, 0.35 * radius - near)
    return np.clip(inside + 0.5, 0, 1)


def write_class_folder(folder: Path, num_clips: int, *, seed: int, num_frames: int = 8) -> Path:
    """Write `folder/moving_left/000000.mp4`, ...: one folder for each motion."""
    for motion in MOTIONS:
        (folder / motion.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
    for index in range(num_clips):
        clip = draw_clip(seed, index, num_frames=num_frames)
        path = folder / clip.motion.replace(" ", "_") / f"{index:06d}.mp4"
        path.write_bytes(encode(clip.frames))
    return folder


def write_clip_shards(
    folder: Path,
    num_clips: int,
    *,
    seed: int,
    num_frames: int = 8,
    text: Literal["caption", "motion"] = "caption",
) -> Path:
    """Write shards of videos, each with its caption or the name of its motion."""
    with ShardWriter(folder, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        for index in range(num_clips):
            clip = draw_clip(seed, index, num_frames=num_frames)
            words = clip.caption if text == "caption" else clip.motion
            writer.write(f"{index:06d}", encode(clip.frames), "mp4", words)
    return folder


def write_image_shards(folder: Path, num_images: int, *, seed: int) -> Path:
    """Write shards of single frames, each taken from a clip of its own: "a red circle"."""
    with ShardWriter(folder, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        for index in range(num_images):
            clip = draw_clip(seed, index)
            frame = np.random.default_rng((seed, index, 1)).choice(clip.frames)
            buffer = BytesIO()
            Image.fromarray(frame).save(buffer, format="PNG")
            writer.write(f"{index:06d}", buffer.getvalue(), "png", clip.still_caption)
    return folder
