"""A page of what was found: one self-contained HTML file with small pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from unicl.data.atomic import atomic_file, require_parent
from unicl.data.augment import UndecodableImage
from unicl.errors import UniclError
from unicl.evaluation.page import page, picture, thumbnail
from unicl.search.index import Found
from unicl.search.items import Item

# Longer side of a picture in pixels: about 10 KB each.
_SIDE = 224

_STYLE = """<style>
.query img { width: 100%; height: auto; max-height: 224px; }
.query .hits { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.query .hits img, .missing { width: 100%; height: 130px; }
.missing { display: grid; place-items: center; border-radius: 6px; background: var(--panel);
  color: var(--soft); font-size: 12.5px; }
.hits figcaption b { font-variant-numeric: tabular-nums; }
</style>"""


@dataclass(frozen=True)
class Answer:
    """A query and what a search found for it."""

    query: str
    """The text that was asked for, or what the image is called."""
    found: Sequence[Found]
    """What was found, best first."""
    image: bytes | None = None
    """The image file's bytes, where an image was asked for."""


def write_gallery(
    path: Path,
    answers: Sequence[Answer],
    read_image: Callable[[Item], bytes],
    *,
    title: str = "Search",
    summary: str = "",
) -> None:
    """Write the page; it appears complete or not at all, and needs no other file and no network.

    Args:
        path: The HTML file.
        answers: What is shown, in this order.
        read_image: Returns the image file's bytes of an item. What it cannot read (it raises an
            OSError or UniclError), and what is no image, is shown as missing.
        title: Headline.
        summary: A line below it, such as the facts of the index.

    Raises:
        UsageError: The folder does not exist.
        UniclError: The file cannot be written.
    """
    require_parent(path)
    rows = [_answer(answer, read_image) for answer in answers]
    head = f"{_STYLE}\n<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>"
    text = page(title, "\n".join([head, *rows]))
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _answer(answer: Answer, read_image: Callable[[Item], bytes]) -> str:
    asked = f"<b>{escape(answer.query)}</b>"
    if answer.image is not None:
        image = answer.image
        asked = f"<div>{_picture(lambda: image, answer.query)}{asked}</div>"
    figures = "".join(_figure(found, read_image) for found in answer.found)
    return f'<div class="query">{asked}<div class="hits">{figures}</div></div>'


def _figure(found: Found, read_image: Callable[[Item], bytes]) -> str:
    item = found.item
    shown = _picture(lambda: read_image(item), item.text or item.key)
    text = f"<br>{escape(item.text)}" if item.text else ""
    return (
        f"<figure>{shown}<figcaption><b>{found.similarity:.3f}</b>{text}"
        f'<br><span class="soft">{escape(item.key)}</span></figcaption></figure>'
    )


def _picture(read: Callable[[], bytes], description: str) -> str:
    try:
        return picture(thumbnail(read(), side=_SIDE), description)
    except (OSError, UniclError, UndecodableImage):
        return '<div class="missing">image missing</div>'
