import json
import math

import numpy as np
import pytest

from adapters.detection.coco import open_coco
from tests.adapters.detection.layouts import (
    CATEGORIES,
    ROBOFLOW,
    box,
    image,
    part,
    picture,
    write,
)
from unicl.data.image_sets import MissingSetError
from unicl.errors import UniclError, UsageError


def opened(path):
    return open_coco(path, name="it", split="")


def annotated(tmp_path, *annotations):
    """Open two images of 40 x 30 with these annotations."""
    images = [image(5, "a.jpg"), image(2, "b.jpg")]
    return opened(write(tmp_path / "boxes.json", images, list(annotations), pictures=tmp_path))


def test_a_file(tmp_path):
    found = annotated(
        tmp_path,
        box(11, 2, 7, [1, 2, 10, 20], area=50.5),
        box(12, 5, 3, [0, 0, 5, 5]),
        box(13, 2, 3, [3.5, 4, 1, 2], iscrowd=1),
    )
    assert found.class_names == ("dog", "stop sign")
    assert found.category_ids == (3, 7)
    assert found.image_ids.tolist() == [5, 2]
    assert found.sizes.tolist() == [[30, 40], [30, 40]]
    assert found.offsets.tolist() == [0, 1, 3]
    assert found.boxes.tolist() == [[0, 0, 5, 5], [1, 2, 11, 22], [3.5, 4, 4.5, 6]]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.crowd.tolist() == [False, False, True]
    assert found.areas.tolist() == [25, 50.5, 2]
    assert found.skipped == {}
    assert found.judged is None
    assert [found.files.locate(row)[0] for row in range(2)] == ["a.jpg", "b.jpg"]
    assert found.files.read(0).image[:2] == b"\xff\xd8"
    assert found.where == (tmp_path / "boxes.json").absolute()


def test_boxes_keep_their_order(tmp_path):
    random = np.random.default_rng(0)
    owners = random.choice([5, 2], 200).tolist()
    lefts = random.integers(0, 30, 200).tolist()
    rows = zip(owners, lefts, strict=True)
    found = annotated(
        tmp_path, *(box(place, owner, 3, [x, 0, 1, 1]) for place, (owner, x) in enumerate(rows))
    )
    for index, image_id in enumerate([5, 2]):
        expected = [x for owner, x in zip(owners, lefts, strict=True) if owner == image_id]
        assert found.of(index).boxes[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([1, 2, 0, 5], "box without area"),
        ([1, 2, 3, -4], "box without area"),
        ([40, 2, 3, 4], "box out of the image"),
        ([-9, 2, 9, 4], "box out of the image"),
        ([1, 2, math.nan, 4], "box is not finite"),
        ([1, 2, math.inf, 4], "box is not finite"),
        ([1, 2, 3], "box is not four numbers"),
        ([1, 2, 3, 4, 5], "box is not four numbers"),
        ([1, 2, "3", 4], "box is not four numbers"),
        ([1, 2, None, 4], "box is not four numbers"),
        ({"x": 1}, "box is not four numbers"),
        (7, "box is not four numbers"),
        ([], "no box"),
        (None, "no box"),
    ],
)
def test_a_bad_box_is_left_out_and_counted(tmp_path, bbox, reason):
    found = annotated(tmp_path, box(1, 5, 3, bbox), box(2, 2, 3))
    assert found.skipped == {reason: 1}
    assert found.boxes.tolist() == [[1, 2, 11, 22]]
    assert found.offsets.tolist() == [0, 0, 1]


def test_other_bad_annotations(tmp_path):
    without = box(1, 5, 3)
    del without["bbox"]
    found = annotated(
        tmp_path,
        without,
        box(2, 99, 3),
        box(3, 5, 99),
        box(4, [5], 3),
        box(5, 5, {}),
        box(6, 5, 3),
    )
    assert found.skipped == {"no box": 1, "unknown image": 2, "unknown category": 2}
    assert found.of(0).boxes.tolist() == [[1, 2, 11, 22]]
    assert found.of(1).boxes.shape == (0, 4)  # an image without objects is kept


