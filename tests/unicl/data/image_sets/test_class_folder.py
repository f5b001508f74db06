import logging

import pytest
from torchvision.datasets import ImageFolder

from tests.unicl.data.image_sets.layouts import picture
from unicl.data.image_sets import open_image_set, open_images
from unicl.errors import UsageError


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What was told, line by line."""
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    return lambda: caplog.messages


def opened(folder, split="test"):
    return open_image_set(str(folder), split=split, root=folder)


def named(found):
    return {
        found.locate(index)[0]: found.class_names[number]
        for index, number in enumerate(found.targets)
    }


def test_a_folder_without_parts(tmp_path):
    for number, name in enumerate(("golden_retriever/a.png", "cat/deep/b.JPG", "cat/c.webp")):
        picture(tmp_path / name, number)
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / ".git").mkdir()
    found = opened(tmp_path)
    assert found.class_names == ("cat", "golden retriever")
    assert named(found) == {
        "cat/c.webp": "cat",
        "cat/deep/b.JPG": "cat",
        "golden_retriever/a.png": "golden retriever",
    }
    assert (found.split, found.splits, found.metric) == ("", (), "top1")
    assert found.templates == ("a photo of a {}.",)
    assert found.read(0).image == (tmp_path / "cat/c.webp").read_bytes()
    with pytest.raises(UsageError, match=r"is one part, .*; give its train images as a set"):
        opened(tmp_path, "train")


def test_parts_share_their_classes(tmp_path):
    for part, names in (("train", "abc"), ("val", "bd"), ("test", "c")):
        for number, name in enumerate(names):
            picture(tmp_path / part / name / "1.png", number)
    for part in ("train", "val", "test"):
        found = opened(tmp_path, part)
        assert found.class_names == ("a", "b", "c", "d")
        assert found.splits == ("train", "val", "test")
        theirs = ImageFolder(tmp_path / part)
        assert list(named(found).values()) == [theirs.classes[label] for label in theirs.targets]
    with pytest.raises(UsageError, match="has no split 'held_out'; it has train, val, test"):
        opened(tmp_path, "held_out")


@pytest.mark.parametrize(
    ("loose", "split", "count"),
    [(None, "train", 2), (None, "test", 1), ("3.png", "train", 4), ("train/3.png", "train", 4),
     ("plane/3.png", "test", 4)],
)  # fmt: skip
def test_parts_of_class_folders_are_a_set_to_embed(tmp_path, loose, split, count):
    for name in ("train/red_cat/1.png", "train/dog/2.png", "test/dog/2.png"):
        picture(tmp_path / name)
    if loose is not None:
        picture(tmp_path / loose)
    images = open_images(str(tmp_path), split=split, root=tmp_path)
    assert images.num_samples == count
    assert images.split == (split if loose is None else "")
    if loose is None:
        assert set(named(images).values()) == ({"dog", "red cat"} if split == "train" else {"dog"})


def test_videos_between_images_are_counted(tmp_path):
    picture(tmp_path / "album/1.png")
    for name in ("album/2.mp4", "3.MOV", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).touch()
    images = open_images(str(tmp_path), root=tmp_path)
    assert images.num_samples == 1
    assert images.skipped == {"no image": 2}


def test_folders_called_like_parts_may_be_albums(tmp_path):
    for name in ("train/1.png", "test/2.png"):
        picture(tmp_path / name)
    assert open_images(str(tmp_path), root=tmp_path).num_samples == 2
    for name in ("set/train/dog/1.png", "set/test/dog/1.png"):
        picture(tmp_path / name)
    with pytest.raises(UsageError, match="has no split 'val'; it has train, test"):
        open_images(str(tmp_path / "set"), split="val", root=tmp_path)


def test_val_is_taken_where_there_is_no_test(tmp_path, said):
    for part in ("train", "val"):
        picture(tmp_path / part / "cat" / f"{part}.png")
    found = opened(tmp_path)
    assert said() == [f"{tmp_path} has no test part, its val is taken"]
    assert found.locate(0) == ("cat/val.png", 0)
    assert (found.split, found.splits) == ("val", ("train", "val"))
    assert opened(tmp_path, "val").images.digest() == found.images.digest()
    assert len(said()) == 1, "val was asked for, so there is nothing to tell"
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(UsageError, match="has no split 'val'; it has train, test"):
        opened(tmp_path, "val")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "plane"):
        picture(tmp_path / name / "1.png")
    assert opened(tmp_path).class_names == ("plane", "train")


def test_names_and_templates_beside(tmp_path):
    for name in ("n01", "n02"):
        picture(tmp_path / "test" / name / "1.png")
    (tmp_path / "classnames.txt").write_text("crane\n\ncrane\n")
    with pytest.raises(UsageError, match=r"classnames\.txt has no name in line 2"):
        opened(tmp_path)
    (tmp_path / "classnames.txt").write_text("crane\ncrane\n\n \n")
    (tmp_path / "templates.txt").write_text("a drawing of a {c}.\n\nthe {}\n")
    found = opened(tmp_path)
    assert found.class_names == ("crane", "crane"), "names may be equal, numbers are not"
    assert found.targets.tolist() == [0, 1]
    assert found.templates == ("a drawing of a {}.", "the {}")
    (tmp_path / "classnames.txt").write_text("crane\n")
    with pytest.raises(UsageError, match="has 1 names for 2 folders of classes"):
        opened(tmp_path)
    (tmp_path / "classnames.txt").unlink()
    for text, message in (("a photo", "must have {} once"), ("\n", "has no templates")):
        (tmp_path / "templates.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            opened(tmp_path)
    (tmp_path / "templates.txt").write_bytes(b"\xe9 {}")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        opened(tmp_path)


def test_a_set_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        opened(tmp_path)
    (tmp_path / "cat").rmdir()
    picture(tmp_path / "train/cat/1.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match=r"\(val\) holds no images"):
        opened(tmp_path, "val")


def test_a_class_without_images_in_any_part_is_empty(tmp_path):
    for place in ("train/a", "train/b", "test/a"):
        picture(tmp_path / place / "1.png")
    for place in ("train/c", "test/c", "test/d"):
        (tmp_path / place).mkdir()
    for part in ("test", "train"):
        found = opened(tmp_path, part)
        assert found.class_names == ("a", "b", "c", "d")
        assert found.empty_classes == ("c", "d"), "b has one in train"


def test_links_that_lead_nowhere_are_left_out(tmp_path):
    picture(tmp_path / "elsewhere.png")
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        picture(tmp_path / "set" / name)
    (tmp_path / "set/cat/._1.png").write_bytes(b"what macOS leaves beside a file")
    (tmp_path / "set/dog/link.png").symlink_to(tmp_path / "elsewhere.png")
    whole = [opened(tmp_path / "set"), open_images(str(tmp_path / "set"), root=tmp_path)]
    prints = [each.fingerprint for each in whole]
    (tmp_path / "elsewhere.png").rename(tmp_path / "moved.png")
    broken = [opened(tmp_path / "set"), open_images(str(tmp_path / "set"), root=tmp_path)]
    assert [(each.num_samples, each.skipped) for each in whole] == [(4, {})] * 2
    assert [(each.num_samples, each.skipped) for each in broken] == [(3, {"broken link": 1})] * 2
    assert {each.fingerprint for each in broken}.isdisjoint(prints)
