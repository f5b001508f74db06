"""Some images of a set as pictures: what was found in them, and what there is."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adapters.detection.drawing import draw
from adapters.detection.found import Detections, surest_names
from adapters.detection.measuring import Found
from adapters.detection.reading import open_annotated
from adapters.detection.sets import DetectionSet
from unicl.data.atomic import atomic_file, write_error
from unicl.data.augment import open_image

_COUNT = 12
_THRESHOLD = 0.3
_SIDE = 640
_BAND = 26
_FONT = 16


def save_pictures(
    folder: Path, images: DetectionSet, found: Found, names: Mapping[int, str]
) -> None:
    """Write up to 12 images, spread evenly over a set; others in the folder are replaced.

    Args:
        folder: Gets 01.jpg, 02.jpg, ...: found objects at the left, annotated ones at the right.
        images: The set.
        found: What was found; shown are scores of 0.3 and more, each object by its
            surest name.
        names: Of the categories of what was found.

    Raises:
        UniclError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    count = min(_COUNT, len(found.rows))
    chosen = [found.rows[number * len(found.rows) // count] for number in range(count)]
    ids = {int(images.image_ids[row]): row for row in chosen}
    shown: dict[int, list[tuple[list[float], str, float]]] = {row: [] for row in chosen}
    for each in found.results:
        if each["image_id"] in ids and each["score"] >= _THRESHOLD:
            x, y, width, height = each["bbox"]
            place = shown[ids[each["image_id"]]]
            place.append(([x, y, x + width, y + height], names[each["category_id"]], each["score"]))
    for number in range(_COUNT):
        path = folder / f"{number + 1:02d}.jpg"
        if number >= count:
            path.unlink(missing_ok=True)
            continue
        encoded = BytesIO()
        _beside(images, chosen[number], shown[chosen[number]]).save(encoded, "JPEG", quality=90)
        with atomic_file(path) as file:
            file.write(encoded.getvalue())


def _beside(
    images: DetectionSet, row: int, found: list[tuple[list[float], str, float]]
) -> Image.Image:
    """Return an image twice: with what was found in it, and with its annotations."""
    sample = images.files.read(row)
    image = open_annotated(open_image(sample.image), tuple(images.sizes[row].tolist()))
    annotations = images.of(row)
    surest = surest_names(
        Detections(
            torch.tensor([box for box, _, _ in found]).view(-1, 4),
            torch.tensor([score for _, _, score in found]),
            torch.arange(len(found)),
        )
    )
    names = [found[number][1] for number in surest.labels.tolist()]
    called = [images.class_names[label] for label in annotations.labels]
    left = _drawn(image, f"{sample.key}: found", surest.boxes, names, surest.scores)
    right = _drawn(image, "annotated", torch.from_numpy(annotations.boxes), called)
    both = Image.new("RGB", (left.width + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _drawn(
    image: Image.Image,
    title: str,
    boxes: Float[Tensor, "m 4"],
    names: Sequence[str],
    scores: Float[Tensor, "m"] | None = None,
) -> Image.Image:
    """Return an image of one size under its title, with boxes on it."""
    share = _SIDE / max(image.size)
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    drawn = draw(image.resize(size, Image.Resampling.BICUBIC), boxes * share, names, scores)
    titled = Image.new("RGB", (drawn.width, drawn.height + _BAND), "white")
    titled.paste(drawn, (0, _BAND))
    font = ImageFont.load_default(_FONT)
    ImageDraw.Draw(titled).text((4, 3), title, fill="black", font=font)
    return titled
