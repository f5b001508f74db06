"""The public sets of Florence's tables 1 and 2, read by torchvision, split as in CLIP's protocol.

The protocol is of CLIP's paper, table 9. Where a set has a `val`, CLIP chooses a probe's strength
on it and fits the final probe on `train` and `val` together. What differs from CLIP:

- Caltech101 has no official split: of each of the 102 classes (the background is one, as in CLIP),
  30 images chosen by a hash of their names are `train` and the others `test`.
- SUN397 is split by its first partition (`Training_01.txt` and `Testing_01.txt`, 50 images per
  class each) if those files lie in `root/sun397`; otherwise a hash chooses as many.
- ImageNet has no `test` with labels: its `val` is reported, as everywhere.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from torchvision import datasets
from torchvision.datasets.folder import make_dataset

from unicl.data.image_sets.clip_classes import class_names, class_numbers, templates
from unicl.data.image_sets.image_set import ClassificationSet, Metric, MissingSetError, choose_split
from unicl.data.image_sets.images import ImageFiles, Images, PixelArray
from unicl.data.shard_index import IMAGE_EXTENSIONS
from unicl.errors import UniclError

_CALTECH101_TRAIN = 30
_SUN397_EACH = 50


@dataclass(frozen=True)
class _Labelled:
    """Images and their classes, as a set's files have them."""

    images: Images
    targets: Int64[np.ndarray, " num_images"] | Bool[np.ndarray, "num_images num_classes"]
    counted: Bool[np.ndarray, "num_images num_classes"] | None = None


@dataclass(frozen=True, kw_only=True)
class _PublicSet:
    """How one set is found, read and fetched."""

    metric: Metric
    read: Callable[[Path, str], _Labelled]
    """Reads a split from the set's folder."""
    files: Callable[[str], tuple[str, ...]]
    """What must lie in the set's folder for a split."""
    by_hand: str
    """How a person brings it into the folder."""
    fetch: Callable[[Path, str], Any] | None = None
    """Makes torchvision download or unpack a split; unset where the publisher's link is dead."""
    offered: bool = True
    """Whether anybody can download it from its publisher."""
    splits: tuple[str, ...] = field(default=("train", "test"))


def open_public(name: str, *, split: str, root: Path, download: bool) -> ClassificationSet:
    """Open a split of a public set in `root/NAME`; see `opening.open_image_set`."""
    public = PUBLIC_SETS[name]
    split = choose_split(name, split, public.splits)
    folder = root / name
    missing = _missing(public, folder, split)
    if missing and download and public.fetch is not None:
        _fetch(name, folder, split)
        missing = _missing(public, folder, split)
    if missing:
        way = f"fetch it by --download, or {public.by_hand}" if public.offered else public.by_hand
        raise MissingSetError(f"{name} needs {', '.join(missing)} in {folder}; {way}")
    labelled = _read(name, folder, split)
    return ClassificationSet(
        name=name,
        split=split,
        splits=public.splits,
        images=labelled.images,
        class_names=class_names(name),
        templates=templates(name),
        targets=labelled.targets,
        metric=public.metric,
        counted=labelled.counted,
    )


def _missing(public: _PublicSet, folder: Path, split: str) -> list[str]:
    return [path for path in public.files(split) if not (folder / path).exists()]


def _fetch(name: str, folder: Path, split: str) -> None:
    public = PUBLIC_SETS[name]
    assert public.fetch is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        public.fetch(folder, split)
    # Of a network, an archive and a disk, everything can fail in every way.
    except Exception as error:
        raise UniclError(
            f"cannot download {name} to {folder}: {_reason(error)}; remove what is half "
            f"unpacked and try again, or {public.by_hand}"
        ) from error


