import pickle

import numpy as np
import pytest

from tests.unicl.data.image_sets.layouts import picture
from unicl.data.augment import open_image
from unicl.data.image_sets import (
    KNOWN_SETS,
    CaptionSet,
    ClassificationSet,
    ImageSet,
    open_image_set,
)
from unicl.data.image_sets.images import ImageFiles, Images, PixelArray
from unicl.data.shards import SampleError
from unicl.errors import UniclError, UsageError


def test_known_sets_are_those_of_the_paper_and_the_digits():
    assert len(KNOWN_SETS) == len(set(KNOWN_SETS)) == 15
    assert {"flickr30k", "coco", "digits", "food101"} <= set(KNOWN_SETS)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("fod101", "did you mean food101"),
        ("CIFAR-10", "known: food101, cifar10"),
        ("cifar", "did you mean cifar10 or cifar100"),
        ("", "known: food101"),
        ("no/such/folder", "known: food101"),
    ],
)
def test_an_unknown_name_gives_the_nearest(tmp_path, spec, hint):
    with pytest.raises(UsageError, match=rf"no image set and no folder '{spec}'; {hint}"):
        open_image_set(spec, root=tmp_path)


def test_a_folder_of_no_layout_says_what_was_expected(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(UsageError, match=r"expected CLASS/IMAGE\.jpg .*nshards.* dataset\.json"):
        open_image_set(str(tmp_path), root=tmp_path)


def test_the_other_kind_is_refused(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(UsageError, match="has classes, but captions are needed"):
        open_image_set(str(tmp_path), root=tmp_path, kind="captions")
    assert open_image_set(str(tmp_path), root=tmp_path, kind="classes").num_samples == 1


def test_a_known_name_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "digits" / "cat" / "1.png")
    assert open_image_set("digits", root=tmp_path).num_samples == 500
    assert open_image_set("./digits", root=tmp_path).class_names == ("cat",)


def test_digits_are_those_of_scikit_learn(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    truth = datasets.load_digits()
    start = 0
    for split, count in (("train", 1000), ("val", 297), ("test", 500)):
        opened = open_image_set("digits", split=split, root=tmp_path)
        assert isinstance(opened, ClassificationSet)
        assert opened.num_samples == count
        assert opened.targets.tolist() == truth.target[start : start + count].tolist()
        assert set(opened.targets.tolist()) == set(range(10))
        for index in (0, count - 1):
            pixels = np.asarray(open_image(opened.read(index).image))
            assert np.abs(pixels / 255 * 16 - truth.images[start + index]).max() < 0.04
        start += count
    assert opened.class_names[7] == "seven"
    assert [text.format("two") for text in opened.templates] == ['a photo of the number: "two".']
    assert opened.locate(2) == ("digits (test)", 2)
    with pytest.raises(UsageError, match="digits has no split 'all'; it has train, val, test"):
        open_image_set("digits", split="all", root=tmp_path)


def test_digits_without_scikit_learn_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UniclError, match="digits needs scikit-learn: pip install scikit-learn"):
        open_image_set("digits", root=tmp_path)


def files(folder, count=3):
    names = [f"a/{number} ü.png" for number in range(count)]
    for number, name in enumerate(names):
        picture(folder / name, number)
    return ImageFiles(folder, names)


def test_files_are_read_as_they_are(tmp_path):
    images = files(tmp_path)
    assert isinstance(images, Images)
    sample = images.read(1)
    assert sample.image == (tmp_path / "a/1 ü.png").read_bytes()
    assert (sample.key, sample.text) == ("a/1 ü.png", b"")
    assert images.locate(2) == ("a/2 ü.png", 2)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            images.read(index)


def test_a_fingerprint_changes_with_the_files_and_their_place(tmp_path):
    import os

    files(tmp_path / "one")
    for path in (tmp_path / "one/a").iterdir():
        os.utime(path, ns=(0, 0))
    still = ImageFiles(tmp_path / "one", [f"a/{n} ü.png" for n in range(3)])
    before = still.digest()
    (tmp_path / "one").rename(tmp_path / "two")
    # Two parts of a set may hold files of equal names, sizes and times.
    moved = ImageFiles(tmp_path / "two", [f"a/{n} ü.png" for n in range(3)])
    assert moved.digest() != before
    before = moved.digest()
    assert ImageFiles(tmp_path / "two", [f"a/{n} ü.png" for n in (0, 2, 1)]).digest() != before
    assert ImageFiles(tmp_path / "two", [f"a/{n} ü.png" for n in (0, 1)]).digest() != before
    first = tmp_path / "two/a/0 ü.png"
    os.utime(first, ns=(0, 1))
    touched = ImageFiles(tmp_path / "two", [f"a/{n} ü.png" for n in range(3)]).digest()
    assert touched != before
    first.write_bytes(first.read_bytes() + b"more")
    os.utime(first, ns=(0, 1))
    assert ImageFiles(tmp_path / "two", [f"a/{n} ü.png" for n in range(3)]).digest() != touched


def test_missing_files_are_named(tmp_path):
    images = files(tmp_path)
    (tmp_path / "a/1 ü.png").unlink()
    with pytest.raises(SampleError, match=r"1 ü\.png is not in") as caught:
        images.read(1)
    assert caught.value.reason == "missing file"
    with pytest.raises(UniclError, match=r"1 of 3 images are missing in .*, such as a/1 ü\.png"):
        images.digest()


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 4, 3)])
def test_pixels_come_back_as_they_were(shape):
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    images = PixelArray(pixels, "noise")
    assert isinstance(images, Images)
    for index in range(2):
        assert np.array_equal(np.asarray(open_image(images.read(index).image)), pixels[index])
    other = pixels.copy()
    other[1, 2, 3] ^= 1
    assert PixelArray(other, "noise").digest() != images.digest()
    assert PixelArray(pixels.copy(), "x").digest() == images.digest()


def test_sets_can_be_pickled(tmp_path):
    files(tmp_path)
    for spec in (str(tmp_path), "digits"):
        opened = open_image_set(spec, root=tmp_path)
        copy = pickle.loads(pickle.dumps(opened))
        assert copy.read(0) == opened.read(0)
        assert copy.fingerprint == opened.fingerprint
        assert isinstance(copy, ImageSet)
        assert not isinstance(copy, CaptionSet)
