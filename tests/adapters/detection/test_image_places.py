import pytest

from adapters.detection.image_places import fullest, locate_images
from tests.adapters.detection.layouts import picture
from unicl.data.image_sets import MissingSetError


def test_fullest(tmp_path):
    places = [tmp_path / name for name in "abc"]
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg"):
        picture(tmp_path / name)
    assert fullest(places, ["1.jpg", "2.jpg", "3.jpg"]) == (2, tmp_path / "b")
    assert fullest(places, ["3.jpg"]) == (0, tmp_path / "a")
    assert fullest(places, []) == (0, tmp_path / "a")
    many = ["1.jpg", *(f"x{number}.jpg" for number in range(999))]
    assert fullest(places, many) == (1, tmp_path / "a")


def test_folders_are_cut_off_only_where_they_must_be(tmp_path):
    path = tmp_path / "x.json"
    names = ["v1/p0/a.jpg", "v1/p1/b.jpg"]
    with pytest.raises(MissingSetError, match=r"such as v1/p0/a\.jpg; put them into"):
        locate_images(path, names)
    picture(tmp_path / "a.jpg")
    assert locate_images(path, names) == (tmp_path, ["a.jpg", "b.jpg"])
    picture(tmp_path / "images/p1/b.jpg")
    assert locate_images(path, names) == (tmp_path / "images", ["p0/a.jpg", "p1/b.jpg"])
    picture(tmp_path / "v1/p1/b.jpg")
    assert locate_images(path, names) == (tmp_path, names)
