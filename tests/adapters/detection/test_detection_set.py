import pickle

import numpy as np
import pytest

from adapters.detection.coco import open_coco
from adapters.detection.detection_set import DetectionSet, Judged, ListedFiles
from tests.adapters.detection.layouts import box, image, picture, write
from unicl.errors import UsageError


@pytest.fixture
def found(tmp_path):
    images = [image(number, f"{number}.jpg", 40 + number) for number in (8, 2, 5)]
    annotations = [
        box(31, 2, 7, [1, 2, 10, 20], area=3),
        box(30, 5, 3, [0.25, 0, 5, 5], iscrowd=1),
        box(32, 2, 3, [3, 4, 5, 6]),
    ]
    path = write(tmp_path / "x.json", images, annotations, pictures=tmp_path)
    return open_coco(path, name="it", split="val")


def test_of(found):
    assert str(found) == "it (val)"
    assert found.num_images == 3
    assert [len(found.of(index).boxes) for index in range(3)] == [0, 2, 1]
    boxes, labels, crowd, judged = found.of(2)
    assert (boxes.tolist(), labels.tolist(), crowd.tolist()) == ([[0.25, 0, 5.25, 5]], [0], [True])
    assert judged is None


def test_at(found):
    some = found.at([2, 1, 2])
    assert some.image_ids.tolist() == [5, 2, 5]
    assert some.sizes.tolist() == [[30, 45], [30, 42], [30, 45]]
    assert some.offsets.tolist() == [0, 1, 3, 4]
    assert some.files.num_samples == 3
    for place, row in enumerate([2, 1, 2]):
        np.testing.assert_array_equal(some.of(place).boxes, found.of(row).boxes)
        assert some.files.read(place).key == found.files.read(row).key
        assert some.files.locate(place) == found.files.locate(row)
    assert some.areas.tolist() == [25, 3, 30, 25]
    assert some.at(np.array([1])).of(0).labels.tolist() == [1, 0]
    with pytest.raises(IndexError):
        some.files.read(3)
    with pytest.raises(UsageError, match=r"it \(val\) holds no images"):
        found.at([])


def test_truth(found):
    truth = found.truth()
    assert truth["images"][0] == {"id": 8, "height": 30, "width": 48, "file_name": "8.jpg"}
    assert truth["annotations"] == [
        box(1, 2, 7, [1, 2, 10, 20], area=3, iscrowd=0),
        box(2, 2, 3, [3, 4, 5, 6], area=30, iscrowd=0),
        box(3, 5, 3, [0.25, 0, 5, 5], area=25, iscrowd=1),
    ]
    assert truth["categories"] == [{"id": 3, "name": "dog"}, {"id": 7, "name": "stop sign"}]
    assert found.at([2]).truth()["annotations"][0]["image_id"] == 5


def test_truth_opens_again(found, tmp_path):
    truth = found.truth()
    path = write(tmp_path / "again.json", **{key: truth[key] for key in ("images", "annotations")})
    again = open_coco(path, name="it", split="val")
    for name in ("boxes", "labels", "crowd", "offsets", "areas", "image_ids", "sizes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_digest(found, tmp_path):
    digest = found.digest()
    assert open_coco(tmp_path / "x.json", name="other", split="").digest() == digest
    assert pickle.loads(pickle.dumps(found)).digest() == digest
    parts = [found.at([0, 1]), found.at([1, 0])]
    boxes = found.boxes.copy()
    boxes[0, 0] += 1
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    moved = DetectionSet(**{**fields, "boxes": boxes})
    renamed = DetectionSet(**{**fields, "class_names": ("cat", "stop sign")})
    judged = DetectionSet(**{**fields, "judged": Judged(np.zeros(0, np.int32), np.zeros(4, int))})
    others = [each.digest() for each in (*parts, moved, renamed, judged)]
    assert len({digest, *others}) == 6
    picture(tmp_path / "8.jpg", 48, 31)
    assert found.digest() != digest


def test_listed_files(tmp_path):
    picture(tmp_path / "a.jpg")
    digest = ListedFiles(tmp_path, ["a.jpg", "b.jpg"]).digest()
    assert digest != ListedFiles(tmp_path, ["b.jpg", "a.jpg"]).digest()
    assert digest == ListedFiles(tmp_path, ["a.jpg", "b.jpg"]).digest()


def test_judged_of_pairs():
    owners, numbers = np.array([2, 0, 2, 2]), np.array([1, 3, 0, 1])
    judged = Judged.of_pairs(owners, numbers, num_images=4, num_classes=5)
    assert judged.numbers.tolist() == [3, 0, 1]
    assert judged.offsets.tolist() == [0, 1, 1, 3, 3]
