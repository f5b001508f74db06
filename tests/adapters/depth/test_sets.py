"""Class folders with depth maps, in every layout."""

from pathlib import Path

import numpy as np
import pytest

from adapters.depth.rgbd import part
from adapters.depth.sets import has_depth, open_rgbd_folder
from tests.adapters.depth.rooms import png, write
from unicl.data.shards import SampleError
from unicl.errors import UniclError, UsageError

LAYOUTS = {
    "{split}/{label}/{name}.jpg": "{split}/{label}/{name}.depth.png",
    "{split}/{label}/{name}.png": "{split}/{label}/{name}_depth.png",
    "{split}/{label}/rgb/{name}.png": "{split}/{label}/depth/{name}.png",
    "rgb/{split}/{label}/{name}.jpg": "depth/{split}/{label}/{name}.png",
    "rgb/{label}/{name}.jpg": "depth/{label}/{name}.png",
    "{label}/{name}.jpg": "{label}/{name}.depth.png",
}


def write_set(folder: Path, layout: str) -> None:
    """Write two images of each of three classes; the last has no depth map."""
    for split in ("train", "test"):
        for number, label in enumerate(("attic", "bath", "depth")):
            for turn in range(2):
                words = {"split": split, "label": label, "name": f"a.{turn}"}
                write(folder / layout.format(**words), b"image %d %d" % (number, turn))
                if (number, turn) != (2, 1):
                    path = folder / LAYOUTS[layout].format(**words)
                    write(path, b"depth %d %d" % (number, turn))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(tmp_path: Path, layout: str) -> None:
    write_set(tmp_path, layout)
    images = open_rgbd_folder(tmp_path, split="test")
    assert (images.name, images.class_names) == (str(tmp_path), ("attic", "bath", "depth"))
    assert images.targets.tolist() == [0, 0, 1, 1, 2]
    assert images.skipped == {"no depth": 1}
    assert images.splits == (("train", "test") if "split" in layout else ())
    pairs = [part(images.read(index).image) for index in range(5)]
    assert pairs == [
        (b"image %d %d" % each, b"depth %d %d" % each)
        for each in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    ]
    assert (tmp_path / images.read(0).key).read_bytes() == b"image 0 0"
    assert images.locate(3) == (images.read(3).key, 3)
    assert has_depth(tmp_path)


def test_a_changed_depth_map_changes_the_fingerprint(tmp_path: Path) -> None:
    write_set(tmp_path, "{label}/{name}.jpg")
    before = open_rgbd_folder(tmp_path, split="test").fingerprint
    assert open_rgbd_folder(tmp_path, split="test").fingerprint == before
    depth = tmp_path / "bath" / "a.0.depth.png"
    depth.write_bytes(b"another")
    images = open_rgbd_folder(tmp_path, split="test")
    assert images.fingerprint != before
    depth.unlink()
    with pytest.raises(SampleError) as caught:
        images.read(2)
    assert caught.value.reason == "missing file"
    with pytest.raises(UniclError, match="1 of 5 images are missing in "):
        images.images.digest()


def test_a_folder_without_depth_maps_is_refused(tmp_path: Path) -> None:
    for label in ("attic", "depth"):
        write(tmp_path / label / "a.png", png(np.zeros((4, 4, 3), np.uint8)))
    assert not has_depth(tmp_path)
    with pytest.raises(UsageError, match=r"has no image with a depth map; expected CLASS/NAME\.d"):
        open_rgbd_folder(tmp_path, split="test")


def test_what_is_no_image_says_nothing_of_depth(tmp_path: Path) -> None:
    write_set(tmp_path, "{label}/{name}.jpg")
    write(tmp_path / "README.md", b"read me")
    write(tmp_path / "attic" / "LICENSE", b"")
    assert has_depth(tmp_path)
    write(tmp_path / "cover.jpg", b"an image alone")
    assert not has_depth(tmp_path)
