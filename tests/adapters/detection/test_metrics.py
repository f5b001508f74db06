import contextlib
import copy
import io
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from adapters.detection.coco import open_coco
from adapters.detection.metrics import AGNOSTIC, agnostic, coco_metrics, to_coco
from tests.adapters.detection.layouts import picture, write
from unicl.errors import UniclError

KEYS = [
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
]


def drawn(seed, *, num_images=30, num_categories=4):
    """Draw objects of all sizes, and detections near to them and elsewhere."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 10 * each, "height": 400, "width": 400} for each in range(num_images)],
        "categories": [{"id": 2 * each, "name": f"c{each}"} for each in range(num_categories)],
        "annotations": [],
    }
    results = []
    for image in truth["images"][:-1]:
        for _ in range(random.integers(0, 6)):
            side = np.exp(random.uniform(2, 5, 2))
            box = [*random.uniform(0, 200, 2), *side]
            category = int(2 * random.integers(0, num_categories - 1))  # the last has no object
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [float(each) for each in box],
                    "area": float(box[2] * box[3] * random.uniform(0.4, 1)),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
            for _ in range(random.integers(0, 4)):
                near = box + random.normal(0, 0.08, 4) * [side[0], side[1], *side]
                other = random.random() < 0.2
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": int(2 * random.integers(0, num_categories))
                        if other
                        else category,
                        "bbox": [float(each) for each in near],
                        # Equal scores are common, and their order counts.
                        "score": round(float(random.random()), 1),
                    }
                )
    return truth, results


def pycocotools_stats(truth, results):
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def implementation(request, monkeypatch):
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools(implementation, seed):
    truth, results = drawn(seed)
    stats = zip(KEYS, pycocotools_stats(truth, results).stats, strict=True)
    expected = {key: value for key, value in stats if value != -1}
    found = coco_metrics(truth, results)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.05 < found["ap"] < 0.95


def test_equal_to_pycocotools_on_a_file(implementation, tmp_path):
    truth, results = drawn(5)
    for each in truth["annotations"]:
        each["bbox"] = [round(side, 2) for side in each["bbox"]]
    picture(tmp_path / "a.jpg")
    images = [{**each, "file_name": "a.jpg"} for each in truth["images"]]
    path = write(tmp_path / "x.json", images, truth["annotations"], truth["categories"])
    stats = zip(KEYS, pycocotools_stats(truth, results).stats, strict=True)
    found = coco_metrics(open_coco(path, name="it", split="").truth(), results)
    assert found == pytest.approx({key: value for key, value in stats if value != -1}, abs=1e-12)


def test_per_class(implementation):
    truth, results = drawn(1)
    truth["categories"][1]["name"] = "c0"
    precision = pycocotools_stats(truth, results).eval["precision"]
    expected = {
        f"ap/{name}": precision[:, :, number, 0, -1].mean()
        for number, name in enumerate(("c0 (0)", "c0 (2)", "c2"))
    }
    found = coco_metrics(truth, results, per_class=True)
    per_class = {key: value for key, value in found.items() if key.startswith("ap/")}
    assert per_class == pytest.approx(expected, abs=1e-12)
    assert found["ap"] == pytest.approx(np.mean(list(per_class.values())))


def test_silent_and_nothing_is_altered(implementation, capfd, caplog):
    truth, results = drawn(2)
    before = copy.deepcopy((truth, results))
    coco_metrics(truth, results, per_class=True)
    assert (truth, results) == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_perfect_and_none(implementation):
    truth, _ = drawn(3)
    perfect = [{**each, "score": 0.5} for each in truth["annotations"] if not each["iscrowd"]]
    found = coco_metrics(truth, perfect)
    assert found["ap"] == found["ap50"] == found["ar100"] == pytest.approx(1)
    nothing = coco_metrics(truth, [], per_class=True)
    assert set(nothing.values()) == {0.0}
    assert set(found) < set(nothing)
    assert "ap/c3" not in nothing


def test_no_objects_of_a_size_and_none_at_all(implementation):
    truth, results = drawn(0)
    for each in truth["annotations"]:
        each["area"] = 100.0
    found = coco_metrics(truth, results)
    assert "ap_small" in found
    assert found.keys().isdisjoint(("ap_medium", "ap_large", "ar_medium", "ar_large"))
    assert coco_metrics({**truth, "annotations": []}, results, per_class=True) == {}
    assert coco_metrics({**truth, "annotations": []}, []) == {}


def test_results_of_another_set(implementation):
    truth, results = drawn(0)
    with pytest.raises(
        UniclError, match=r"1 results are of an image that the set does not have, such as image 11"
    ):
        coco_metrics(truth, [*results, {**results[0], "image_id": 11}])
    with pytest.raises(UniclError, match=r"of a category that the set does not have, such as cat"):
        coco_metrics(truth, [*results, {**results[0], "category_id": 1}])
    with pytest.raises(UniclError, match="1 results have a box or score that is no finite number"):
        coco_metrics(truth, [*results, {**results[0], "score": float("nan")}])


def test_nothing_installed(monkeypatch):
    for name in ("faster_coco_eval", "pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UniclError, match="pip install pycocotools"):
        coco_metrics(*drawn(0))


def test_to_coco():
    boxes = torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]])
    scores, labels = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
    expected = [
        {"image_id": 9, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.25},
    ]
    assert to_coco(9, boxes, scores, labels, (3, 7)) == expected
    assert to_coco(9, boxes.numpy(), scores.numpy(), labels.numpy(), (3, 7)) == expected
    assert boxes[0].tolist() == [1, 2, 4, 8]
    assert to_coco(9, boxes[:0], scores[:0], labels[:0], (3, 7)) == []


def test_agnostic(implementation):
    truth, _ = drawn(0)
    results = [
        {"image_id": each["image_id"], "category_id": AGNOSTIC, "bbox": each["bbox"], "score": 1.0}
        for each in truth["annotations"]
    ]
    assert coco_metrics(agnostic(truth), results)["ar100"] == pytest.approx(1)
    assert {each["category_id"] for each in truth["annotations"]} == {0, 2, 4}
