import json

import pytest

from tests.unicl.data.image_sets.layouts import picture
from unicl.data.image_sets import CaptionSet, open_image_set
from unicl.errors import UniclError, UsageError


def entry(number, split, captions=5, **more):
    sentences = [
        {"raw": f"caption {n} of {number}. ", "imgid": number, "tokens": [], "sentid": 9}
        for n in range(captions)
    ]
    return {"imgid": number, "split": split, "sentences": sentences, **more}


def write(folder, name, images):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"images": images, "dataset": "x"}))


def test_flickr30k(tmp_path):
    folder = tmp_path / "flickr30k"
    splits = ("train", "test", "val", "test")
    images = [entry(n, split, filename=f"{n}.jpg") for n, split in enumerate(splits)]
    write(folder, "dataset_flickr30k.json", images)
    for number in range(4):
        picture(folder / f"flickr30k-images/{number}.jpg", number)
    opened = open_image_set("flickr30k", root=tmp_path)
    assert isinstance(opened, CaptionSet)
    assert opened.num_samples == len(opened.captions) == 2
    assert opened.captions[1] == tuple(f"caption {n} of 3." for n in range(5))
    assert opened.read(1).image == (folder / "flickr30k-images/3.jpg").read_bytes()
    assert opened.read(1).key == "flickr30k-images/3.jpg"
    assert open_image_set("flickr30k", split="val", root=tmp_path).num_samples == 1
    assert opened.fingerprint
    with pytest.raises(UsageError, match="has captions, but classes are needed"):
        open_image_set("flickr30k", root=tmp_path, kind="classes")


def test_coco_takes_five_captions_and_trains_on_what_val_left_over(tmp_path):
    folder = tmp_path / "coco"
    images = [
        entry(0, "train", filepath="train2014", filename="COCO_train2014_000.jpg"),
        entry(1, "restval", filepath="val2014", filename="COCO_val2014_001.jpg"),
        entry(2, "test", 7, filepath="val2014", filename="COCO_val2014_002.jpg"),
    ]
    write(folder, "dataset_coco.json", images)
    picture(folder / "val2014/COCO_val2014_002.jpg", 2)
    opened = open_image_set("coco", root=tmp_path)
    assert [len(captions) for captions in opened.captions] == [5]
    with pytest.raises(UsageError, match=r"coco needs train2014 in .*cocodataset\.org"):
        open_image_set("coco", split="train", root=tmp_path)
    picture(folder / "train2014/COCO_train2014_000.jpg")
    train = open_image_set("coco", split="train", root=tmp_path)
    assert train.num_samples == 2
    with pytest.raises(UniclError, match="1 of 2 images are missing"):
        train.fingerprint  # noqa: B018


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_what_is_missing_or_damaged_is_named(tmp_path, name):
    with pytest.raises(UsageError, match=rf"{name} needs dataset_{name}\.json in .* by hand only"):
        open_image_set(name, root=tmp_path, download=True)
    folder = tmp_path / name
    write(folder, f"dataset_{name}.json", [{"split": "test"}])
    with pytest.raises(UniclError, match=rf"dataset_{name}\.json is damaged"):
        open_image_set(name, root=tmp_path)
    (folder / f"dataset_{name}.json").write_text("[1, 2")
    with pytest.raises(UniclError, match=rf"dataset_{name}\.json is damaged"):
        open_image_set(name, root=tmp_path)
    with pytest.raises(UsageError, match=f"{name} has no split 'restval'"):
        open_image_set(name, split="restval", root=tmp_path)
