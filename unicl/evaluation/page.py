"""The parts an HTML page is made of: escaping, tables, embedded images, one style sheet."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from unicl.config import find_picture
from unicl.data.augment import UndecodableImage, open_image, upright
from unicl.errors import UniclError
from unicl.evaluation.published import is_rank

RUN_COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth")
"""The style sheet's names for the colours of several runs."""

STYLE = """
:root { --paper: #ffffff; --ink: #1d2329; --soft: #5c6670; --line: #dfe3e8; --panel: #f6f7f9;
  --first: #1f6feb; --second: #d9730d; --third: #8250df; --fourth: #0a8f8f;
  --fifth: #bf3989; --sixth: #7d6b1a; --right: #1a7f37; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #98a2ad;
  --line: #323a43; --panel: #1c2229; --first: #6ea8fe; --second: #f0a35e; --third: #b794f6;
  --fourth: #4fc4c4; --fifth: #f283bd; --sixth: #cdb75a; --right: #56c271; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 28px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; }
h1 { margin: 0 0 6px; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 52px 0 4px; font-size: 21px; }
h3 { margin: 24px 0 10px; font-size: 16px; }
p { margin: 0 0 14px; max-width: 76ch; }
.soft, figcaption, small, cite { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px;
  margin: 26px 0 0; }
.figures > div { background: var(--panel); border-radius: 10px; padding: 16px 18px; }
.figures b { display: block; font-size: 34px; line-height: 1.15; font-weight: 650;
  letter-spacing: -0.02em; }
.figures span { display: block; margin-top: 4px; font-size: 14.5px; line-height: 1.4; }
.figures .soft { font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 12px 0 6px; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
.words { text-align: left; min-width: 9em; overflow-wrap: anywhere; }
td small, th small { display: block; font-size: 12.5px; font-weight: 400; line-height: 1.3;
  white-space: nowrap; }
.words small { white-space: normal; }
.whole { white-space: nowrap; }
.long { min-width: 10em; word-break: break-all; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 50%; }
.notes { margin-top: 16px; }
.notes p { margin-bottom: 6px; font-size: 15px; }
.notes ul { margin: 0 0 8px; padding-left: 20px; font-size: 15px; }
.notes + details table { font-size: 14px; }
.map { margin-bottom: 18px; }
cite { font-style: normal; }
table.map { font-size: 12.5px; }
.map td { padding: 0; border: 1px solid var(--line); width: 34px; min-width: 26px; height: 26px;
  text-align: center; vertical-align: middle; }
.map th { padding: 2px 8px 2px 0; border: 0; font-weight: 400; text-align: left;
  vertical-align: middle; white-space: nowrap; }
.map thead th { padding: 0 0 6px; vertical-align: bottom; text-align: center; }
.map th span { writing-mode: vertical-rl; transform: rotate(180deg); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr));
  gap: 20px 28px;  margin-top: 14px; }
figure { margin: 0; }
.curves figcaption { font-weight: 600; color: var(--ink); font-size: 15px; margin-bottom: 2px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.cards { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.card { display: flex; gap: 14px; border: 1px solid var(--line); border-radius: 10px;
  padding: 12px; }
.card > img { width: 84px; height: 84px; flex: none; }
img { object-fit: contain; border-radius: 6px; background: var(--panel); }
.card > div { flex: 1; min-width: 0; }
.truth { font-weight: 600; font-size: 14.5px; line-height: 1.3; margin-bottom: 6px;
  overflow-wrap: anywhere; }
.guess { position: relative; display: flex; justify-content: space-between; gap: 8px;
  font-size: 13px; line-height: 1.3; padding: 2px 6px; margin-bottom: 2px; border-radius: 4px; }
.guess i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--soft);
  opacity: 0.16; }
.guess.right { color: var(--right); font-weight: 600; }
.guess.right i { background: var(--right); opacity: 0.2; }
.guess span { position: relative; overflow-wrap: anywhere; }
.guess span + span { flex: none; font-variant-numeric: tabular-nums; }
.query { border-top: 1px solid var(--line); padding: 12px 0; display: grid;
  grid-template-columns: minmax(130px, 1fr) 4fr; gap: 16px; align-items: start; }
.query > b { overflow-wrap: anywhere; }
.hits { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 12px; }
.hits figure { text-align: center; }
.hits img { width: 84px; height: 84px; max-width: 100%; padding: 2px;
  border: 3px solid transparent; }
.hits .right img { border-color: var(--right); }
.hits figcaption { font-size: 12.5px; line-height: 1.3; overflow-wrap: anywhere; margin-top: 3px; }
.hits .right figcaption { color: var(--right); }
.alone { max-width: 540px; }
.seen { display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: flex-start; }
.seen figure { max-width: 240px; }
.seen img { max-width: 100%; }
.seen figcaption { font-size: 13.5px; line-height: 1.35; overflow-wrap: anywhere; }
.seen .right figcaption { color: var(--right); }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
table.pairs td { padding: 5px 24px 5px 0; }
table.pairs td:first-child { color: var(--soft); }
.code td + td { overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 13px; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 13.5px;
  color: var(--soft); }
footer p { margin-bottom: 4px; max-width: none; }
@media (max-width: 640px) { body { padding: 24px 16px 20px; }
  th, td { padding-right: 10px; font-size: 14px; } td small { font-size: 11.5px; }
  .words { min-width: 6.5em; }
  .query, .curves { grid-template-columns: minmax(0, 1fr); } }
"""


