"""Detectors measured on sets: what is written, and what is refused."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from adapters.detection.detection_set import Judged
from adapters.detection.evaluating import detector_of
from adapters.detection.finding import Finder
from adapters.detection.found import Detections
from adapters.detection.measuring import Found, compare
from adapters.detection.sets import open_detection_set
from unicl.errors import UniclError, UsageError
from unicl.evaluation.results import read_results
from unicl.evaluator import Options, evaluate
from unicl.models import load


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let warnings reach the test."""
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it


def options(out: Path, **changes: object) -> Options:
    return Options(out=out, device="cpu", num_workers=0, **changes)


def stem_of(out: Path) -> Path:
    (path,) = (each for each in out.glob("*.json") if not each.name.endswith(".detections.json"))
    return path.with_suffix("")


def found_in(out: Path) -> list:
    return json.loads(Path(f"{stem_of(out)}.detections.json").read_text())


def found_like(samples, row: int, most: int, **ways: float) -> Detections:
    """Find the first objects of an image, a little beside, some under another number."""
    rng = np.random.default_rng(row)
    boxes, labels, *_ = samples.sets[0].of(row)
    boxes = boxes[:most] + rng.normal(0, ways.get("shift", 0), (len(boxes[:most]), 4))
    others = rng.integers(0, 20, len(boxes))
    own = np.where(rng.random(len(boxes)) < ways.get("wrong", 0), others, labels[:most])
    own = 0 * own if ways.get("objects") else own
    arrays = (boxes.astype(np.float32), rng.random(len(boxes), np.float32), own.astype(np.int64))
    return Detections(*map(torch.from_numpy, arrays))


def with_damage(runs: Path, folder: Path) -> Path:
    """Copy the scenes, and damage the third image of test."""
    shutil.copytree(runs / "scenes", folder)
    (folder / "test/000002.png").write_bytes(b"no image")
    return folder


@pytest.mark.filterwarnings("ignore")  # pycocotools is older than numpy's warnings
def test_the_figures_are_those_of_pycocotools_on_the_files_written(runs, tmp_path, monkeypatch):
    def roughly(finder, samples, loaders):
        rows = range(samples.num_samples)
        return {row: found_like(samples, row, 9, shift=2, wrong=0.2) for row in rows}, {}

    monkeypatch.setattr(Finder, "in_samples", roughly)
    scenes = str(runs / "scenes")
    (result,) = evaluate(str(runs / "texts"), "detection-map", [scenes], options(tmp_path))
    assert (result.task, result.headline, result.num_images) == ("detection", "ap", 14)
    assert result.protocol["num_classes"] == 24
    assert result.protocol["image_size"] == "64"
    assert "templates" not in result.protocol
    assert "regions" not in result.protocol
    truth = COCO(str(runs / "scenes/test/_annotations.coco.json"))
    found = truth.loadRes(f"{stem_of(tmp_path)}.detections.json")
    theirs = COCOeval(truth, found, "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert result.metrics["ap"] == pytest.approx(theirs.stats[0], abs=1e-6)
    assert result.metrics["ap50"] == pytest.approx(theirs.stats[1], abs=1e-6)
    assert result.metrics["ar100"] == pytest.approx(theirs.stats[8], abs=1e-6)
    assert 0.2 < result.metrics["ap"] < 0.9


def test_results_are_read_back_without_what_was_found(runs, tmp_path, caplog):
    scenes = str(runs / "scenes")
    (result,) = evaluate(str(runs / "texts"), "detection-map", [scenes], options(tmp_path))
    (read,) = read_results(tmp_path)
    assert read.metrics == result.metrics
    assert "is no result" not in caplog.text


def test_pictures_show_what_was_found_beside_what_there_is(runs, tmp_path):
    scenes = str(runs / "scenes")
    evaluate(str(runs / "texts"), "detection-map", [scenes], options(tmp_path))
    folder = Path(f"{stem_of(tmp_path)}.pictures")
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"{n:02d}.jpg" for n in range(1, 13)
    ]
    with Image.open(folder / "01.jpg") as picture:
        assert picture.format == "JPEG"
        pixels = np.asarray(picture).astype(int)
    left, right = pixels[40:, :640], pixels[40:, 640:]
    # Nothing was found, so the boxes at the right are all that differs.
    assert (np.abs(left - right).max(-1) > 60).sum() > 500
    evaluate(str(runs / "texts"), "detection-map", [scenes], options(tmp_path, split="val"))
    (small,) = tmp_path.glob("*@val.pictures")
    assert len(list(small.iterdir())) == 3


def test_annotations_left_out_are_no_images(runs, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(runs / "scenes/test", scenes)
    path = scenes / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0, 0, 0, 5]
    path.write_text(json.dumps(content))
    out = options(tmp_path / "out")
    (result,) = evaluate(str(runs / "texts"), "detection-map", [str(scenes)], out)
    assert result.protocol["skipped_annotations"] == {"box without area": 1}
    assert (result.num_images, result.left_out) == (14, "")