def _read(name: str, folder: Path, split: str) -> _Labelled:
    try:
        return PUBLIC_SETS[name].read(folder, split)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise UniclError(f"{name} needs {package}: pip install {package}") from error
    # torchvision raises whatever its parsers do.
    except Exception as error:
        raise UniclError(
            f"{name} in {folder} is damaged: {_reason(error)}; remove it and fetch it again"
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _files(
    name: str, folder: Path, paths: Sequence[Any], own_names: Sequence[str], labels: Sequence[int]
) -> _Labelled:
    """Name files relative to the set's folder, and number their classes as CLIP does."""
    relative = [os.path.relpath(path, folder) for path in paths]
    numbers = np.array(class_numbers(name, own_names), np.int64)
    return _Labelled(ImageFiles(folder, relative), numbers[np.array(labels, np.int64)])


def _read_food101(folder: Path, split: str) -> _Labelled:
    data = datasets.Food101(folder, split)
    return _files("food101", folder, data._image_files, data.classes, data._labels)


def _read_cifar(name: str) -> Callable[[Path, str], _Labelled]:
    def read(folder: Path, split: str) -> _Labelled:
        kind = _CIFAR[name]
        # The files are pickles. torchvision opens none whose MD5 is not the published one.
        data = kind(folder, train=split == "train")
        numbers = np.array(class_numbers(name, data.classes), np.int64)
        images = PixelArray(data.data, f"{folder / kind.base_folder} ({split})")
        return _Labelled(images, numbers[np.array(data.targets, np.int64)])

    return read


_CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def _cifar(name: str) -> _PublicSet:
    kind = _CIFAR[name]
    train, test = (tuple(file for file, _ in files) for files in (kind.train_list, kind.test_list))
    return _PublicSet(
        metric="top1",
        read=_read_cifar(name),
        # torchvision checks all of them before it reads one.
        files=lambda split: tuple(
            f"{kind.base_folder}/{file}" for file in (*train, *test, kind.meta["filename"])
        ),
        by_hand=f"unpack {kind.url} there",
        fetch=lambda folder, split: kind(folder, download=True),
    )


def _read_sun397(folder: Path, split: str) -> _Labelled:
    data = datasets.SUN397(folder)
    base = folder / "SUN397"
    labels = {
        path.relative_to(base).as_posix(): label
        for path, label in zip(data._image_files, data._labels, strict=True)
    }
    partition = folder / {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    if partition.exists():
        chosen = [line.strip().lstrip("/") for line in partition.read_text().splitlines()]
        absent = [path for path in chosen if path not in labels]
        if absent:
            raise UniclError(
                f"{len(absent)} images of {partition.name}, such as {absent[0]}, are missing"
            )
    else:
        first = {"train": 0, "test": _SUN397_EACH}[split]
        chosen = _choose(labels, first, first + _SUN397_EACH)
    paths = [base / path for path in chosen]
    return _files("sun397", folder, paths, data.classes, [labels[path] for path in chosen])


def _read_cars(folder: Path, split: str) -> _Labelled:
    import scipy.io  # noqa: F401  torchvision reports its absence as missing data.

    data = datasets.StanfordCars(folder, split)
    paths, labels = zip(*data._samples, strict=True)
    return _files("cars", folder, paths, data.classes, labels)


def _read_aircraft(folder: Path, split: str) -> _Labelled:
    data = datasets.FGVCAircraft(folder, split, annotation_level="variant")
    return _files("aircraft", folder, data._image_files, data.classes, data._labels)


def _read_voc2007(folder: Path, split: str) -> _Labelled:
    data = datasets.VOCDetection(folder, year="2007", image_set=split)
    lists = folder / "VOCdevkit/VOC2007/ImageSets/Main"
    names = class_names("voc2007")
    truth = np.empty((len(data), len(names)), np.int64)
    for number, name in enumerate(names):
        rows = np.loadtxt(lists / f"{name}_{split}.txt", dtype=str, ndmin=2)
        if rows[:, 0].tolist() != [Path(path).stem for path in data.images]:
            raise UniclError(f"{name}_{split}.txt lists other images than {split}.txt")
        truth[:, number] = rows[:, 1].astype(np.int64)
    paths = [os.path.relpath(path, folder) for path in data.images]
    # 1: shown; -1: not shown; 0: shown, but only by objects that are `difficult`.
    return _Labelled(ImageFiles(folder, paths), truth == 1, truth != 0)


def _read_dtd(folder: Path, split: str) -> _Labelled:
    data = datasets.DTD(folder, split, partition=1)
    return _files("dtd", folder, data._image_files, data.classes, data._labels)


def _read_pets(folder: Path, split: str) -> _Labelled:
    data = datasets.OxfordIIITPet(folder, {"train": "trainval", "test": "test"}[split])
    return _files("pets", folder, data._images, data.classes, data._labels)


def _read_caltech101(folder: Path, split: str) -> _Labelled:
    # Not torchvision's class, which leaves the background out.
    base = folder / "caltech101/101_ObjectCategories"
    names = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name[0] != ".")
    numbers = {name: number for number, name in enumerate(names)}
    found = make_dataset(base, numbers, extensions=_EXTENSIONS, allow_empty=True)
    labels = {Path(path).relative_to(base).as_posix(): label for path, label in found}
    train = _choose(labels, 0, _CALTECH101_TRAIN)
    chosen = train if split == "train" else sorted(labels.keys() - set(train))
    paths = [base / path for path in chosen]
    return _files("caltech101", folder, paths, names, [labels[path] for path in chosen])


def _read_flowers(folder: Path, split: str) -> _Labelled:
    data = datasets.Flowers102(folder, split)
    paths = [os.path.relpath(path, folder) for path in data._image_files]
    # The files have numbers for classes, which are CLIP's.
    return _Labelled(ImageFiles(folder, paths), np.array(data._labels, np.int64))


def _read_imagenet(folder: Path, split: str) -> _Labelled:
    # Not torchvision's class, which wants its archive of synsets: sorted, they are CLIP's order.
    base = folder / split
    names = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(names) != len(class_names("imagenet")):
        raise UniclError(f"{base} has {len(names)} folders of classes, not 1000")
    numbers = {name: number for number, name in enumerate(names)}
    found = make_dataset(base, numbers, extensions=_EXTENSIONS, allow_empty=True)
    paths = [os.path.relpath(path, folder) for path, _ in found]
    return _Labelled(ImageFiles(folder, paths), np.array([label for _, label in found], np.int64))


_EXTENSIONS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def _choose(labels: dict[str, int], first: int, end: int) -> list[str]:
    """Of each class, the paths from the first to the end in the order of their hashes, sorted."""
    of_class = defaultdict(list)
    for path, label in labels.items():
        of_class[label].append((blake2b(os.fsencode(path)).digest(), path))
    return sorted(path for paths in of_class.values() for _, path in sorted(paths)[first:end])


PUBLIC_SETS: dict[str, _PublicSet] = {
    "food101": _PublicSet(
        metric="top1",
        read=_read_food101,
        files=lambda split: (f"food-101/meta/{split}.json", "food-101/images"),
        by_hand=f"unpack {datasets.Food101._URL} there",
        fetch=lambda folder, split: datasets.Food101(folder, split, download=True),
    ),
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "sun397": _PublicSet(
        metric="top1",
        read=_read_sun397,
        files=lambda split: ("SUN397/ClassName.txt",),
        by_hand="unpack SUN397.tar.gz there (MD5 8ca2778205c41d23104230ba66911c7a), which its "
        "publisher no longer serves: github.com/pytorch/vision/issues/9348",
        offered=False,
    ),
    "cars": _PublicSet(
        metric="top1",
        read=_read_cars,
        files=lambda split: (
            "stanford_cars/devkit/cars_meta.mat",
            f"stanford_cars/cars_{split}",
            "stanford_cars/devkit/cars_train_annos.mat"
            if split == "train"
            else "stanford_cars/cars_test_annos_withlabels.mat",
        ),
        by_hand="bring it there by hand, as its publisher no longer serves it: "
        "github.com/pytorch/vision/issues/7545 names copies",
        offered=False,
    ),
    "aircraft": _PublicSet(
        metric="mean_per_class",
        read=_read_aircraft,
        files=lambda split: (
            "fgvc-aircraft-2013b/data/variants.txt",
            f"fgvc-aircraft-2013b/data/images_variant_{split}.txt",
            "fgvc-aircraft-2013b/data/images",
        ),
        by_hand=f"unpack {datasets.FGVCAircraft._URL} there",
        fetch=lambda folder, split: datasets.FGVCAircraft(folder, split, download=True),
        splits=("train", "val", "test"),
    ),
    "voc2007": _PublicSet(
        metric="map11",
        read=_read_voc2007,
        files=lambda split: (
            f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt",
            f"VOCdevkit/VOC2007/ImageSets/Main/aeroplane_{split}.txt",
            "VOCdevkit/VOC2007/JPEGImages",
        ),
        by_hand="unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar there from "
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/",
        fetch=lambda folder, split: datasets.VOCDetection(
            folder, year="2007", image_set=split, download=True
        ),
        splits=("train", "val", "test"),
    ),
    "dtd": _PublicSet(
        metric="top1",
        read=_read_dtd,
        files=lambda split: (f"dtd/dtd/labels/{split}1.txt", "dtd/dtd/images"),
        by_hand=f"unpack {datasets.DTD._URL} in dtd there",
        fetch=lambda folder, split: datasets.DTD(folder, split, download=True),
        splits=("train", "val", "test"),
    ),
    "pets": _PublicSet(
        metric="mean_per_class",
        read=_read_pets,
        files=lambda split: (
            "oxford-iiit-pet/annotations/" + {"train": "trainval.txt", "test": "test.txt"}[split],
            "oxford-iiit-pet/images",
        ),
        by_hand="unpack images.tar.gz and annotations.tar.gz in oxford-iiit-pet there from "
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        fetch=lambda folder, split: datasets.OxfordIIITPet(folder, download=True),
    ),
    "caltech101": _PublicSet(
        metric="mean_per_class",
        read=_read_caltech101,
        files=lambda split: ("caltech101/101_ObjectCategories",),
        by_hand="unpack 101_ObjectCategories.tar.gz in caltech101 there from "
        "https://data.caltech.edu/records/mzrjq-6wc02",
        fetch=lambda folder, split: datasets.Caltech101(folder, download=True),
    ),
    "flowers": _PublicSet(
        metric="mean_per_class",
        read=_read_flowers,
        files=lambda split: (
            "flowers-102/jpg",
            "flowers-102/imagelabels.mat",
            "flowers-102/setid.mat",
        ),
        by_hand="unpack 102flowers.tgz in flowers-102 there, beside the other two, from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        fetch=lambda folder, split: datasets.Flowers102(folder, split, download=True),
        splits=("train", "val", "test"),
    ),
    "imagenet": _PublicSet(
        metric="top1",
        read=_read_imagenet,
        files=lambda split: (split,),
        by_hand="put the archives of its images and ILSVRC2012_devkit_t12.tar.gz there from "
        "https://image-net.org, and --download unpacks them",
        offered=False,
        fetch=lambda folder, split: datasets.ImageNet(folder, split),
        splits=("train", "val"),
    ),
}
"""By name, in the order of Florence's table 1."""

ZERO_SHOT_SETS = tuple(PUBLIC_SETS)
"""The sets of Florence's table 1."""
LINEAR_PROBE_SETS = tuple(name for name in PUBLIC_SETS if name != "imagenet")
"""The sets of Florence's table 2."""
