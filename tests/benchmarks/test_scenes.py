"""The composed scenes: what they show lies where the annotations say, and is named as they say."""

import json
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools.coco import COCO as PlainCOCO

from benchmarks import scenes
from benchmarks.motion import COLOURS
from benchmarks.scenes import (
    COMPOSED,
    EMOJI,
    draw_object,
    draw_scene,
    write_object_shards,
    write_scenes,
)
from unicl.data import emoji_scenes
from unicl.data.shards import ShardSet

COUNTS = {"num_train": 6, "num_valid": 5, "num_test": 40}
WORLDS = (COMPOSED, EMOJI)


def each_world(test):
    return pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)(test)


def annotations(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "_annotations.coco.json").read_text(encoding="utf-8"))


def around(mask: np.ndarray) -> list[int]:
    """Return the box around what is True."""
    (y, x) = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@each_world
def test_a_scene_is_a_pure_function_of_its_arguments(world):
    for part in scenes.PARTS:
        scene, again = draw_scene(world, 3, part, 7), draw_scene(world, 3, part, 7)
        np.testing.assert_array_equal(scene.pixels, again.pixels)
        np.testing.assert_array_equal(scene.boxes, again.boxes)
        assert scene.names == again.names
        for other in (draw_scene(world, 4, part, 7), draw_scene(world, 3, part, 8)):
            assert (scene.pixels != other.pixels).any()
    drawn = [draw_scene(world, 3, part, 7) for part in scenes.PARTS]
    assert len({scene.pixels.tobytes() for scene in drawn}) == 3


@each_world
def test_held_out_classes_are_in_test_alone_and_beside_seen_ones(world):
    assert set(world.held_out) < set(world.names)
    for part in ("train", "valid"):
        drawn = [draw_scene(world, 0, part, index) for index in range(200)]
        assert {name for scene in drawn for name in scene.names} == set(world.seen)
        assert {len(scene.names) for scene in drawn} == set(range(1, world.most + 1))
    drawn = [draw_scene(world, 0, "test", index) for index in range(200)]
    assert {name for scene in drawn for name in scene.names} == set(world.names)
    assert {len(scene.names) for scene in drawn} == set(range(2, world.most + 1))
    for scene in drawn:
        assert 0 < sum(name in world.held_out for name in scene.names) < len(scene.names)
    # Neither kind is always the one on top.
    on_top = [scene.names[-1] in world.held_out for scene in drawn]
    assert 0.3 < np.mean(on_top) < 0.7


def test_colours_and_shapes_of_held_out_classes_are_seen_elsewhere():
    assert len(COMPOSED.names) == 24
    assert len(COMPOSED.held_out) == 4
    words = [{name.split()[place] for name in COMPOSED.seen} for place in (0, 1)]
    for name in COMPOSED.held_out:
        assert all(word in seen for word, seen in zip(name.split(), words, strict=True))
    # One of each shape, in four colours.
    assert all(len({name.split()[place] for name in COMPOSED.held_out}) == 4 for place in (0, 1))