def test_a_damaged_image_is_left_out_and_counted(runs, tmp_path):
    scenes = with_damage(runs, tmp_path / "scenes")
    out = tmp_path / "out"
    (result,) = evaluate(str(runs / "texts"), "detection-map", [str(scenes)], options(out))
    assert result.num_images == 13
    assert sum(result.skipped.values()) == 1
    ids = {each["image_id"] for each in found_in(out)}
    assert 2 not in ids
    for path in (scenes / "test").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UniclError, match=r"none of the 14 images of .* can be read"):
        evaluate(str(runs / "texts"), "detection-map", [str(scenes)], options(out))


def test_what_a_damaged_image_shows_is_missed(runs):
    images = open_detection_set(str(runs / "scenes"), split="test", root=Path("data"))
    perfect = [
        {**{key: each[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for each in images.truth()["annotations"]
    ]
    rows = list(range(1, images.num_images))
    without = [each for each in perfect if each["image_id"] != int(images.image_ids[0])]
    assert compare(Found(without, rows, {}), images, by_class=True)["ap"] < 1
    everything = Found(perfect, [0, *rows], {})
    assert compare(everything, images, by_class=True)["ap"] == pytest.approx(1)


def test_a_class_of_which_not_all_are_annotated_has_no_false_positives(runs):
    images = open_detection_set(str(runs / "scenes"), split="val", root=Path("data"))
    rows = list(range(images.num_images))
    right = [{**each, "score": 0.5} for each in images.truth()["annotations"]]
    elsewhere = [{**each, "bbox": [1.0, 1.0, 3.0, 3.0], "score": 0.95} for each in right]
    found = Found([*right, *elsewhere], rows, {})
    every = [np.unique(images.of(row).labels) for row in rows]
    counts = np.cumsum([0, *map(len, every)])
    exhaustive = replace(images, judged=Judged(np.concatenate(every).astype(np.int32), counts))
    assert compare(found, exhaustive, by_class=True)["ap"] < 0.9
    none = Judged(np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64))
    assert compare(found, replace(images, judged=none), by_class=True)["ap"] == pytest.approx(1)


def test_what_nobody_looked_for_is_neither_right_nor_wrong(runs):
    images = open_detection_set(str(runs / "scenes"), split="val", root=Path("data"))
    rows = list(range(images.num_images))
    objects = images.truth()["annotations"]
    wrong = [
        {"image_id": each["image_id"], "category_id": other, "bbox": each["bbox"], "score": 0.95}
        for each in objects
        for other in images.category_ids
        if other not in {o["category_id"] for o in objects if o["image_id"] == each["image_id"]}
    ]
    right = [{**each, "score": 0.9} for each in objects]
    nothing = Judged(np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64))
    found = Found([*right, *wrong], rows, {})
    assert compare(found, images, by_class=True)["ap"] < 0.9
    federated = replace(images, judged=nothing)
    assert compare(found, federated, by_class=True)["ap"] == pytest.approx(1)


def test_numbers_are_measured_on_their_own_classes(runs, tmp_path):
    scenes, own = str(runs / "scenes"), options(tmp_path, split="val")
    (result,) = evaluate(str(runs / "numbers"), "detection-map", [scenes], own)
    assert result.name == f"{scenes} (val)"
    with pytest.raises(UsageError, match="does not know 4 of the 24 classes"):
        evaluate(str(runs / "numbers"), "detection-map", [scenes], options(tmp_path))
    with pytest.raises(UsageError, match=r"classes by number .*--detection.classes texts"):
        evaluate(str(runs / "numbers"), "detection-zero-shot", [scenes], own)


def test_proposals_are_measured_by_how_many_objects_they_find(runs, tmp_path, monkeypatch):
    def two_boxes(finder, samples, loaders):
        return {
            row: found_like(samples, row, 2, objects=True) for row in range(samples.num_samples)
        }, {}

    monkeypatch.setattr(Finder, "in_samples", two_boxes)
    scenes = str(runs / "scenes")
    (result,) = evaluate(str(runs / "none"), "detection-map", [scenes], options(tmp_path))
    images = open_detection_set(scenes, split="test", root=Path("data"))
    counts = np.diff(images.offsets)
    assert set(result.metrics) == {"ar1", "ar10", "ar100"}
    assert result.headline == "ar100"
    assert result.metrics["ar100"] == pytest.approx(np.minimum(counts, 2).sum() / counts.sum())
    assert result.metrics["ar1"] == pytest.approx(len(counts) / counts.sum())
    assert result.shown == ["ar100", "ar10"]


@pytest.mark.parametrize("regions", ["crop", "pool"])
def test_proposals_are_named_by_the_towers(runs, tmp_path, regions):
    scenes = str(runs / "scenes")
    (result,) = evaluate(
        str(runs / "none"),
        "detection-zero-shot",
        [scenes],
        options(tmp_path, templates="none"),
        {"detection.regions": regions},
    )
    assert result.task == "detection_zero_shot"
    assert result.protocol["regions"] == regions
    assert (result.protocol["templates"], result.protocol["num_templates"]) == ("none", 1)
    found = found_in(tmp_path)
    assert {each["category_id"] for each in found} <= set(range(1, 25))
    assert found


def test_names_are_found_zero_shot_at_another_size(runs, tmp_path):
    scenes = str(runs / "scenes")
    ways = {"detection.test_sizes": "64,96", "detection.max_detections": "3"}
    (result,) = evaluate(
        str(runs / "texts"), "detection-zero-shot", [scenes], options(tmp_path), ways
    )
    assert result.protocol["image_size"] == "64, 96"
    assert "detection.test_sizes=64,96" in result.name
    found = found_in(tmp_path)
    assert np.unique([each["image_id"] for each in found], return_counts=True)[1].max() == 3


@pytest.mark.parametrize(
    ("run", "task", "changes", "overrides", "words"),
    [
        ("texts", "map", {}, {"detection.width": "32"}, "detection.width has no effect here"),
        ("texts", "map", {}, {"detection.test_size": "32"}, "unknown key detection.test_size"),
        ("none", "map", {}, {"detection.regions": "pool"}, "detection.regions has an effect on"),
        ("texts", "zero-shot", {"templates": "clip"}, {}, "--templates is for naming proposals"),
        ("texts", "map", {"download": True}, {}, "--download fetches no sets of boxes"),
    ],
)
def test_what_has_no_effect_is_refused(runs, tmp_path, run, task, changes, overrides, words):
    scenes = str(runs / "scenes")
    with pytest.raises(UsageError, match=words):
        evaluate(
            str(runs / run), f"detection-{task}", [scenes], options(tmp_path, **changes), overrides
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("aquarum", "no set of boxes .*did you mean aquarium"),
        ("aquarium", "aquarium needs its images and boxes in "),
        ("./missing", "no set of boxes and no file or folder"),
        ("all", "none of the sets of detection is there: .* lacks aquarium, bccd"),
    ],
)
def test_sets_that_are_not_there(runs, tmp_path, data, words):
    with pytest.raises(UsageError, match=words):
        evaluate(str(runs / "texts"), "detection-map", [data], options(tmp_path, root=tmp_path))


