import pytest

from adapters.detection.open_images import find_tables, open_open_images
from tests.adapters.detection.layouts import picture
from unicl.data.image_sets import MissingSetError
from unicl.errors import UniclError, UsageError

CLASSES = "/m/0dzct,Human face\n/m/0bt9lr,Dog\n/m/01g317,Person\n"
HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
    "IsDepiction,IsInside\n"
)
BOXES = (
    f"{HEADER}"
    "0001,xclick,/m/0bt9lr,1,0.25,0.75,0.5,1,0,0,0,0,0\n"
    "0002,xclick,/m/0dzct,1,0,0.5,0,0.5,0,0,1,0,0\n"
    "0001,xclick,/m/none,1,0,0.5,0,0.5,0,0,0,0,0\n"
)
LABELS = (
    "ImageID,Source,LabelName,Confidence\n"
    "0001,verification,/m/01g317,0\n0001,verification,/m/0bt9lr,1\n0001,verification,/m/none,1\n"
    "0003,verification,/m/0dzct,0\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/class-descriptions-boxable.csv").write_text(CLASSES)
    (tmp_path / "annotations/oidv6-train-annotations-bbox.csv").write_text(BOXES)
    (tmp_path / "annotations/validation-annotations-bbox.csv").write_text(BOXES)
    path = tmp_path / "annotations/train-annotations-human-imagelabels-boxable.csv"
    path.write_text(LABELS)
    for place in ("train", "images/validation"):
        for name in ("0001", "0002", "0003"):
            picture(tmp_path / place / f"{name}.jpg", 40, 20)
    return tmp_path


def opened(folder, split="train"):
    return open_open_images(folder, name="it", split=split)


def test_the_tables(folder):
    assert find_tables(folder) == folder / "annotations/class-descriptions-boxable.csv"
    found = opened(folder)
    assert found.class_names == ("Human face", "Dog", "Person")
    assert found.category_ids == (1, 2, 3)
    assert [found.files.read(row).key for row in range(3)] == ["0001.jpg", "0002.jpg", "0003.jpg"]
    assert found.sizes.tolist() == [[20, 40]] * 3
    assert found.boxes.tolist() == [[10, 10, 30, 20], [0, 0, 20, 10]]
    assert found.labels.tolist() == [1, 0]
    assert found.crowd.tolist() == [False, True]
    assert found.skipped == {"unknown category": 1}
    assert [found.of(row).judged.tolist() for row in range(3)] == [[1, 2], [0], [0]]


def test_without_verified_labels(folder):
    found = opened(folder, "val")
    assert found.judged is None
    assert found.num_images == 2
    assert opened(folder, "test").split == "val"


def test_a_header_of_the_classes(folder):
    path = folder / "annotations/class-descriptions-boxable.csv"
    path.rename(path.with_name("oidv7-class-descriptions-boxable.csv"))
    path = path.with_name("oidv7-class-descriptions-boxable.csv")
    path.write_text(f"LabelName,DisplayName\n{CLASSES}")
    assert opened(folder).class_names == ("Human face", "Dog", "Person")
    path.write_text("a,b,c\n")
    with pytest.raises(UniclError, match="no table of classes: a row is LABEL,NAME"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageID,LabelName\n", "has no column XMin, XMax, YMin, YMax"),
        ("", "has no column ImageID, LabelName"),
        (BOXES.replace("0.75", "x"), "line 2 has a side that is no number"),
        (BOXES.replace("0.75,", ""), "line 2 has 12 cells, not 13"),
        (BOXES + '"', "line 5 has 1 cells, not 13"),
    ],
)
def test_damaged_tables(folder, text, message):
    (folder / "annotations/oidv6-train-annotations-bbox.csv").write_text(text)
    with pytest.raises(UniclError, match=message):
        opened(folder)


def test_what_is_missing(folder, tmp_path):
    (folder / "annotations/validation-annotations-bbox.csv").unlink()
    with pytest.raises(UsageError, match="it has no split 'test'; it has train"):
        opened(folder, "test")
    for each in (folder / "train").iterdir():
        each.unlink()
    with pytest.raises(MissingSetError, match=r"none of the images is there, such as 0001\.jpg;"):
        opened(folder)
    with pytest.raises(MissingSetError, match=r"lacks class-descriptions-boxable\.csv"):
        opened(folder / "images")
    assert find_tables(folder / "images") is None
