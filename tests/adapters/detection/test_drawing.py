"""Pictures: what is drawn where, in which colour, and that nothing leaves the picture."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from adapters.detection import drawing
from adapters.detection.drawing import colour, draw

GREY = (90, 90, 90)


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def drawn(size: tuple[int, int], rows: Tensor, names: list[str], *scores: float) -> np.ndarray:
    picture = draw(Image.new("RGB", size, GREY), rows, names, torch.tensor(scores))
    assert picture.size == size
    return np.asarray(picture)


def where(picture: np.ndarray, name: str) -> tuple[int, int, int, int]:
    """Return the rectangle that a name's colour takes: left, top, right, bottom."""
    rows, columns = np.nonzero((picture == colour(name)).all(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_box_is_drawn_where_it_is() -> None:
    picture = drawn((300, 200), boxes((50, 60, 250, 180)), ["dog"], 0.5)
    left, top, right, bottom = where(picture, "dog")
    assert (left, right, bottom) == (50, 250, 180)
    assert 30 <= top < 60  # the label stands on the box
    assert tuple(picture[120, 150]) == GREY
    assert tuple(picture[120, 50]) == tuple(picture[180, 150]) == colour("dog")


def test_the_image_stays_as_it_was() -> None:
    image = Image.new("RGB", (64, 64), GREY)
    draw(image, boxes((5, 5, 40, 40)), ["dog"])
    assert np.unique(np.asarray(image)) == GREY[0]


def test_objects_without_scores() -> None:
    image = Image.new("RGB", (300, 200), GREY)
    without = np.asarray(draw(image, boxes((50, 60, 250, 180)), ["dog"]))
    scored = drawn((300, 200), boxes((50, 60, 250, 180)), ["dog"], 0.5)
    label = [(picture[50:60] == colour("dog")).all(-1).sum() for picture in (without, scored)]
    assert 0 < label[0] < label[1]


def test_a_name_has_one_colour_in_all_pictures() -> None:
    alone = drawn((300, 200), boxes((50, 60, 250, 180)), ["dog"], 0.5)
    among = drawn(
        (500, 400), boxes((5, 60, 90, 180), (200, 200, 400, 350)), ["cat", "dog"], 0.6, 0.5
    )
    where(alone, "dog"), where(among, "dog"), where(among, "cat")
    assert colour("dog") == colour(" Dog") == (242, 13, 212)
    assert len({colour(name) for name in map(str, range(100))}) > 90


@pytest.mark.parametrize("size", [(100, 80), (400, 300), (1600, 1200)])
def test_lines_and_letters_grow_with_the_image(size: tuple[int, int]) -> None:
    width, height = size
    box = boxes((0.3 * width, 0.3 * height, 0.9 * width, 0.9 * height))
    picture = drawn(size, box, ["dog"], 0.5)
    _, top, _, _ = where(picture, "dog")
    row = (picture[int(0.8 * height)] == colour("dog")).all(-1).sum() / 2
    assert row == max(1, round((width + height) / 2 / 220))
    label = 0.3 * height - top
    assert 0.02 * height < label < max(0.08 * height, 18)


CORNERS = [(0, 0, 30, 20), (370, 0, 400, 20), (0, 280, 30, 300), (370, 280, 400, 300)]
WHOLE = (0, 0, 400, 300)


@pytest.mark.parametrize("row", [*CORNERS, WHOLE])
@pytest.mark.parametrize("name", ["dog", "a name of quite some length", "x" * 400])
def test_labels_are_not_cut_off(row: tuple[int, ...], name: str, monkeypatch) -> None:
    places = []

    def remember(*arguments):
        places.extend(found := original(*arguments))
        return found

    original = drawing._places
    monkeypatch.setattr(drawing, "_places", remember)
    drawn((400, 300), boxes(row), [name], 0.875)
    for left, top, right, bottom in places:
        assert left >= 0
        assert top >= 0
        assert right <= 400
        assert bottom <= 300


def test_long_names_keep_their_scores() -> None:
    font = ImageFont.load_default(12.0)
    label, width = drawing._fitted("word " * 50, " 0.88", font, 200)
    assert label.startswith("word word")
    assert label.endswith("... 0.88")
    assert width == font.getlength(label) <= 200
    assert drawing._fitted("two\n words", "", font, 200)[0] == "two words"


def test_labels_make_room_for_better_ones() -> None:
    row = (100, 100, 300, 200)
    picture = drawn((400, 300), boxes(row, row), ["dog", "cat"], 0.9, 0.8)
    for name in ("dog", "cat"):
        left, top, right, bottom = where(picture, name)
        inside = picture[top : bottom + 1, left : right + 1]
        assert (inside == colour(name)).all(-1).sum() > 300
    # The better one's lines and label are whole.
    assert tuple(picture[200, 200]) == colour("dog")
    assert where(picture, "dog")[1] < 100


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_all_modes(mode: str) -> None:
    picture = draw(Image.new(mode, (200, 100)), boxes((20, 30, 90, 80)), ["dog"])
    assert picture.mode == "RGB"
    where(np.asarray(picture), "dog")


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 500)])
def test_tiny_images_and_odd_boxes(size: tuple[int, int]) -> None:
    rows = boxes((-50, -50, 900, 900), (5, 5, 5, 5), (700, 700, 800, 800), (6, 6, 2, 2))
    drawn(size, rows, ["dog", "", "ünï çödé 猫", "cat"], 0.9, 0.8, 0.7, 0.6)


def test_nothing_found() -> None:
    assert np.unique(drawn((40, 30), boxes(), [])) == GREY[0]


@pytest.mark.parametrize("name", ["dog", "person", "cat", "bird", "car", "pothole", "smoke"])
def test_labels_are_readable(name: str) -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (channel / 255 for channel in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    background = colour(name)
    pair = sorted(map(luminance, (background, drawing._readable_on(background))))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5  # WCAG's contrast for text
