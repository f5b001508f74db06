import json
import pickle
import re
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from tests.unicl.data.image_sets import layouts
from unicl.data.image_sets import open_image_set
from unicl.data.image_sets.clip_classes import class_names, class_numbers, templates
from unicl.data.image_sets.public import PUBLIC_SETS
from unicl.errors import UniclError, UsageError


def plain(name):
    return name.replace("_", " ").replace("/", " ").lower()


def named(opened):
    """The name of each image's class."""
    return [opened.class_names[number] for number in opened.targets]


def agree(opened, data, paths):
    """Compare with torchvision's own class: files in order, and the class of each by name."""
    assert opened.num_samples == len(data) == len(paths)
    for index, (path, name) in enumerate(zip(paths, named(opened), strict=True)):
        sample = opened.read(index)
        assert sample.image == Path(path).read_bytes()
        assert sample.text == b""
        assert Path(path).as_posix().endswith(sample.key)
        label = data[index][1]
        assert plain(name) == plain(data.classes[label])


def test_the_curated_classes_are_whole():
    counts = {name: len(class_names(name)) for name in PUBLIC_SETS}
    assert counts == {
        "food101": 101,
        "cifar10": 10,
        "cifar100": 100,
        "sun397": 397,
        "cars": 196,
        "aircraft": 100,
        "voc2007": 20,
        "dtd": 47,
        "pets": 37,
        "caltech101": 102,
        "flowers": 102,
        "imagenet": 1000,
    }
    for name in PUBLIC_SETS:
        assert all(template.count("{}") == 1 for template in templates(name))
        # Only ImageNet has two pairs of classes that one name fits.
        assert counts[name] - len(set(class_names(name))) == (2 if name == "imagenet" else 0)
    assert [len(templates(name)) for name in PUBLIC_SETS] == [
        1,
        18,
        18,
        2,
        8,
        2,
        1,
        8,
        1,
        34,
        1,
        80,
    ]


def test_names_and_templates_are_those_of_clip_benchmark():
    package = find_spec("clip_benchmark")
    if package is None:
        pytest.skip("clip_benchmark is not installed")
    folder = Path(package.origin).parent / "datasets"
    names = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    for ours, theirs in (("aircraft", "fgvc_aircraft"), ("imagenet", "imagenet1k")):
        prompts[ours], names[ours] = prompts[theirs], names.get(theirs)
    for name in PUBLIC_SETS:
        assert list(templates(name)) == [text.replace("{c}", "{}") for text in prompts[name]]
    for name in ("flowers", "caltech101"):
        assert list(class_names(name)) == names[name]
    # In CLIP's own list the cats come first, and dogs are in small letters.
    assert sorted(map(plain, class_names("pets"))) == sorted(map(plain, names["pets"]))
    assert len(names["imagenet"]) == 1000


def test_food101(tmp_path):
    layouts.food101(tmp_path)
    for split, count in (("train", 202), ("test", 101)):
        opened = open_image_set("food101", split=split, root=tmp_path)
        data = datasets.Food101(tmp_path / "food101", split)
        assert opened.num_samples == count
        agree(opened, data, data._image_files)
        assert opened.metric == "top1"
        assert opened.splits == ("train", "test")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    labels = layouts.cifar(tmp_path, name, monkeypatch.setattr)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    for split in ("train", "test"):
        opened = open_image_set(name, split=split, root=tmp_path)
        data = kind(tmp_path / name, train=split == "train")
        assert opened.targets.tolist() == labels[split] == data.targets
        for index, (image, _) in enumerate(data):
            ours = Image.open(BytesIO(opened.read(index).image))
            assert ours.tobytes() == image.tobytes()
    assert opened.locate(3)[1] == 3
    with pytest.raises(IndexError):
        opened.read(4)


class Mischief:
    def __reduce__(self):
        return (open, ("mischief", "w"))


def test_no_pickle_is_opened_but_the_published_one(tmp_path, monkeypatch):
    layouts.cifar(tmp_path, "cifar10", monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    for file in ("test_batch", "batches.meta"):
        path = tmp_path / "cifar10/cifar-10-batches-py" / file
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Mischief()))
        with pytest.raises(UniclError, match=r"cifar10 in .* is damaged: .*corrupted") as caught:
            open_image_set("cifar10", root=tmp_path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "mischief").exists()
        path.write_bytes(before)
    assert open_image_set("cifar10", root=tmp_path).num_samples == 4


def test_sun397_splits_by_its_partition(tmp_path):
    layouts.sun397(tmp_path, images=4, partition=True)
    train, test = (open_image_set("sun397", split=s, root=tmp_path) for s in ("train", "test"))
    expected = [name for _, name in reversed(layouts.SUN_CLASSES)]
    assert named(train) == named(test) == expected
    assert {Path(test.locate(index)[0]).name for index in range(5)} == {"sun_0002.jpg"}
    assert {Path(train.locate(index)[0]).name for index in range(5)} == {"sun_0001.jpg"}
    layouts.lines(tmp_path / "sun397/Testing_01.txt", ["/a/abbey/sun_0000.jpg", "/a/abbey/x.jpg"])
    with pytest.raises(UniclError, match=r"1 images of Testing_01\.txt, such as a/abbey/x\.jpg"):
        open_image_set("sun397", root=tmp_path)
    # By its number, a cell would be taken for the jail.
    assert class_names("sun397").index("jail cell") < class_names("sun397").index("jail indoor")


