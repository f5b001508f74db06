"""A model that knows the truth finds all of it, whatever happens to images on the way."""

import pytest
import torch
from PIL import Image
from scipy.ndimage import find_objects, label
from torch import distributed as dist
from torch import nn

from adapters.detection.anchors import encode_boxes
from adapters.detection.config import DetectionConfig
from adapters.detection.detector import Detector
from adapters.detection.finding import Finder
from adapters.detection.measuring import AveragePrecision, build_loaders, find_all
from adapters.detection.metrics import agnostic, coco_metrics
from adapters.detection.sets import open_detection_set
from tests.adapters.detection.painted import COLOURS, write_painted
from tests.unicl.ranks import on_ranks
from unicl.distributed import ALONE, Ranks
from unicl.errors import UsageError
from unicl.models import load

NAMES = ("red", "green", "blue")
IMAGES = [
    [("red", (4, 4, 24, 30)), ("blue", (40, 10, 70, 50))],
    [],
    [("green", (10, 20, 40, 60))],
    [("green", (2, 2, 20, 20)), ("green", (30, 30, 60, 60)), ("red", (60, 2, 80, 20))],
    [("blue", (0, 0, 84, 60))],
    [("red", (150, 100, 200, 180)), ("green", (20, 20, 60, 90))],
]
SIZES = {4: (300, 64), 5: (240, 200)}


class Seer(Detector):
    """Sees the rectangles of an image, and says so at the anchors nearest to them."""

    def __init__(self, outputs, names=NAMES):
        nn.Module.__init__(self)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.by_text, self.num_levels, self.anchor_scale = False, 3, 8.0
        self.outputs, self.colours = outputs, [COLOURS[name] for name in names]

    def places(self, images):
        anchors = torch.cat(self.anchors(*images.shape[-2:]))
        found = torch.full((len(images), len(anchors), self.outputs + 5), -20.0)
        found[..., self.outputs : self.outputs + 4] = 0
        for image, own in zip(images, found, strict=True):
            for box, number in self._rectangles(image.float()):
                free = own[:, : self.outputs].amax(1) < 0
                middle = (box[:2] + box[2:]) / 2
                off = ((anchors[:, :2] + anchors[:, 2:]) / 2 - middle).norm(dim=1)
                place = (off + 1e6 * ~free).argmin()
                own[place, min(number, self.outputs - 1)] = 20
                own[place, -5:-1] = encode_boxes(box[None], anchors[place][None])[0]
                own[place, -1] = 20
        return found

    def _rectangles(self, image):
        for number, colour in enumerate(self.colours):
            near = (image - torch.tensor(colour).view(3, 1, 1)).abs().amax(0) < 95
            for rows, columns in find_objects(label(near.numpy())[0]):
                edges = [columns.start, rows.start, columns.stop, rows.stop]
                if min(edges[2] - edges[0], edges[3] - edges[1]) > 2:
                    yield torch.tensor(edges).float(), number


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    return write_painted(folder, IMAGES, list(NAMES), sizes=SIZES.items())


def config(*sizes, classes="numbers", names=NAMES, max_size=1000):
    names = names if classes == "numbers" else ()
    return DetectionConfig(
        classes=classes, class_names=names, num_levels=3, test_sizes=sizes, max_size=max_size,
        min_sizes=(64,),
    )  # fmt: skip


def found_by(finder, images, ranks=ALONE, *, batch_size=8, workers=0):
    loaders = build_loaders(
        images, finder.config, batch_size=batch_size, num_workers=workers, ranks=ranks
    )
    results, _, skipped = find_all(finder, images, loaders, ranks)
    return results, skipped


def test_the_truth_has_an_ap_of_one(painted):
    finder = Finder(Seer(3), config(64))
    results, skipped = found_by(finder, painted)
    # Image 5 is smaller then, so that its boxes are no longer whole pixels.
    assert coco_metrics(painted.truth(), results)["ap75"] == pytest.approx(1)
    assert skipped == {}
    small = [each for each in results if each["image_id"] != 105]
    truth = {each["id"]: each for each in painted.truth()["annotations"]}
    assert len(results) == len(truth) == 9
    boxes = sorted(each["bbox"] for each in truth.values() if each["image_id"] != 105)
    for one, other in zip(sorted(each["bbox"] for each in small), boxes, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert all(each["score"] > 0.99 for each in results)


@pytest.mark.parametrize(
    ("sizes", "max_size"), [((128,), 1000), ((200,), 1000), ((64, 96, 128), 1000), ((96,), 160)]
)
def test_boxes_come_back_in_pixels_of_the_originals(painted, sizes, max_size):
    results, _ = found_by(Finder(Seer(3), config(*sizes, max_size=max_size)), painted, workers=1)
    metrics = coco_metrics(painted.truth(), results)
    assert metrics["ap50"] == pytest.approx(1)
    assert metrics["ap"] > 0.85
    if len(sizes) > 1:
        assert len(results) < 2 * 9  # what several sizes show is one object


def test_one_image_is_seen_as_in_a_batch(painted):
    finder = Finder(Seer(3), config(64, 128))
    results, _ = found_by(finder, painted)
    for row, image_id in enumerate(painted.image_ids.tolist()):
        with Image.open(painted.where.parent / f"{row}.png") as image:
            found = finder.in_image(image.convert("RGB"))
        own = [each for each in results if each["image_id"] == image_id]
        assert [each["category_id"] - 5 for each in own] == found.labels.tolist()
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in own)]
        torch.testing.assert_close(
            torch.tensor(corners).view(-1, 4), found.boxes, rtol=1e-4, atol=1e-3
        )