def test_all_are_the_papers_sets_that_are_there(runs, tmp_path, caplog):
    shutil.copytree(runs / "scenes", tmp_path / "bccd")
    (tmp_path / "pistols/test").mkdir(parents=True)
    (tmp_path / "pistols/test/_annotations.coco.json").write_text("{")
    own = options(tmp_path / "out", root=tmp_path)
    (result,) = evaluate(str(runs / "texts"), "detection-zero-shot", ["all"], own)
    assert result.dataset == "bccd"
    assert "left out: " in caplog.text
    assert "pistols/test/_annotations.coco.json is no JSON" in caplog.text
    assert "lacks aquarium, chess_pieces" in caplog.text


def test_a_folder_of_yolo_is_measured(runs, tmp_path):
    scenes = open_detection_set(str(runs / "scenes"), split="test", root=Path("data"))
    for part in ("images", "labels"):
        (tmp_path / "set/test" / part).mkdir(parents=True)
    for row in range(4):
        name, (height, width) = scenes.files.locate(row)[0], scenes.sizes[row]
        shutil.copy(runs / "scenes/test" / name, tmp_path / "set/test/images")
        boxes, labels, *_ = scenes.of(row)
        lines = [
            f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} "
            f"{(y2 - y1) / height}"
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True)
        ]
        (tmp_path / "set/test/labels" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    names = json.dumps(list(scenes.class_names))
    (tmp_path / "set/data.yaml").write_text(f"names: {names}\ntest: test/images\n")
    own = options(tmp_path / "out")
    (result,) = evaluate(str(runs / "texts"), "detection-map", [str(tmp_path / "set")], own)
    assert result.num_images == 4
    # The same images by COCO's JSON give the same figures.
    annotations = runs / "scenes/test/_annotations.coco.json"
    content = json.loads(annotations.read_text())
    ids = {each["id"] for each in content["images"][:4]}
    content["images"] = content["images"][:4]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    (tmp_path / "set/test/images/few.json").write_text(json.dumps(content))
    few = str(tmp_path / "set/test/images/few.json")
    (same,) = evaluate(str(runs / "texts"), "detection-map", [few], options(tmp_path / "same"))
    assert same.metrics == pytest.approx(result.metrics, abs=1e-6)
    assert same.name == few


def test_a_run_that_is_no_detector_is_told_how_to_become_one(runs):
    towers = replace(load(runs / "texts"), name="towers", skills={})
    with pytest.raises(UsageError, match="towers is no detector; train one on it: unicl train"):
        detector_of(towers)
