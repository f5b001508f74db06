import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicl.errors import UniclError, UsageError
from unicl.search.gallery import Answer, write_gallery
from unicl.search.index import Found
from unicl.search.items import Item


def encoded(width: int, height: int, kind: str = "PNG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    data = BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def read_image(item: Item) -> bytes:
    if item.where == "gone":
        raise FileNotFoundError(item.where)
    if item.where == "refused":
        raise UniclError("the shard is damaged")
    return {"broken": b"no image", "cut": encoded(300, 200)[:2000]}.get(
        item.where, encoded(1600, 800)
    )


def found(key: str, where: str = "here", text: str = "a cat", similarity: float = 0.5) -> Found:
    return Found(Item(key, where, text), similarity)


def write(folder: Path, *answers: Answer, **settings: str) -> str:
    write_gallery(folder / "page.html", answers, read_image, **settings)
    return (folder / "page.html").read_text()


def pictures(page: str) -> list[Image.Image]:
    data = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(BytesIO(b64decode(one))) for one in data]


def test_the_page_shows_queries_and_what_was_found(tmp_path: Path) -> None:
    answers = [
        Answer("cats", [found("k1", similarity=0.8125), found("k2", text="")]),
        Answer("mine.jpg", [found("k3")], image=encoded(30, 60)),
    ]
    page = write(tmp_path, *answers, title="Found", summary="exact, 2 ms per query")
    for words in ("Found", "exact, 2 ms", "cats", "mine.jpg", "k1", "k2", "k3", "0.812", "a cat"):
        assert words in page
    # Shrunk, and in the shape they have.
    assert [image.size for image in pictures(page)] == [
        (224, 112),
        (224, 112),
        (30, 60),
        (224, 112),
    ]
    assert len(page) < 4 * 40_000


def test_an_image_that_is_gone_is_shown_as_missing(tmp_path: Path) -> None:
    kinds = ("gone", "refused", "broken", "cut", "here")
    page = write(tmp_path, Answer("cats", [found(f"key-{kind}", kind) for kind in kinds]))
    assert page.count('<div class="missing">') == 4
    assert len(pictures(page)) == 1
    assert all(f"key-{kind}" in page for kind in kinds)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_any_colours(tmp_path: Path, mode: str) -> None:
    data = BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (40, 30)).save(data, kind)
    (shown,) = pictures(write(tmp_path, Answer("asked", [], image=data.getvalue())))
    transparent = mode in ("RGBA", "LA")
    assert shown.convert("L").getextrema() == pytest.approx(
        (255, 255) if transparent or mode == "CMYK" else (0, 0), abs=2
    )


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    data = encoded(100, 50, "JPEG", exif=exif.tobytes())
    (shown,) = pictures(write(tmp_path, Answer("asked", [], image=data)))
    assert shown.size == (50, 100)


class References(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    evil = '"><script src="https://x.example/a.js"></script>'
    answer = Answer(evil, [found(evil, text=evil)], image=encoded(10, 10))
    page = write(tmp_path, answer, title=evil, summary=evil)
    references = References(page)
    assert len(references.found) == 2
    assert all(value.startswith("data:image/jpeg;base64,") for value in references.found)
    assert not references.tags & {"script", "link", "iframe", "a"}
    assert "url(" not in page
    assert "@import" not in page


def test_no_answers(tmp_path: Path) -> None:
    assert "Search" in write(tmp_path)
    assert "cats" in write(tmp_path, Answer("cats", []))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        write_gallery(tmp_path / "none" / "page.html", [], read_image)
