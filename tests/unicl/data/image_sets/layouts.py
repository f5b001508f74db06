"""Small files in the real layouts of the public sets, as their archives unpack."""

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from unicl.data.image_sets.clip_classes import class_names


def picture(path: Path, shade: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    Image.new("RGB", (3, 2), (shade % 256, shade // 256, 90)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def lines(path: Path, rows: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def food101(root: Path) -> None:
    base = root / "food101/food-101"
    names = [name.replace(" ", "_") for name in class_names("food101")]
    for split, count in (("train", 2), ("test", 1)):
        # The real files list the classes in alphabetical order, too; another one must do as well.
        listed = {name: [f"{name}/{split}{n}" for n in range(count)] for name in reversed(names)}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / f"meta/{split}.json").write_text(json.dumps(listed))
        for number, paths in enumerate(listed.values()):
            for path in paths:
                picture(base / f"images/{path}.jpg", number)


def cifar(root: Path, name: str, patch: Callable[..., None]) -> dict[str, list[int]]:
    """Write the pickled batches, and have torchvision take their checksums for the published."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    base = root / name / kind.base_folder
    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    key = "labels" if name == "cifar10" else "fine_labels"
    num_classes = len(class_names(name))
    sums, labels = {}, {"train": [], "test": []}
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        for file, _ in files:
            drawn = random.integers(num_classes, size=4).tolist()
            pixels = random.integers(256, size=(4, 3072), dtype=np.uint8)
            (base / file).write_bytes(pickle.dumps({"data": pixels, key: drawn}))
            labels[split] += drawn
    native = [label.replace(" ", "_") for label in class_names(name)]
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: native}))
    for path in base.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    patch(kind, "train_list", [[file, sums[file]] for file, _ in kind.train_list])
    patch(kind, "test_list", [[file, sums[file]] for file, _ in kind.test_list])
    patch(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})
    return labels


SUN_CLASSES = (
    ("a/abbey", "abbey"),
    ("a/apse/indoor", "apse indoor"),
    # Sorted by path, not by name: CLIP has the cell first.
    ("j/jail/indoor", "jail indoor"),
    ("j/jail_cell", "jail cell"),
    ("t/theater/indoor_procenium", "theater indoor procenium"),
)


def sun397(root: Path, *, images: int = 103, partition: bool = False) -> None:
    base = root / "sun397/SUN397"
    lines(base / "ClassName.txt", [f"/{path}" for path, _ in SUN_CLASSES])
    for number, (path, _) in enumerate(SUN_CLASSES):
        for n in range(images):
            picture(base / path / f"sun_{n:04d}.jpg", number)
    if partition:
        for file, n in (("Training_01.txt", 1), ("Testing_01.txt", 2)):
            lines(
                base.parent / file,
                [f"/{path}/sun_{n:04d}.jpg" for path, _ in reversed(SUN_CLASSES)],
            )


def cars(root: Path) -> None:
    base = root / "cars/stanford_cars"
    (base / "devkit").mkdir(parents=True)
    meta = np.array([*class_names("cars")], dtype=object)
    savemat(base / "devkit/cars_meta.mat", {"class_names": meta})
    for split, path in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        kinds = [("bbox_x1", "u1"), ("class", "u1"), ("fname", "O")]
        rows = [(1, number, f"{number:05d}.jpg") for number in (196, 1, 7, 174)]
        savemat(base / path, {"annotations": np.array(rows, dtype=kinds)})
        for _, number, name in rows:
            picture(base / f"cars_{split}" / name, number)


def aircraft(root: Path) -> None:
    base = root / "aircraft/fgvc-aircraft-2013b/data"
    names = list(class_names("aircraft"))
    lines(base / "variants.txt", names)
    for first, split in enumerate(("train", "val", "test")):
        chosen = [names[number] for number in (72, 0, 37, 99)]
        ids = [f"{first}{number:06d}" for number in range(4)]
        lines(
            base / f"images_variant_{split}.txt",
            [f"{image} {name}" for image, name in zip(ids, chosen, strict=True)],
        )
        for image in ids:
            picture(base / f"images/{image}.jpg", int(image) % 1000)


# Of each image: the classes shown, and those of which only `difficult` objects are.
VOC_IMAGES = (
    ({"dog", "person"}, set()),
    ({"diningtable"}, {"chair"}),
    (set(), {"pottedplant"}),
    ({"cat"}, set()),
)


def voc2007(root: Path) -> None:
    base = root / "voc2007/VOCdevkit/VOC2007"
    for first, split in enumerate(("train", "val", "test")):
        ids = [f"{first}{number:05d}" for number in range(len(VOC_IMAGES))]
        lines(base / f"ImageSets/Main/{split}.txt", ids)
        for name in class_names("voc2007"):
            values = [
                1 if name in shown else 0 if name in difficult else -1
                for shown, difficult in VOC_IMAGES
            ]
            lines(
                base / f"ImageSets/Main/{name}_{split}.txt",
                [f"{image} {value:2d}" for image, value in zip(ids, values, strict=True)],
            )
        for image, (shown, difficult) in zip(ids, VOC_IMAGES, strict=True):
            picture(base / f"JPEGImages/{image}.jpg", int(image) % 1000)
            objects = [(name, 0) for name in shown] + [(name, 1) for name in difficult]
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
            lines(
                base / f"Annotations/{image}.xml",
                [
                    "<annotation>",
                    *(
                        f"<object><name>{name}</name><difficult>{flag}</difficult>{box}</object>"
                        for name, flag in objects
                    ),
                    "</annotation>",
                ],
            )


def dtd(root: Path) -> None:
    base = root / "dtd/dtd/dtd"
    names = class_names("dtd")
    for split in ("train", "val", "test"):
        paths = [f"{name}/{name}_{split}.jpg" for name in names]
        lines(base / f"labels/{split}1.txt", paths)
        lines(base / f"labels/{split}2.txt", paths[:1])
        for number, path in enumerate(paths):
            picture(base / "images" / path, number)


def pets(root: Path) -> None:
    base = root / "pets/oxford-iiit-pet"
    # The real files number the breeds by name, whatever the case; those of cats are capitalised.
    names = sorted(class_names("pets"), key=str.lower)
    for split in ("trainval", "test"):
        rows = []
        for number, name in enumerate(names, 1):
            image = f"{name.replace(' ', '_')}_{number}"
            rows.append(f"{image} {number} {1 + name.islower()} 1")
            picture(base / f"images/{image}.jpg", number)
        lines(base / f"annotations/{split}.txt", rows)


CALTECH_RENAMED = {
    "background": "BACKGROUND_Google",
    "off-center face": "Faces",
    "centered face": "Faces_easy",
    "leopard": "Leopards",
    "motorbike": "Motorbikes",
    "airplane": "airplanes",
    "side of a car": "car_side",
    "body of a cougar cat": "cougar_body",
    "face of a cougar cat": "cougar_face",
    "head of a  crocodile": "crocodile_head",
    "head of a flamingo": "flamingo_head",
    "snoopy (cartoon beagle)": "snoopy",
    "yin and yang symbol": "yin_yang",
}


def caltech101(root: Path, *, images: int = 31) -> None:
    base = root / "caltech101/caltech101/101_ObjectCategories"
    for number, name in enumerate(class_names("caltech101")):
        folder = base / CALTECH_RENAMED.get(name, name.replace(" ", "_"))
        for n in range(1, images + 1):
            picture(folder / f"image_{n:04d}.jpg", number)
    # The real archive has this one.
    (base / "BACKGROUND_Google/tmp").write_text("")


def flowers(root: Path, patch: Callable[..., None]) -> None:
    from torchvision import datasets

    base = root / "flowers/flowers-102"
    labels = np.array([*range(1, 103), 7], np.uint8)
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": labels[None]})
    ids = {"trnid": np.arange(1, 60), "valid": np.arange(60, 90), "tstid": np.arange(90, 104)}
    savemat(base / "setid.mat", ids)
    for number in range(1, 104):
        picture(base / f"jpg/image_{number:05d}.jpg", number)
    sums = {
        key: (file, hashlib.md5((base / file).read_bytes()).hexdigest())
        for key, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    patch(datasets.Flowers102, "_file_dict", {**datasets.Flowers102._file_dict, **sums})


def imagenet(root: Path) -> None:
    for part in ("train", "val"):
        for number in range(1000):
            # Real ones go from n01440764 to n15075141.
            picture(root / f"imagenet/{part}/n{1440764 + 9 * number:08d}/{part}.JPEG", number)