def test_a_box_is_cut_at_the_border(tmp_path):
    found = annotated(tmp_path, box(1, 5, 3, [-5, 10, 100, 100]))
    assert found.boxes.tolist() == [[0, 10, 40, 30]]
    assert found.skipped == {}


def test_unknown_sizes_cut_nothing(tmp_path):
    picture(tmp_path / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": None}]
    found = opened(write(tmp_path / "x.json", images, [box(1, 1, 3, [-5, 10, 100, 100])]))
    assert found.sizes.tolist() == [[0, 0]]
    assert found.boxes.tolist() == [[0, 10, 95, 110]]


@pytest.mark.parametrize("size", [math.nan, math.inf, -3, "40", 2**40, [1]])
def test_sizes_that_are_none(tmp_path, size):
    picture(tmp_path / "a.jpg")
    found = opened(write(tmp_path / "x.json", [image(1, "a.jpg", size)], [box(1, 1, 3)]))
    assert found.sizes.tolist() == [[30, 0]]


def test_no_box_that_can_be_used(tmp_path):
    with pytest.raises(UsageError, match=r"none of the 2 boxes of .*boxes.json can be used \(un"):
        annotated(tmp_path, box(1, "5", 3), box(2, "2", 3))


def test_images_without_any_annotation(tmp_path):
    found = annotated(tmp_path)
    assert found.offsets.tolist() == [0, 0, 0]
    assert found.truth()["annotations"] == []


def test_repeated_ids(tmp_path):
    with pytest.raises(UniclError, match=r"two annotations with id 4; number"):
        annotated(tmp_path, box(4, 5, 3), box(4, 2, 3))
    path = write(tmp_path / "i.json", [image(6, "a.jpg"), image(6, "b.jpg")], [])
    with pytest.raises(UniclError, match="two images with id 6; remove one"):
        opened(path)
    path = write(tmp_path / "c.json", [image(6, "a.jpg")], [], [CATEGORIES[0], CATEGORIES[0]])
    with pytest.raises(UniclError, match="two categories with id 3; remove one"):
        opened(path)


def test_ids_that_are_none(tmp_path):
    with pytest.raises(UniclError, match=r"annotation with id 'x', which is no whole number"):
        annotated(tmp_path, box("x", 5, 3))
    for number in ("3", None):
        path = write(tmp_path / "c.json", [image(6, "a.jpg")], [], [{"id": number, "name": "x"}])
        with pytest.raises(UniclError, match="has a category with id"):
            opened(path)
    with pytest.raises(UniclError, match=r"image with id None, which is neither"):
        opened(write(tmp_path / "i.json", [image(None, "a.jpg")], []))
    annotations = [box(1, 5, 3), box(2, 5, 3)]
    for each in annotations:
        del each["id"]
    assert len(annotated(tmp_path, *annotations).boxes) == 2


def test_ids_of_images_that_are_texts(tmp_path):
    for first, second in (("f0", "b7"), (3, "b7"), (2**63, 5)):
        images = [image(first, "a.jpg"), image(second, "b.jpg")]
        path = write(tmp_path / "x.json", images, [box(1, second, 3)], pictures=tmp_path)
        found = opened(path)
        assert found.image_ids.tolist() == [1, 2]
        assert found.offsets.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is no JSON, or damaged: "),
        ("\xff", "is no JSON, or damaged: "),
        ("[" * 200_000, "is no JSON, or damaged: "),
        ("[]", "no file of COCO's annotations, which is an object"),
        ("{}", "no file of COCO's boxes: it has no list of images"),
        ('{"images": []}', "it has no list of categories"),
        ('{"images": [], "categories": [1]}', "bad categories"),
        ('{"images": [], "categories": []}', "names no images"),
        ('{"images": [], "categories": [], "annotations": [{}]}', "have no image_id"),
        ('{"images": [], "categories": [], "annotations": {}}', "no list of annotations"),
        ('{"images": [], "categories": [], "annotations": [null]}', "an annotation that is null"),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1, "x": '
            '{"image_id": 2}}]}',
            "has annotations inside of others",
        ),
        ('{"images": [{"id": 1}], "categories": []}', "image 1 has no file_name"),
        (
            '{"images": [{"id": 1, "file_name": "\\ud800"}], "categories": []}',
            "of image 1 is no file name",
        ),
    ],
)
def test_what_is_no_such_file(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text, "latin-1")
    with pytest.raises(UniclError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UniclError, match=r"cannot read .*: No such file"):
        opened(tmp_path / "none.json")
    path = write(tmp_path / "x.json", [image(1, "a.jpg")], [])
    with pytest.raises(MissingSetError, match=r"none of the images of .* such as a\.jpg; put them"):
        opened(path)


