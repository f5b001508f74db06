"""COCO's own files of captions."""

import json

import pytest

from tests.unicl.corpus import png
from unicl.data.image_sets import open_image_set
from unicl.data.image_sets.samples import SetSamples
from unicl.errors import UniclError, UsageError

IMAGES = [
    {"id": 9, "file_name": "COCO_train2014_000000000009.png", "width": 4},
    {"id": 25, "file_name": "COCO_train2014_000000000025.png"},
    {"id": 30, "file_name": "COCO_train2014_000000000030.png"},
]
SAID = [
    {"image_id": 25, "id": 1, "caption": "A giraffe eats. "},
    {"image_id": 9, "id": 2, "caption": "A meal."},
    {"image_id": 25, "id": 3, "caption": "Two giraffes."},
    {"image_id": 30, "id": 4, "caption": " "},
    {"image_id": 77, "id": 5, "caption": "Nobody knows."},
]


def write(folder, part="train2014", *, below="annotations", images="train2014", **changes):
    path = folder / below / f"captions_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": IMAGES, "annotations": SAID, **changes}))
    (folder / images).mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(IMAGES):
        (folder / images / each["file_name"]).write_bytes(png("red", number))
    return path


def opened(folder, split="train"):
    return open_image_set(str(folder), split=split, root=folder, kind="captions")


@pytest.mark.parametrize("below", ["annotations", "."])
@pytest.mark.parametrize("images", ["train2014", "images", "."])
def test_images_have_their_captions(tmp_path, below, images):
    write(tmp_path, below=below, images=images)
    found = opened(tmp_path)
    assert found.captions == (("A meal.",), ("A giraffe eats.", "Two giraffes."))
    assert [found.locate(row)[0] for row in range(2)] == [i["file_name"] for i in IMAGES[:2]]
    assert found.read(1).image == png("red", 1)
    assert (found.split, found.splits) == ("train", ("train",))
    assert found.skipped == {
        "empty caption": 1,
        "caption of an unknown image": 1,
        "no caption": 1,
    }


def test_each_caption_is_a_sample(tmp_path):
    write(tmp_path)
    samples = SetSamples(opened(tmp_path))
    texts = [samples.read(index).text.decode() for index in range(samples.num_samples)]
    assert texts == ["A meal.", "A giraffe eats.", "Two giraffes."]
    assert samples.texts_of(2) == ("A giraffe eats.", "Two giraffes.")


def test_parts_are_told_by_the_names_of_their_files(tmp_path):
    write(tmp_path)
    write(tmp_path, "val2014", images="val2014")
    assert opened(tmp_path, "test").split == "val"
    assert opened(tmp_path, "train").splits == ("train", "val")
    write(tmp_path, "train2017", images="train2017")
    with pytest.raises(UsageError, match=r"has both .*train2014.json and .*train2017.json"):
        opened(tmp_path)


def test_what_is_wrong_is_one_line(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UsageError, match="has no split 'val'; it has train"):
        opened(tmp_path, "val")
    for image in (tmp_path / "train2014").iterdir():
        image.unlink()
    with pytest.raises(UsageError, match=r"names COCO_train2014_000000000009.png, which is not in"):
        opened(tmp_path)
    for damaged in ("{", "[]", '{"images": []}', '{"images": [{"id": "9"}], "annotations": []}'):
        path.write_text(damaged)
        with pytest.raises(UniclError, match=r"captions_train2014.json is no file of COCO's") as e:
            opened(tmp_path)
        assert "\n" not in str(e.value)
    write(tmp_path, annotations=[])
    with pytest.raises(UsageError, match=r"holds no images \(no caption: 3\)"):
        opened(tmp_path)
    write(tmp_path, annotations=[{"image_id": 9, "caption": None}])
    with pytest.raises(UniclError, match="None is no text"):
        opened(tmp_path)
