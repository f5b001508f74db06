"""Composed scenes for detection: coloured shapes on noise, and emoji on varied backgrounds.

A scene is a pure function of (seed, part, index). Folders are laid out as Roboflow exports them, a
COCO file beside the images of each part, and some classes occur in no scene but those of `test`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from adapters.detection.writing import write_part
from benchmarks.motion import COLOURS
from unicl.data import emoji_scenes
from unicl.data.emoji_scenes import Scene, arrange, encode, make_generator, paint_emoji
from unicl.data.shards import ShardWriter

SIDE, EMOJI_SIDE = 96, 160
PARTS = ("train", "valid", "test")
SHAPES = ("circle", "square", "triangle", "cross")

_RADII = (7.0, 22.0)
_EMOJI_SIZES = (20, 64)
_SAMPLES_PER_SHARD = 256


@dataclass(frozen=True)
class World:
    """What scenes may show, and how they are drawn."""

    name: str
    names: tuple[str, ...]
    """All classes, in alphabetical order."""
    held_out: tuple[str, ...]
    """Classes that only `test` shows."""
    most: int
    """Objects in a scene, at most."""
    paint: Callable[[np.random.Generator, Sequence[str]], Scene]

    @property
    def seen(self) -> tuple[str, ...]:
        """Return the classes of `train` and `valid`."""
        return tuple(name for name in self.names if name not in self.held_out)


def paint_shapes(
    rng: np.random.Generator,
    names: Sequence[str],
    *,
    side: int = SIDE,
    radii: tuple[float, float] = _RADII,
) -> Scene:
    """Paint one object for each name, "red circle", on noise: radii lie between those given."""
    names = tuple(str(name) for name in names)

    def draw_sizes() -> Float64[np.ndarray, "objects 2"]:
        return np.repeat(2 * rng.uniform(*radii, (len(names), 1)), 2, axis=1)

    boxes = arrange(rng, side, draw_sizes)
    ground = rng.uniform(80, 140) + rng.uniform(-15, 15, 3)
    pixels = ground + 12 * rng.standard_normal((side, side, 3), np.float32)
    for name, box in zip(names, boxes, strict=True):
        colour, shape = name.split()
        depth = _depth(shape, box, side)[..., None]
        # A dark rim parts objects of one colour, and any from the ground.
        shade = np.where(depth < 1, 0.15, 1)
        paint = shade * (np.array(COLOURS[colour]) + rng.uniform(-10, 10, 3))
        pixels += np.clip(depth + 0.5, 0, 1) * (paint - pixels)
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), names, boxes)


def _depth(
    shape: str, box: Float64[np.ndarray, "4"], side: int
) -> Float64[np.ndarray, "side side"]:
    """Return how far inside the object every pixel's centre lies; it is negative outside."""
    centre, radius = (box[:2] + box[2:]) / 2, (box[2] - box[0]) / 2
    places = np.arange(side) + 0.5
    x, y = places[None, :] - centre[0], places[:, None] - centre[1]
    if shape == "circle":
        return radius - np.hypot(x, y)
    if shape == "triangle":
        return np.minimum(radius - y, (y + radius) / 2 - np.abs(x))
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.minimum(radius - far, (0.35 * radius if shape == "cross" else radius) - near)


COMPOSED = World(
    "shapes",
    tuple(sorted(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))),
    ("blue triangle", "green circle", "red cross", "yellow square"),
    4,
    paint_shapes,
)
"""6 colours x 4 shapes on noise; the colours and shapes of held-out classes occur in seen ones."""
EMOJI = World(
    "emoji",
    tuple(sorted(emoji_scenes.EMOJI)),
    ("banana", "bicycle", "crown", "guitar", "key", "octopus", "pretzel", "sunflower"),
    5,
    partial(paint_emoji, side=EMOJI_SIDE, sizes=_EMOJI_SIZES),
)
"""40 emoji on gradients, stripes, checks, clouds, noise."""


def draw_scene(world: World, seed: int, part: str, index: int) -> Scene:
    """Compose a scene of seen objects; in `test` seen and held-out ones are mixed in each."""
    rng = make_generator(seed, part, index)
    if part != "test":
        return world.paint(rng, rng.choice(world.seen, rng.integers(1, world.most + 1)))
    names = [rng.choice(world.seen), rng.choice(world.held_out)]
    for _ in range(rng.integers(world.most - 1)):
        names.append(rng.choice(world.seen if rng.random() < 0.5 else world.held_out))
    return world.paint(rng, rng.permutation(names))


def draw_object(seed: int, index: int) -> Scene:
    """Compose an image of one shape of a seen class: alone, or cut out of a scene of several."""
    rng = make_generator(seed, "objects", index)
    if index % 2 == 0:
        return COMPOSED.paint(rng, rng.choice(COMPOSED.seen, 1))
    scene = COMPOSED.paint(rng, rng.choice(COMPOSED.seen, rng.integers(1, COMPOSED.most + 1)))
    # The last is the one that no other hides.
    x1, y1, x2, y2 = scene.boxes[-1]
    # Some pixels off at each side, as a detector's box would be.
    left, top, right, bottom = rng.uniform(-0.08, 0.2, 4) * (x2 - x1)
    window = np.array([x1 - left, y1 - top, x2 + right, y2 + bottom]).round().clip(0, SIDE)
    left, top, right, bottom = window.astype(int)
    boxes = scene.boxes[-1:] - window[[0, 1, 0, 1]]
    pixels = scene.pixels[top:bottom, left:right]
    return Scene(pixels, scene.names[-1:], boxes.clip(0, [right - left, bottom - top] * 2))


def write_scenes(
    folder: Path,
    world: World = COMPOSED,
    *,
    num_train: int,
    num_valid: int,
    num_test: int,
    seed: int = 0,
    shuffled_names: bool = False,
) -> Path:
    """Write `folder/train`, `valid` and `test`, each with its images and annotations.

    Args:
        folder: Where to; made if need be.
        world: `COMPOSED` or `EMOJI`.
        num_train: Scenes of seen classes.
        num_valid: Others of seen classes.
        num_test: Scenes of seen and held-out classes; its categories are all there are.
        seed: Other seeds give other scenes.
        shuffled_names: Give each class of `valid` and `test` the name of another one: what is
            found even so was not found by its name.
    """
    for part, count in zip(PARTS, (num_train, num_valid, num_test), strict=True):
        known = world.names if part == "test" else world.seen
        shuffle = shuffled_names and part != "train"
        called = _shuffled(known, seed) if shuffle else {name: name for name in known}
        scenes = (draw_scene(world, seed, part, index) for index in range(count))
        write_part(
            folder / part,
            scenes,
            world.names,
            kind=world.name,
            called=called,
            info={"seen": world.seen, "held_out": world.held_out},
        )
    return folder


def write_object_shards(folder: Path, num_images: int, *, seed: int = 0) -> Path:
    """Write shards of single objects with the names of their classes, to pretrain towers on."""
    with ShardWriter(folder, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        for index in range(num_images):
            shown = draw_object(seed, index)
            writer.write(f"{index:06d}", encode(shown.pixels), "png", shown.names[0])
    return folder


def _shuffled(names: Sequence[str], seed: int) -> dict[str, str]:
    """Return for each name another one: all stand in one circle, and each takes the next one's."""
    circle = [str(name) for name in make_generator(seed, "names", 0).permutation(names)]
    return dict(zip(circle, circle[1:] + circle[:1], strict=True))