def test_a_byte_order_mark(tmp_path):
    picture(tmp_path / "a.jpg")
    path = write(tmp_path / "x.json", [image(1, "a.jpg")], [])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert opened(path).num_images == 1


def test_a_missing_image_is_no_error(tmp_path):
    path = write(tmp_path / "x.json", [image(1, "a.jpg"), image(2, "b.jpg")], [box(1, 2, 3)])
    picture(tmp_path / "a.jpg")
    found = opened(path)
    before = found.digest()
    picture(tmp_path / "b.jpg")
    assert opened(path).digest() != before


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("x.json", ""),
        ("x.json", "x"),
        ("x.json", "images"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("labels/train.json", "train"),
        ("labels/train.json", "images"),
        ("data/train_labels.json", "data/train"),
    ],
)
def test_where_images_lie(tmp_path, annotations, images):
    found = opened(part(tmp_path / annotations, pictures=tmp_path / images))
    assert found.files.folder == tmp_path / images
    assert found.files.read(0).key == "a.jpg"


def test_images_of_one_name_in_two_folders(tmp_path):
    images = [image(1, "x/a.jpg", 40), image(2, "y/a.jpg", 50)]
    found = opened(write(tmp_path / "boxes.json", images, [], pictures=tmp_path))
    assert found.files.read(0).image != found.files.read(1).image
    # Without their folders the two would be one.
    picture(tmp_path / "far" / "other" / "a.jpg")
    path = write(tmp_path / "far" / "other" / "boxes.json", images, [])
    with pytest.raises(MissingSetError):
        opened(path)


def test_most_images_decide_on_the_folder(tmp_path):
    images = [image(number, f"{number}.jpg") for number in range(5)]
    path = write(tmp_path / "boxes.json", images, [], pictures=tmp_path / "images")
    picture(tmp_path / "3.jpg")
    assert opened(path).files.folder == tmp_path / "images"


def test_lvis(tmp_path):
    url = "http://images.cocodataset.org/{}2017/{}.jpg"
    images = [
        {
            "id": number,
            "width": 40,
            "height": 30,
            "coco_url": url.format(where, number),
            "neg_category_ids": absent,
            "not_exhaustive_category_ids": partly,
        }
        for number, where, absent, partly in [(1, "train", [4, 1], [2]), (2, "val", [], [])]
    ]
    categories = [
        {"id": number, "name": name, "synonyms": [], "frequency": "r"}
        for number, name in enumerate(["aerosol_can", "bat_(animal)", "cup", "dog"], start=1)
    ]
    annotations = [box(1, 1, 2), box(2, 1, 3), box(3, 1, 3), box(4, 2, 2)]
    for where, number in (("train2017", 1), ("val2017", 2)):
        picture(tmp_path / "coco" / where / f"{number}.jpg")
    found = opened(write(tmp_path / "lvis/lvis_v1_train.json", images, annotations, categories))
    assert found.class_names == ("aerosol can", "bat (animal)", "cup", "dog")
    assert found.files.read(0).key == "train2017/1.jpg"
    assert found.of(0).judged.tolist() == [0, 2, 3]
    assert found.of(1).judged.tolist() == [1]
    assert found.at([1, 0]).of(1).judged.tolist() == [0, 2, 3]


