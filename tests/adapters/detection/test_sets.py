import json
import logging

import pytest

from adapters.detection.sets import KNOWN_SETS, open_detection_set
from tests.adapters.detection.layouts import CATEGORIES, ROBOFLOW, box, image, part, picture, write
from unicl.data.image_sets import MissingSetError
from unicl.errors import UniclError, UsageError


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What was told, line by line."""
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    return lambda: caplog.messages


def opened(path, split="train"):
    return open_detection_set(str(path), split=split, root=path)


def roboflow(folder, name="_annotations.coco.json", categories=ROBOFLOW):
    for number, where in enumerate(("train", "valid", "test")):
        path = folder / where / name
        part(path, f"{number}.jpg", categories[-1]["id"], categories, pictures=path.parent)
    return folder


def keys(found):
    return [found.files.read(row).key for row in range(found.num_images)]


def test_roboflow(tmp_path):
    roboflow(tmp_path)
    for number, split in enumerate(("train", "val", "test")):
        found = opened(tmp_path, split)
        assert (found.split, found.name) == (split, str(tmp_path))
        assert keys(found) == [f"{number}.jpg"]
        assert found.class_names == ("cat", "dog")
        assert found.category_ids == (1, 2)
    with pytest.raises(UsageError, match="has no split 'dev'; it has train, val, test"):
        opened(tmp_path, "dev")


def test_odinw(tmp_path):
    roboflow(tmp_path)
    roboflow(tmp_path, "annotations_without_background.json", ROBOFLOW[1:])
    few = [image(1, "0.jpg"), image(2, "1.jpg")]
    for shot in (1, 3, 5, 10):
        for seed in (3, 30, 300):
            path = tmp_path / f"train/fewshot_train_shot{shot}_seed{seed}.json"
            write(path, few[:1], [box(1, 1, 1)], ROBOFLOW[1:])
    found = opened(tmp_path)
    assert found.where.name == "annotations_without_background.json"
    found = opened(path)
    assert (found.split, found.name, found.num_images) == ("", str(path), 1)


def test_excerpts_are_no_part(tmp_path):
    for name in ("boxes", "fewshot_train_shot1_seed3"):
        part(tmp_path / f"train/{name}.json", pictures=tmp_path / "train")
    assert opened(tmp_path).where.name == "boxes.json"


def test_odinw_in_one_folder(tmp_path):
    for split in ("train", "val", "test"):
        path = tmp_path / "export" / f"{split}_annotations_without_background.json"
        part(path, f"{split}.jpg", pictures=path.parent)
    part(tmp_path / "export/fewshot_train_shot1_seed3.json", pictures=path.parent)
    assert keys(opened(tmp_path, "val")) == ["val.jpg"]


def test_coco(tmp_path, said):
    for year in ("2014", "2017"):
        for split in ("train", "val"):
            name = f"annotations/instances_{split}{year}.json"
            part(
                tmp_path / "coco" / name, f"{year}.jpg", pictures=tmp_path / "coco" / (split + year)
            )
    for name in ("captions_val2017", "person_keypoints_val2017", "image_info_test2017"):
        (tmp_path / f"coco/annotations/{name}.json").write_text("{}")
    found = open_detection_set("coco", split="test", root=tmp_path)
    assert (found.name, found.split) == ("coco", "val")
    assert keys(found) == ["2017.jpg"]
    assert said() == ["coco has no test part, its val is taken"]


def test_lvis_and_objects365_by_name(tmp_path):
    url = "http://images.cocodataset.org/train2017/1.jpg"
    picture(tmp_path / "coco/train2017/1.jpg")
    write(tmp_path / "lvis/lvis_v1_val.json", [{"id": 1, "coco_url": url}], [])
    assert keys(open_detection_set("lvis", split="val", root=tmp_path)) == ["train2017/1.jpg"]
    name = "images/v1/patch8/objects365_v1_00420917.jpg"
    images = [image(1, name)]
    write(tmp_path / "objects365/train/zhiyuan_objv2_train.json", images, [])
    picture(tmp_path / "objects365/train/patch8/objects365_v1_00420917.jpg")
    found = open_detection_set("objects365", split="train", root=tmp_path)
    assert keys(found) == ["patch8/objects365_v1_00420917.jpg"]


def test_open_images_as_json(tmp_path):
    for split in ("train", "validation"):
        path = tmp_path / f"open_images/annotations/{split}-annotations-bbox.json"
        part(path, f"{split}.jpg", pictures=tmp_path / "open_images" / split)
    found = open_detection_set("open_images", split="val", root=tmp_path)
    assert keys(found) == ["validation.jpg"]


def test_open_images_as_tables(tmp_path):
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/1,Dog\n")
    table = "ImageID,LabelName,XMin,XMax,YMin,YMax\n01,/m/1,0,1,0,1\n"
    (tmp_path / "train-annotations-bbox.csv").write_text(table)
    picture(tmp_path / "train/01.jpg")
    assert opened(tmp_path).boxes.tolist() == [[0, 0, 40, 30]]


def test_yolo(tmp_path):
    (tmp_path / "data.yaml").write_text("train: train/images\nnames: [cat]\n")
    picture(tmp_path / "train/images/a.jpg")
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text("0 .5 .5 1 1")
    for path in (tmp_path, tmp_path / "data.yaml"):
        assert opened(path).boxes.tolist() == [[0, 0, 40, 30]]


def test_one_part_as_a_folder(tmp_path):
    roboflow(tmp_path)
    found = opened(tmp_path / "valid", "test")
    assert (found.split, keys(found)) == ("", ["1.jpg"])


@pytest.mark.parametrize(
    "inner", ["Aquarium Combined.v2-raw-1024.coco", "Aquarium/Aquarium Combined.v2-raw-1024.coco"]
)
def test_known_sets_in_a_folder_of_their_own(tmp_path, inner):
    roboflow(tmp_path / "aquarium" / inner)
    found = open_detection_set("aquarium", split="test", root=tmp_path)
    assert (found.name, found.split) == ("aquarium", "test")


def test_several_sets_in_a_folder(tmp_path):
    for inner in ("by-breed", "by-species"):
        roboflow(tmp_path / "oxford_pets" / inner)
    with pytest.raises(UsageError, match=r"has several sets: by-breed, by-species; give one of th"):
        open_detection_set("oxford_pets", split="test", root=tmp_path)


def test_several_files_of_one_part(tmp_path):
    for name in ("a.json", "b.json"):
        part(tmp_path / "train" / name, pictures=tmp_path / "train")
    with pytest.raises(
        UsageError, match=r"has 2 files of boxes, such as a\.json and b\.json; give"
    ):
        opened(tmp_path)


def test_known_sets():
    assert len(KNOWN_SETS) == 15
    assert (KNOWN_SETS["oxford_pets"].num_images, KNOWN_SETS["oxford_pets"].num_classes) == (
        3680,
        37,
    )


def test_what_is_no_set(tmp_path, monkeypatch):
    for name in KNOWN_SETS:
        with pytest.raises(
            MissingSetError, match=f"{name} needs its images and boxes in {tmp_path}"
        ):
            open_detection_set(name, split="test", root=tmp_path)
    with pytest.raises(UsageError, match="file or folder 'aquarum'; did you mean aquarium\\?"):
        open_detection_set("aquarum", split="test", root=tmp_path)
    with pytest.raises(UsageError, match=r"file or folder '';.*known: aquarium, bccd"):
        open_detection_set("", split="test", root=tmp_path)
    with pytest.raises(UsageError, match="is no set of boxes; expected train, valid and test with"):
        opened(tmp_path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UniclError, match="is no JSON"):
        opened(tmp_path / "x.csv")
    roboflow(tmp_path / "bccd", categories=CATEGORIES)
    monkeypatch.chdir(tmp_path)
    assert open_detection_set("./bccd", split="test", root=tmp_path).name == "./bccd"


def test_annotations_that_are_left_out_are_told(tmp_path, said):
    bad = [box(2, 1, 3, (1, 2, 0, 5)), box(3, 1, 99), box(4, 1, 99)]
    path = write(tmp_path / "x.json", [image(1, "a.jpg")], [box(1, 1, 3), *bad], pictures=tmp_path)
    assert opened(path).skipped == {"unknown category": 2, "box without area": 1}
    reasons = "unknown category: 2, box without area: 1"
    assert said() == [f"{path}: annotations are left out ({reasons})"]


def test_classes_of_one_name_are_one(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": [n, 0, 4, 4]} for n in (1, 2, 3)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("Dog", "cat", "dog"), 1)],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "a.png").touch()
    images = open_detection_set(str(tmp_path / "x.json"), split="test", root=tmp_path)
    assert images.class_names == ("Dog", "cat")
    assert images.category_ids == (1, 2)
    assert images.of(0).labels.tolist() == [0, 1, 0]
    assert "several classes called 'dog', which are taken for one: the category ids 1 and 3" in (
        caplog.text
    )