def test_sun397_without_a_partition_has_fifty_of_each_class(tmp_path):
    layouts.sun397(tmp_path)
    train, test = (open_image_set("sun397", split=s, root=tmp_path) for s in ("train", "test"))
    labels = {
        path.relative_to(tmp_path / "sun397").as_posix(): plain(data_class)
        for data in [datasets.SUN397(tmp_path / "sun397")]
        for path, data_class in zip(
            data._image_files, (data.classes[label] for label in data._labels), strict=True
        )
    }
    for opened in (train, test):
        assert np.bincount(opened.targets).max() == 50
        assert opened.num_samples == 50 * len(layouts.SUN_CLASSES)
        keys = [opened.locate(index)[0] for index in range(opened.num_samples)]
        assert named(opened) == [labels[key] for key in keys]
    seen = {opened.locate(i)[0] for opened in (train, test) for i in range(opened.num_samples)}
    assert len(seen) == 2 * train.num_samples, "the splits share no image"
    again = open_image_set("sun397", split="train", root=tmp_path)
    assert again.fingerprint == train.fingerprint != test.fingerprint


def test_cars(tmp_path):
    layouts.cars(tmp_path)
    for split in ("train", "test"):
        opened = open_image_set("cars", split=split, root=tmp_path)
        data = datasets.StanfordCars(tmp_path / "cars", split)
        agree(opened, data, [path for path, _ in data._samples])
    assert named(opened)[0] == "smart fortwo Convertible 2012"


@pytest.mark.parametrize("name", ["cars", "flowers"])
def test_scipy_is_asked_for_where_it_is_missing(tmp_path, monkeypatch, name):
    write = {
        "cars": lambda: layouts.cars(tmp_path),
        "flowers": lambda: layouts.flowers(tmp_path, monkeypatch.setattr),
    }
    write[name]()
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UniclError, match=f"{name} needs scipy: pip install scipy"):
        open_image_set(name, root=tmp_path)


def test_aircraft(tmp_path):
    layouts.aircraft(tmp_path)
    for split in ("train", "val", "test"):
        opened = open_image_set("aircraft", split=split, root=tmp_path)
        data = datasets.FGVCAircraft(tmp_path / "aircraft", split)
        agree(opened, data, data._image_files)
        assert opened.splits == ("train", "val", "test")
        assert opened.metric == "mean_per_class"
    assert named(opened)[0] == "F-16A/B"


def test_voc2007(tmp_path):
    layouts.voc2007(tmp_path)
    for split in ("train", "val", "test"):
        opened = open_image_set("voc2007", split=split, root=tmp_path)
        data = datasets.VOCDetection(tmp_path / "voc2007", year="2007", image_set=split)
        assert opened.targets.dtype == bool
        assert opened.metric == "map11"
        for index, (_, tree) in enumerate(data):
            assert opened.read(index).image == Path(data.images[index]).read_bytes()
            objects = tree["annotation"].get("object", [])
            clear = {each["name"] for each in objects if each["difficult"] == "0"}
            vague = {each["name"] for each in objects} - clear
            names = np.array(opened.class_names)
            assert set(names[opened.targets[index]]) == clear
            assert set(names[~opened.counted[index]]) == vague
    lists = tmp_path / "voc2007/VOCdevkit/VOC2007/ImageSets/Main"
    layouts.lines(lists / "cow_test.txt", ["200000 -1"])
    with pytest.raises(UniclError, match=r"cow_test\.txt lists other images than test\.txt"):
        open_image_set("voc2007", root=tmp_path)


def test_dtd_by_its_first_partition(tmp_path):
    layouts.dtd(tmp_path)
    for split in ("train", "val", "test"):
        opened = open_image_set("dtd", split=split, root=tmp_path)
        data = datasets.DTD(tmp_path / "dtd", split)
        agree(opened, data, data._image_files)
        assert opened.num_samples == 47


def test_pets_are_numbered_by_name_not_by_number(tmp_path):
    layouts.pets(tmp_path)
    for split, theirs in (("train", "trainval"), ("test", "test")):
        opened = open_image_set("pets", split=split, root=tmp_path)
        data = datasets.OxfordIIITPet(tmp_path / "pets", theirs)
        agree(opened, data, data._images)
    assert opened.targets.tolist() != data._labels
    assert opened.metric == "mean_per_class"


