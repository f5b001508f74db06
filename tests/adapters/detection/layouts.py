"""Small sets of boxes as their publishers lay them out."""

import json

from PIL import Image

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "stop_sign"}]
ROBOFLOW = [
    {"id": 0, "name": "pets", "supercategory": "none"},
    {"id": 1, "name": "cat", "supercategory": "pets"},
    {"id": 2, "name": "dog", "supercategory": "pets"},
]


def picture(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "green").save(path)


def image(number, name, width=40, height=30, **more):
    return {"id": number, "file_name": name, "width": width, "height": height, **more}


def box(number, image_id, category, bbox=(1, 2, 10, 20), **more):
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, **more}


def write(path, images, annotations, categories=CATEGORIES, *, pictures=None):
    """Write a file in COCO's format, and its images into a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    if pictures is not None:
        for each in images:
            picture(pictures / each["file_name"], each["width"], each["height"])
    return path


def part(path, name="a.jpg", category=3, categories=CATEGORIES, *, pictures):
    """Write a part with one image and one object."""
    return write(path, [image(1, name)], [box(1, 1, category)], categories, pictures=pictures)
