"""Pictures of what was found: boxes on an image, with names and scores."""

import colorsys
import contextlib
import zlib
from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Shares of the mean of width and height.
_LINE = 1 / 220
_FONT = 1 / 40
_SMALLEST_FONT = 10.0
# Of many letters, and found on most machines; Pillow's own font has those of English only.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")

Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]


def draw(
    image: Image.Image,
    boxes: Float[Tensor, "m 4"],
    names: Sequence[str],
    scores: Float[Tensor, "m"] | None = None,
) -> Image.Image:
    """Return a picture of an image with boxes, each with its name and its score.

    A name has one colour in all pictures. Lines and letters grow with the image; labels stand
    where they hide no better one's, if there is such a place.

    Args:
        image: Of any mode; it is not changed.
        boxes: x1, y1, x2, y2 in pixels, best first: better ones are drawn over worse ones.
        names: Of each box.
        scores: Of each box, in 0..1; annotated objects have none.
    """
    picture = image.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    side = sum(picture.size) / 2
    line = max(1, round(side * _LINE))
    font = _font("".join(names), max(_SMALLEST_FONT, side * _FONT))
    texts = [""] * len(names) if scores is None else [f" {score:.2f}" for score in scores.tolist()]
    areas = [_within(box, picture.size) for box in boxes.tolist()]
    labels: list[tuple[str, Area]] = []
    for area, name, score in zip(areas, names, texts, strict=True):
        label, width = _fitted(name, score, font, picture.width - 2 * line)
        height = sum(font.getmetrics()) + line
        places = _places(area, width + 2 * line, height, picture.size)
        labels.append((label, _free(places, [taken for _, taken in labels])))
    # Labels come after all boxes: no line crosses them out.
    for area, name in reversed(list(zip(areas, names, strict=True))):
        canvas.rectangle(area, outline=colour(name), width=line)
    for (label, place), name in reversed(list(zip(labels, names, strict=True))):
        background = colour(name)
        canvas.rectangle(place, fill=background)
        position = (place[0] + line, (place[1] + place[3]) / 2)
        canvas.text(position, label, fill=_readable_on(background), font=font, anchor="lm")
    return picture


def colour(name: str) -> Colour:
    """Return a name's colour, which depends on nothing else."""
    number = zlib.crc32(name.strip().casefold().encode())
    lightness = (0.35, 0.5, 0.7)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(number // 3 % 360 / 360, lightness, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable_on(background: Colour) -> Colour:
    """Return black or white, whichever contrasts more (WCAG's relative luminance)."""
    linear = [(channel / 255) ** 2.2 for channel in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)


def _font(letters: str, size: float) -> ImageFont.FreeTypeFont:
    for file in () if letters.isascii() else _FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(file, size)
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _fitted(name: str, score: str, font: ImageFont.FreeTypeFont, room: int) -> tuple[str, float]:
    """Return a label that is no wider than the room, and its width; long names lose their ends."""
    name = " ".join(name.split())
    label, kept = name + score, len(name)
    while font.getlength(label) > room and kept > 1:
        kept -= 1
        label = f"{name[:kept].rstrip()}...{score}"
    return label, font.getlength(label)


def _places(area: Area, width: float, height: int, size: tuple[int, int]) -> list[Area]:
    """Return where a label may stand inside of a picture: over the box, in it, under it."""
    x1, y1, x2, y2 = area
    corners = [
        *((x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x2 - width, y1)),
        *((x1, y2 - height), (x1, y2), (x2 - width, y2 - height), (x2 - width, y2)),
    ]
    places = []
    for x, y in corners:
        left, top = (
            max(0.0, min(x, size[0] - 1.0 - width)),
            max(0.0, min(y, size[1] - 1.0 - height)),
        )
        # A label that had to be moved up or down goes last.
        places.append((top != y, (left, top, left + width, top + height)))
    return [place for _, place in sorted(places, key=lambda item: item[0])]


def _free(places: Sequence[Area], taken: Sequence[Area]) -> Area:
    """Return the first place that hides nothing that is taken, or the first of all."""
    for place in places:
        if not any(
            place[0] < other[2] and other[0] < place[2]
            and place[1] < other[3] and other[1] < place[3]
            for other in taken
        ):  # fmt: skip
            return place
    return places[0]


def _within(box: Sequence[float], size: tuple[int, int]) -> Area:
    """Return the part of a box inside of a picture; its lines are inside, too."""
    x1, y1, x2, y2 = (
        min(max(side, 0.0), most - 1.0) for side, most in zip(box, (*size, *size), strict=True)
    )
    return x1, y1, max(x1, x2), max(y1, y2)