def page(title: str, body: str) -> str:
    """Wrap a body into a page that needs no other file and no network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def picture(image: bytes, description: str) -> str:
    """An `<img>` that carries the image's own bytes.

    Raises:
        UniclError: the bytes are no image.
    """
    try:
        with open_image(image) as opened:
            # A phone's JPEG with a second picture inside (MPO) is a JPEG to a browser.
            kind = Image.MIME["JPEG" if opened.format == "MPO" else str(opened.format)]
    except UndecodableImage as error:
        raise UniclError(
            f"the report's image of {description!r} cannot be read: {error}"
        ) from error
    data = base64.b64encode(image).decode("ascii")
    return f'<img src="data:{kind};base64,{data}" alt="{escape(description)}" loading="lazy">'


def thumbnail(image: bytes, *, side: int) -> bytes:
    """Return a small JPEG of an image as the model sees it, but uncropped.

    Args:
        image: the bytes of an image file, or of another medium that a plug-in can show.
        side: pixels of its longer side at most. Images that are far smaller are enlarged by a
            whole number: scans of 8 x 8 pixels would be a blur in a browser.

    Raises:
        UndecodableImage: the bytes are no image, or damaged.
    """
    with open_image(find_picture(image) or image) as opened:
        small = upright(opened, longer_side=2 * side)
    small.thumbnail((side, side))
    times = side // 2 // max(small.size)
    if times > 1:
        small = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    file = BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def dot(run: int | None) -> str:
    """A dot in the colour of a run's curves, by its number; nothing for no run."""
    if run is None:
        return ""
    return f'<i class="dot" style="background:var(--{RUN_COLOURS[run % len(RUN_COLOURS)]})"></i>'


# Of a setting that has many values.
_MOST_VALUES = 12

# Characters of a column's head that is not broken into lines; a longer one breaks anywhere, so
# that it is not parted from its dot.
_WHOLE = 24

Cell = str | tuple[str, str]
"""A text, or a text and what stands below it in small."""


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    """What it says."""
    aside: str = ""
    """What stands below it in small."""
    run: int | None = None
    """Number of the run that it shows: it gets the colour of the run's curves."""
    words: bool = False
    """It holds words, which begin at the left; figures end at the right."""


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, style: str = "") -> str:
    """A table of texts.

    Args:
        columns: their heads; where no column has a name there is no head.
        rows: cells, one per column.
        style: a class of the style sheet.
    """
    head = ""
    if any(column.name for column in columns):
        cells = "".join(
            f"<th{_class(column, head=True)}>{dot(column.run)}"
            f"{_cell((column.name, column.aside))}</th>"
            for column in columns
        )
        head = f"<thead><tr>{cells}</tr></thead>\n"
    lines = []
    for row in rows:
        pairs = zip(columns, row, strict=True)
        filled = "".join(f"<td{_class(column)}>{_cell(cell)}</td>" for column, cell in pairs)
        lines.append(f"<tr>{filled}</tr>")
    body = "<tbody>\n{}\n</tbody>".format("\n".join(lines))
    return f'<div class="scroll"><table class="{style}">\n{head}{body}</table></div>'


def _class(column: Column, *, head: bool = False) -> str:
    names = ["words"] if column.words else []
    if head:
        names.append("whole" if len(column.name) <= _WHOLE else "long")
    return f' class="{" ".join(names)}"' if names else ""


def _cell(cell: Cell) -> str:
    text, aside = (cell, "") if isinstance(cell, str) else cell
    return f"{escape(text)}<small>{escape(aside)}</small>" if aside else escape(text)


def figure(metric: str, value: float) -> str:
    """A metric's value as a person reads it: 71.3% of a share, 2.0 of a rank."""
    return f"{value:,.1f}" if is_rank(metric) else percent(value)


def percent(share: float | None) -> str:
    """A share as a person reads it: 71.3%, and 0.053% where more digits are needed."""
    if share is None or not math.isfinite(share):
        return "-"
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs, in their own order."""
    flat: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.extend(flatten(value, f"{prefix}{name}."))
        else:
            flat.append((f"{prefix}{name}", _setting(value)))
    return flat


def _setting(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple) and len(value) > _MOST_VALUES:
        # Of VQAv2's 3,129 answers nobody reads all.
        few = ", ".join(map(str, value[:_MOST_VALUES]))
        return f"{few}, ... ({len(value):,} in all)"
    return str(value)
