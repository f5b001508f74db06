"""Sets of plain rectangles whose colours tell their classes, so that a batch can be checked."""

import json

from PIL import Image, ImageDraw

from adapters.detection.coco import open_coco

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}
GROUND = (60, 60, 60)


def paint(objects, width, height):
    """Return an image of rectangles, each a name and a box x1, y1, x2, y2."""
    image = Image.new("RGB", (width, height), GROUND)
    for name, (x1, y1, x2, y2), *_ in objects:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), COLOURS[name.lower()])
    return image


def write_painted(folder, images, names, *, sizes=(), federated=None):
    """Write `boxes.json` and PNGs of a list of objects per image; width is `80 + row` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, annotations = [], []
    for row, objects in enumerate(images):
        width, height = dict(sizes).get(row, (80 + row, 64))
        paint(objects, width, height).save(folder / f"{row}.png")
        entry = {"id": 100 + row, "file_name": f"{row}.png", "width": width, "height": height}
        entries.append({**entry, **(federated[row] if federated else {})})
        for name, (x1, y1, x2, y2), *more in objects:
            bbox = [x1, y1, x2 - x1, y2 - y1]
            category = 5 + names.index(name)
            each = {"id": len(annotations) + 1, "image_id": 100 + row, "category_id": category}
            annotations.append({**each, "bbox": bbox, "iscrowd": int("crowd" in more)})
    categories = [{"id": 5 + number, "name": name} for number, name in enumerate(names)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return open_coco(path, name=folder.name, split="")