def test_objects365(tmp_path):
    images = [
        image(900, "images/v1/patch8/objects365_v1_00420917.jpg"),
        image(901, "images/v2/patch9/objects365_v2_00420918.jpg"),
    ]
    categories = [{"id": 1, "name": "Person"}, {"id": 56, "name": "Pen/Pencil"}]
    annotations = [box(1, 901, 56, isfake=0, isreflected=0, iscrowd=0)]
    folder = tmp_path / "objects365"
    for each in images:
        picture(folder / "train" / each["file_name"].split("/", 2)[2])
    found = opened(
        write(folder / "annotations/zhiyuan_objv2_train.json", images, annotations, categories)
    )
    assert found.files.read(0).key == "patch8/objects365_v1_00420917.jpg"
    assert found.class_names == ("Person", "Pen/Pencil")
    assert found.of(1).labels.tolist() == [1]


def test_roboflow_super_category_is_no_class(tmp_path):
    path = part(
        tmp_path / "train/_annotations.coco.json",
        category=2,
        categories=ROBOFLOW,
        pictures=tmp_path / "train",
    )
    found = opened(path)
    assert found.class_names == ("cat", "dog")
    assert found.category_ids == (1, 2)
    assert found.labels.tolist() == [1]
    truth = found.truth()
    assert truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert truth["annotations"][0]["category_id"] == 2


@pytest.mark.parametrize("name", ["pets", "cat"])
def test_a_super_category_of_the_same_name(tmp_path, name):
    categories = [{"id": 0, "name": name, "supercategory": "none"}]
    categories.append({"id": 1, "name": "cat", "supercategory": name})
    path = part(tmp_path / "x.json", category=1, categories=categories, pictures=tmp_path)
    assert opened(path).category_ids == (1,)


def test_a_super_category_that_is_annotated_somewhere_is_a_class(tmp_path):
    for where, category in (("train", 2), ("valid", 1), ("test", 0)):
        path = tmp_path / where / "_annotations.coco.json"
        part(path, category=category, categories=ROBOFLOW, pictures=path.parent)
    for where in ("train", "test"):
        found = opened(tmp_path / where / "_annotations.coco.json")
        assert found.category_ids == (0, 1, 2)


def test_a_category_beside_others_is_a_class(tmp_path):
    categories = [*ROBOFLOW, {"id": 3, "name": "car", "supercategory": "vehicle"}]
    path = part(tmp_path / "x.json", category=1, categories=categories, pictures=tmp_path)
    assert opened(path).category_ids == (0, 1, 2, 3)
    path = part(tmp_path / "x.json", category=0, categories=ROBOFLOW[:1], pictures=tmp_path)
    assert opened(path).category_ids == (0,)


def test_masks_are_passed_over(tmp_path):
    found = annotated(
        tmp_path,
        box(1, 5, 3, segmentation=[[1, 2, 3, 4, 5, 6]], area=7),
        box(2, 5, 3, segmentation={"size": [30, 40], "counts": [1, 2]}, iscrowd=1),
    )
    assert len(found.boxes) == 2
    np.testing.assert_array_equal(found.areas, np.float32([7, 200]))


def test_what_comes_last_in_the_file_does_not_matter(tmp_path):
    picture(tmp_path / "a.jpg")
    path = tmp_path / "x.json"
    content = {
        "annotations": [box(1, 1, 7)],
        "categories": CATEGORIES[::-1],
        "images": [image(1, "a.jpg")],
    }
    path.write_text(json.dumps(content))
    assert opened(path).labels.tolist() == [1]
    assert opened(path).category_ids == (3, 7)
