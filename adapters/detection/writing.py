"""Scenes as sets of boxes, in the layout of Roboflow's exports: COCO's JSON beside the images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float64
from numpy import ndarray

from unicl.data.emoji_scenes import Scene, encode


def write_part(
    folder: Path,
    scenes: Iterable[Scene],
    names: Sequence[str],
    *,
    kind: str,
    called: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write scenes as one part of a set.

    Args:
        folder: Made if need be; gets 000000.png, ... and _annotations.coco.json.
        scenes: What is written.
        names: All classes, numbered from 1 on.
        kind: What the classes are called together.
        called: What the classes of this part are called; unset calls all by their names.
        info: What the JSON shall say besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(names, 1)}
    called = {name: name for name in names} if called is None else called
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        file_name = f"{index:06d}.png"
        (folder / file_name).write_bytes(encode(scene.pixels))
        height, width = scene.pixels.shape[:2]
        images.append({"id": index, "file_name": file_name, "height": height, "width": width})
        for name, box in zip(scene.names, scene.boxes, strict=True):
            # From 1 on: pycocotools takes an object numbered 0 for none.
            objects.append(_annotation(len(objects) + 1, index, numbers[name], box))
    # As Roboflow has it: number 0 is the kind of all the others, and annotates nothing.
    categories = [{"id": 0, "name": kind, "supercategory": "none"}]
    categories += [
        {"id": number, "name": called[name], "supercategory": kind}
        for name, number in numbers.items()
        if name in called
    ]
    content = {
        # COCO leaves open what this says.
        "info": dict(info or {}),
        "categories": categories,
        "images": images,
        "annotations": objects,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")


def _annotation(
    number: int, image: int, category: int, box: Float64[ndarray, "4"]
) -> dict[str, Any]:
    x1, y1, x2, y2 = box.tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [],
    }