@each_world
def test_objects_lie_in_the_image_and_hide_little_of_each_other(world):
    for index in range(150):
        scene = draw_scene(world, 1, "test", index)
        assert len(scene.boxes) == len(scene.names)
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= len(scene.pixels)).all()
        covered = np.zeros((len(scene.boxes), *scene.pixels.shape[:2]), int)
        for mask, box in zip(covered, scene.boxes.round().astype(int), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        alone = ((covered == 1) & (covered.sum(0) == 1)).sum((1, 2)) / covered.sum((1, 2))
        # Pixels are counted whole here.
        assert alone.min() > 0.7


def test_sizes_are_those_of_the_exercise():
    drawn = [draw_scene(COMPOSED, 2, "train", index) for index in range(200)]
    assert all(scene.pixels.shape == (96, 96, 3) for scene in drawn)
    boxes = np.concatenate([scene.boxes for scene in drawn])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert 14 <= sides.min() < 15
    assert 43 < sides.max() <= 44
    drawn = [draw_scene(EMOJI, 2, "train", index) for index in range(200)]
    assert all(scene.pixels.shape == (160, 160, 3) for scene in drawn)
    boxes = np.concatenate([scene.boxes for scene in drawn])
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert 15 < longer.min() < 25
    assert 60 < longer.max() < 90


@pytest.mark.parametrize("name", COMPOSED.names)
def test_a_shape_fills_its_box(name):
    colour, shape = name.split()
    share = {"circle": math.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 1 - 0.65**2}[shape]
    other = f"{'red' if colour != 'red' else 'white'} {shape}"
    for seed in range(3):
        scene, recoloured = (
            COMPOSED.paint(np.random.default_rng(seed), [word]) for word in (name, other)
        )
        np.testing.assert_array_equal(scene.boxes, recoloured.boxes)
        # All else is the same, noise included.
        differs = (scene.pixels != recoloured.pixels).any(2)
        # A triangle's tip is thinner than a pixel.
        np.testing.assert_allclose(around(differs), scene.boxes[0], atol=1.6)
        side = scene.boxes[0, 2] - scene.boxes[0, 0]
        # Pixels that the border touches count as whole ones: one per pixel of the outline.
        assert abs(differs.sum() / side**2 - share) < 0.04 + 2.2 / side


def test_the_colour_in_the_middle_of_a_box_is_the_named_one():
    paints = np.array(list(COLOURS.values()))
    for index in range(100):
        scene = draw_scene(COMPOSED, 5, "test", index)
        for name, box in zip(scene.names, scene.boxes, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            nearest = np.abs(paints - scene.pixels[y, x]).sum(1).argmin()
            assert list(COLOURS)[nearest] == name.split()[0]


@pytest.mark.parametrize("name", EMOJI.names)
def test_an_emoji_fills_its_box(name, monkeypatch):
    # No emoji of ours is of this colour.
    plain = np.full((160, 160, 3), (0, 255, 0), np.uint8)
    monkeypatch.setattr(emoji_scenes, "background", lambda stream, size: plain)
    for seed in range(3):
        scene = EMOJI.paint(np.random.default_rng(seed), [name])
        differs = np.abs(scene.pixels.astype(int) - plain).max(2) > 60
        np.testing.assert_allclose(around(differs), scene.boxes[0], atol=2)


@each_world
def test_folders_are_laid_out_as_roboflow_does(tmp_path, world):
    write_scenes(tmp_path, world, **COUNTS, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train", "valid"]
    for part, count in zip(scenes.PARTS, COUNTS.values(), strict=True):
        content = annotations(tmp_path, part)
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        known = world.names if part == "test" else world.seen
        assert names[0] == world.name
        assert sorted(names.values()) == sorted([world.name, *known])
        assert content["info"] == {"seen": list(world.seen), "held_out": list(world.held_out)}
        assert len(content["images"]) == count
        assert len(list((tmp_path / part).glob("*.png"))) == count
        for image in content["images"]:
            scene = draw_scene(world, 1, part, image["id"])
            with Image.open(tmp_path / part / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                np.testing.assert_array_equal(np.asarray(picture), scene.pixels)
            own = [x for x in content["annotations"] if x["image_id"] == image["id"]]
            assert tuple(names[x["category_id"]] for x in own) == scene.names
            boxes = np.array([x["bbox"] for x in own])
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(boxes, scene.boxes)
        PlainCOCO(str(tmp_path / part / "_annotations.coco.json"))


def average_precision(truth: dict, named_by: dict) -> float:
    """Score the objects of `truth` as found by a detector that calls them as `named_by` does."""
    numbers = {entry["name"]: entry["id"] for entry in truth["categories"]}
    names = {entry["id"]: entry["name"] for entry in named_by["categories"]}
    found = [
        {
            "image_id": x["image_id"],
            "category_id": numbers[names[x["category_id"]]],
            "bbox": x["bbox"],
            "score": 0.9,
        }
        for x in named_by["annotations"]
    ]
    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(found), "bbox", print_function=lambda *_: None)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return float(evaluation.stats[0])


def test_shuffled_names_are_others_for_the_same_pictures(tmp_path):
    plain = write_scenes(tmp_path / "plain", **COUNTS)
    shuffled = write_scenes(tmp_path / "shuffled", **COUNTS, shuffled_names=True)
    for part in scenes.PARTS:
        for path in (plain / part).glob("*.png"):
            assert path.read_bytes() == (shuffled / part / path.name).read_bytes()
        one, other = annotations(plain, part), annotations(shuffled, part)
        assert one["annotations"] == other["annotations"]
        pairs = [
            (a["name"], b["name"])
            for a, b in zip(one["categories"], other["categories"], strict=True)
        ]
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs)
        assert sum(a == b for a, b in pairs) == (len(pairs) if part == "train" else 1)
        assert average_precision(one, one) == pytest.approx(1)
    for part in ("valid", "test"):
        truth = annotations(shuffled, part)
        assert average_precision(truth, annotations(plain, part)) < 0.01


def test_shards_of_objects(tmp_path):
    shards = ShardSet.open(write_object_shards(tmp_path, 300, seed=2))
    assert shards.num_samples == 300
    samples = [shards.read(index) for index in range(300)]
    assert {sample.text.decode() for sample in samples} == set(COMPOSED.seen)
    for index in (6, 7):
        shown = draw_object(2, index)
        assert samples[index].text.decode() == shown.names[0]
        np.testing.assert_array_equal(
            np.asarray(Image.open(BytesIO(samples[index].image))), shown.pixels
        )


def test_an_object_is_alone_or_cut_out():
    shares = []
    for index in range(200):
        shown = draw_object(0, index)
        height, width = shown.pixels.shape[:2]
        assert len(shown.names) == len(shown.boxes) == 1
        ((x1, y1, x2, y2),) = shown.boxes
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        shares.append((x2 - x1) * (y2 - y1) / (height * width))
        if index % 2 == 0:
            assert (height, width) == (96, 96)
        x, y = int((x1 + x2) / 2), int((y1 + y2) / 2)
        paint = np.array(COLOURS[shown.names[0].split()[0]])
        assert np.abs(shown.pixels[y, x] - paint).max() <= 11
    assert max(shares[::2]) < 0.25
    assert min(shares[1::2]) > 0.45
