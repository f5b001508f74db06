import pytest
from PIL import Image

from adapters.detection.yolo import find_yaml, open_yolo
from tests.adapters.detection.layouts import picture
from unicl.errors import UniclError, UsageError


def described(folder, text, labels=(), **boxes):
    """Write data.yaml, images NAME.jpg of 40 x 20 in `folder/labels[0]`, and their boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(text)
    for name, lines in boxes.items():
        picture(folder / labels[0] / f"{name}.jpg", 40, 20)
        if lines is not None:
            path = folder / labels[1] / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)
    return folder / "data.yaml"


def opened(path, split="train"):
    return open_yolo(path, name="it", split=split)


ROBOFLOW = """
train: ../train/images
val: ../valid/images
test: ../test/images
nc: 2
names: ['cat', 'traffic_light']
"""
ULTRALYTICS = """
path: ../datasets/coco8  # where it was on another machine
train: images/train
val: images/val
names:
  0: cat
  2: dog
"""


def test_roboflow(tmp_path):
    places = ("train/images", "train/labels")
    path = described(
        tmp_path, ROBOFLOW, places, b="1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.1 0.1", a=None
    )
    described(tmp_path, ROBOFLOW, ("valid/images", "valid/labels"), v="0 .5 .5 1 1")
    found = opened(path)
    assert found.class_names == ("cat", "traffic light")
    assert found.category_ids == (0, 1)
    assert found.image_ids.tolist() == [1, 2]
    assert found.sizes.tolist() == [[20, 40], [20, 40]]
    assert found.offsets.tolist() == [0, 0, 2]
    assert found.of(1).boxes.tolist() == [[15, 5, 25, 15], [2, 1, 6, 3]]
    assert found.of(1).labels.tolist() == [1, 0]
    assert found.files.read(1).key == "b.jpg"
    assert opened(path, "val").boxes.tolist() == [[0, 0, 40, 20]]
    path.write_text(ROBOFLOW.replace("val:", "valid:"))
    assert opened(path, "val").boxes.tolist() == [[0, 0, 40, 20]]
    with pytest.raises(UsageError, match=r"names images in \.\./test/images, which is not below"):
        opened(path, "test")


def test_ultralytics(tmp_path):
    path = described(tmp_path, ULTRALYTICS, ("images/train", "labels/train"), a="2 .5 .5 .5 .5")
    described(tmp_path, ULTRALYTICS, ("images/val", "labels/val"), a="0 .5 .5 .5 .5")
    found = opened(path)
    assert found.class_names == ("cat", "dog")
    assert found.category_ids == (0, 2)
    assert found.labels.tolist() == [1]
    assert found.truth()["annotations"][0]["category_id"] == 2
    assert opened(path, "test").split == "val"


def test_lists_of_images_and_several_folders(tmp_path):
    text = "train: [one.txt, more]\nnames: [cat]\n"
    path = described(tmp_path, text, ("more/images", "more/labels"), b="0 .5 .5 1 1")
    described(tmp_path, text, ("images/x", "labels/x"), a="0 .5 .5 .5 .5", unlisted="0 .5 .5 1 1")
    (tmp_path / "one.txt").write_text("./images/x/a.jpg\n\n")
    found = opened(path)
    assert [found.files.read(row).key for row in range(2)] == [
        "images/x/a.jpg",
        "more/images/b.jpg",
    ]
    assert found.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 40, 20]]


def test_boxes_beside_the_images(tmp_path):
    path = described(tmp_path, "train: all\nnames: [cat]", ("all", "all"), a="0 .5 .5 .5 .5")
    assert len(opened(path).boxes) == 1


def test_polygons(tmp_path):
    lines = "0 .25 .5 .5 .25 .75 .75\n"
    path = described(tmp_path, ROBOFLOW, ("train/images", "train/labels"), a=lines)
    assert opened(path).boxes.tolist() == [[10, 5, 30, 15]]


def test_bad_boxes_are_counted(tmp_path):
    lines = """0 .5 .5 .5 .5
7 .5 .5 .5 .5
0.5 .5 .5 .5 .5
0 .5 .5 .5
0 .5 .5 .5 .5 .9
0 .5 x .5 .5
0 .5 .5 0 .5
0 .5 .5 nan .5
0 2.5 .5 .5 .5
0 0 .5 .5 .5
"""
    path = described(tmp_path, ROBOFLOW, ("train/images", "train/labels"), a=lines)
    found = opened(path)
    assert found.boxes.tolist() == [[10, 5, 30, 15], [0, 5, 10, 15]]
    assert found.skipped == {
        "box is not four numbers": 3,
        "unknown category": 2,
        "box is not finite": 1,
        "box without area": 1,
        "box out of the image": 1,
    }


def test_an_image_that_cannot_be_read(tmp_path):
    lines = "0 .5 .5 .5 .5"
    path = described(tmp_path, ROBOFLOW, ("train/images", "train/labels"), a=lines, b=lines)
    (tmp_path / "train/images/a.jpg").write_bytes(b"no image")
    found = opened(path)
    assert found.sizes.tolist() == [[0, 0], [20, 40]]
    assert found.skipped == {"image cannot be read": 1}
    assert found.num_images == 2


def test_sizes_are_of_the_upright_image(tmp_path):
    path = described(tmp_path, ROBOFLOW, ("train/images", "train/labels"), a="0 .5 .5 .5 .5")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "train/images/a.jpg", exif=exif)
    found = opened(path)
    assert found.sizes.tolist() == [[40, 20]]
    assert found.boxes.tolist() == [[5, 10, 15, 30]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "is no YAML, or damaged: "),
        ("- a", "it has no names"),
        ("train: images", "names no classes"),
        ("train: images\nnames: {a: b}", "names no classes"),
        ("train: images\nnames: []", "names no classes"),
        ("nc: 3\nnames: [a, b]", "has nc: 3, but 2 names; correct one of them"),
        ("train: images\nnames: [a]", "names images in images, which is not below"),
        ("train: empty\nnames: [a]", "has no images in empty; put them there"),
        ("train: !!python/object/apply:os.system [ls]\nnames: [a]", "is no YAML, or damaged"),
    ],
)
def test_bad_descriptions(tmp_path, text, message):
    (tmp_path / "empty").mkdir()
    path = described(tmp_path, text)
    with pytest.raises(UniclError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value)


def test_find_yaml(tmp_path):
    assert find_yaml(tmp_path) is None
    (tmp_path / "other.yaml").write_text("a: 1")
    assert find_yaml(tmp_path) is None
    (tmp_path / "coco8.yaml").write_text("names: [a]\ntrain: b")
    assert find_yaml(tmp_path) == tmp_path / "coco8.yaml"
    (tmp_path / "data.yaml").write_text("names: [a")
    assert find_yaml(tmp_path) == tmp_path / "data.yaml"