def test_caltech101_trains_on_thirty_of_each_class(tmp_path):
    layouts.caltech101(tmp_path)
    train, test = (open_image_set("caltech101", split=s, root=tmp_path) for s in ("train", "test"))
    assert np.bincount(train.targets).tolist() == [30] * 102
    assert np.bincount(test.targets).tolist() == [1] * 102
    for opened in (train, test):
        for index, name in enumerate(named(opened)):
            folder = Path(opened.locate(index)[0]).parent.name
            assert folder == layouts.CALTECH_RENAMED.get(name, name.replace(" ", "_"))
    keys = {opened.locate(i)[0] for opened in (train, test) for i in range(opened.num_samples)}
    assert len(keys) == 31 * 102
    # torchvision's class leaves the background out.
    theirs = datasets.Caltech101(tmp_path / "caltech101")
    assert len(theirs.categories) + 1 == len(class_names("caltech101"))
    numbers = class_numbers("caltech101", theirs.categories)
    assert numbers == list(range(1, 102))


def test_flowers(tmp_path, monkeypatch):
    layouts.flowers(tmp_path, monkeypatch.setattr)
    for split, count in (("train", 59), ("val", 30), ("test", 14)):
        opened = open_image_set("flowers", split=split, root=tmp_path)
        data = datasets.Flowers102(tmp_path / "flowers", split)
        assert opened.num_samples == count
        assert opened.targets.tolist() == data._labels
    assert named(opened)[-1] == "moon orchid"
    differ = {"globe-flower", "pink-yellow dahlia?", "ball moss"}
    for ours, theirs in zip(class_names("flowers"), datasets.Flowers102.classes, strict=True):
        assert (ours != theirs) == (theirs in differ)
    assert opened.read(0).image == Path(data._image_files[0]).read_bytes()


def test_imagenet(tmp_path):
    layouts.imagenet(tmp_path)
    data = datasets.ImageFolder(tmp_path / "imagenet/val")
    opened = open_image_set("imagenet", root=tmp_path)
    assert (opened.split, opened.splits) == ("val", ("train", "val"))
    assert opened.targets.tolist() == data.targets == list(range(1000))
    assert opened.read(7).image == Path(data.imgs[7][0]).read_bytes()
    assert opened.class_names[0] == "tench"
    assert len(opened.templates) == 80
    assert open_image_set("imagenet", split="train", root=tmp_path).num_samples == 1000
    (tmp_path / "imagenet/val/n01440764").rename(tmp_path / "imagenet/val/.n01440764")
    with pytest.raises(UniclError, match="has 999 folders of classes, not 1000"):
        open_image_set("imagenet", root=tmp_path)


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_missing_files_are_one_line_with_the_way_out(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        open_image_set(name, root=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for file in PUBLIC_SETS[name].files("test"):
        assert file in message
    assert f"in {tmp_path / name};" in message
    assert ("fetch it by --download" in message) == (name not in {"sun397", "cars", "imagenet"})
    assert re.search(r"https?://|github\.com", message)
    assert not (tmp_path / name).exists(), "nothing is written where nothing was found"


@pytest.mark.parametrize("name", sorted(set(PUBLIC_SETS) - {"sun397", "cars", "imagenet"}))
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    for module in ("food101", "cifar", "dtd", "oxford_iiit_pet", "flowers102", "fgvc_aircraft"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    for module in ("voc", "caltech"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    with pytest.raises(UniclError, match=f"cannot download {name} to .*Name or service") as caught:
        open_image_set(name, root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_imagenet_is_unpacked_from_its_archives_only(tmp_path):
    with pytest.raises(UniclError, match=r"cannot download imagenet .*ILSVRC2012_devkit_t12"):
        open_image_set("imagenet", root=tmp_path, download=True)


def test_what_is_there_is_neither_downloaded_nor_hashed(tmp_path, monkeypatch):
    layouts.voc2007(tmp_path)
    layouts.food101(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("it is there")

    monkeypatch.setattr("torchvision.datasets.utils.calculate_md5", refuse)
    for module in ("food101", "voc"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    for name in ("voc2007", "food101"):
        assert open_image_set(name, root=tmp_path, download=True).num_samples


def test_a_download_brings_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def bring(url, *args, **kwargs):
        asked.append(url)
        layouts.food101(tmp_path)

    monkeypatch.setattr("torchvision.datasets.food101.download_and_extract_archive", bring)
    assert open_image_set("food101", root=tmp_path, download=True).num_samples == 101
    assert asked == [datasets.Food101._URL]


def test_damage_and_wrong_splits_are_named(tmp_path):
    layouts.dtd(tmp_path)
    with pytest.raises(UsageError, match="pets has no split 'val'; it has train, test"):
        open_image_set("pets", split="val", root=tmp_path)
    layouts.lines(tmp_path / "dtd/dtd/dtd/labels/test1.txt", ["furry/furry_1.jpg"])
    with pytest.raises(UniclError, match=r"dtd in .* is damaged: 'furry' is no class of dtd"):
        open_image_set("dtd", root=tmp_path)
    layouts.lines(tmp_path / "dtd/dtd/dtd/labels/test1.txt", ["no path"])
    with pytest.raises(UniclError, match=r"dtd in .* is damaged"):
        open_image_set("dtd", root=tmp_path)
    layouts.lines(tmp_path / "dtd/dtd/dtd/labels/test1.txt", [])
    with pytest.raises(UsageError, match=r"dtd \(test\) holds no images"):
        open_image_set("dtd", root=tmp_path)