def test_objects_of_no_class(painted):
    results, _ = found_by(Finder(Seer(1), config(64, classes="none")), painted)
    assert {each["category_id"] for each in results} == {1}
    metrics = coco_metrics(agnostic(painted.truth()), results)
    assert metrics["ar100"] > 0.95


def test_ids_are_those_of_the_annotations(runs):
    images = open_detection_set(str(runs / "scenes"), split="test", root=runs)
    assert min(images.category_ids) == 1
    own = load(runs / "texts").skills["detect"].finder(images.class_names)
    results, _ = found_by(own, images)
    truth = images.truth()
    assert {each["image_id"] for each in results} <= {each["id"] for each in truth["images"]}
    assert {each["category_id"] for each in results} <= {each["id"] for each in truth["categories"]}


def test_other_numbers_for_the_same_names(painted):
    """The detector has its classes in another order, and more of them."""
    known = ("Blue", "white", "Red", "green")
    finder = Finder(Seer(4, [name.lower() for name in known]), config(64, names=known))
    results, _ = found_by(finder, painted)
    assert coco_metrics(painted.truth(), results)["ap50"] == pytest.approx(1)
    assert {each["category_id"] for each in results} == {5, 6, 7}
    with pytest.raises(UsageError, match=r"does not know 1 of the 3 classes of .*, such as 'blue'"):
        found_by(Finder(Seer(2), config(64, names=("red", "green"))), painted)


def test_what_is_no_class_of_the_set_is_left_out(tmp_path):
    known = ("blue", "red", "green", "white")
    other = write_painted(tmp_path, [[("red", (4, 4, 24, 30))]], ["red"])
    picture = Image.open(tmp_path / "0.png")
    picture.paste(COLOURS["white"], (40, 20, 70, 50))
    picture.save(tmp_path / "0.png")
    picture.close()
    results, _ = found_by(Finder(Seer(4, known), config(64, names=known)), other)
    assert [each["category_id"] for each in results] == [5]


def test_images_that_cannot_be_read_are_counted(tmp_path):
    painted = write_painted(tmp_path, IMAGES, list(NAMES), sizes=SIZES.items())
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").write_bytes(b"")
    results, skipped = found_by(Finder(Seer(3), config(64, 96)), painted)
    assert sum(skipped.values()) == 2
    assert not {each["image_id"] for each in results} & {100, 102}


def check_ranks(images):
    ranks = Ranks(dist.group.WORLD)
    for sizes in ((64,), (64, 96)):
        finder = Finder(Seer(3), config(*sizes))
        alone, _ = found_by(finder, images)
        together, _ = found_by(finder, images, ranks)
        assert len(together) == len(alone)
        for one, other in zip(together, alone, strict=True):
            assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
            assert (one["image_id"], one["category_id"]) == (
                other["image_id"],
                other["category_id"],
            )


def test_ranks_share_the_images(painted):
    on_ranks(2, check_ranks, painted)


def test_an_empty_batch_finds_nothing():
    none = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    sizes = torch.zeros(0, 2, dtype=torch.int64)
    assert Finder(Seer(3), config(64))._in_batch(none, sizes, sizes) == []


@pytest.mark.parametrize("regions", ["crop", "pool"])
def test_proposals_are_named(runs, regions):
    images = open_detection_set(str(runs / "scenes"), split="test", root=runs)
    detect = load(runs / "none").skills["detect"]
    given = DetectionConfig(
        **{**vars(detect.config), "regions": regions, "score_threshold": 0.0, "max_detections": 7}
    )
    finder = detect.finder(images.class_names, config=given)
    results, _ = found_by(finder, images)
    assert len(results) == 14 * 7
    assert {each["category_id"] for each in results} <= set(images.category_ids)
    assert coco_metrics(images.truth(), results)["ap"] >= 0


def test_the_evaluator_says_what_finding_does(painted):
    loaders = build_loaders(painted, config(64), batch_size=4, num_workers=0)
    evaluator = AveragePrecision(
        painted, loaders, config(64), tokenize=lambda texts: torch.zeros(1)
    )
    metrics = evaluator(Seer(3))
    assert metrics["detection/ap50"] == pytest.approx(1)
    assert all(name.startswith("detection/") for name in metrics)
