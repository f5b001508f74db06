"""The parts an HTML page is made of: escaping, tables, embedded images, one style sheet."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from unicl.data.augment import UndecodableImage, open_image
from unicl.errors import UniclError

STYLE = """
:root { --paper: #ffffff; --ink: #1d2329; --soft: #5c6670; --line: #dfe3e8; --panel: #f6f7f9;
  --first: #1f6feb; --second: #d9730d; --right: #1a7f37; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #98a2ad;
  --line: #323a43; --panel: #1c2229; --first: #6ea8fe; --second: #f0a35e; --right: #56c271; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 28px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 6px; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 52px 0 4px; font-size: 21px; }
h3 { margin: 24px 0 10px; font-size: 16px; }
p { margin: 0 0 14px; max-width: 76ch; }
.soft, figcaption, th small { color: var(--soft); }
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
  vertical-align: bottom; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.second { color: var(--second); }
th[colspan] { border-bottom: 0; padding-bottom: 0; text-align: right; }
.runs th, .runs th:first-child { font-weight: 500; font-size: 14px; text-align: right;
  padding-top: 2px; }
tbody td:first-child { white-space: nowrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr));
  gap: 20px 28px;  margin-top: 14px; }
figure { margin: 0; }
.curves figcaption { font-weight: 600; color: var(--ink); font-size: 15px; margin-bottom: 2px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
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
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
table.pairs td { text-align: left; padding: 5px 24px 5px 0; vertical-align: top; }
table.pairs td:first-child { color: var(--soft); }
details td + td { overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 13px; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 13.5px;
  color: var(--soft); }
footer p { margin-bottom: 4px; max-width: none; }
@media (max-width: 640px) { .query, .curves { grid-template-columns: minmax(0, 1fr); } }
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


Cell = str | tuple[str, ...]
"""One text, or one per run: the first run's, then the comparison's."""


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, runs: Sequence[str] = ()) -> str:
    """A table of texts.

    Args:
        head: names of the columns.
        rows: cells, one per column; a tuple has one text per run and makes its column as many.
        runs: names of the runs, shown below the name of each such column.
    """
    split = [isinstance(cell, tuple) and len(cell) > 1 for cell in rows[0]]
    names = "".join(
        f'<th colspan="{len(runs)}">{escape(name)}</th>'
        if per_run
        else f'<th rowspan="{2 if any(split) else 1}">{escape(name)}</th>'
        for name, per_run in zip(head, split, strict=True)
    )
    runs_row = "".join(_cells(tuple(runs), "th") for per_run in split if per_run)
    lines = [f"<tr>{names}</tr>"]
    if runs_row:
        lines.append(f'<tr class="runs">{runs_row}</tr>')
    lines.append("</thead>\n<tbody>")
    lines += [f"<tr>{''.join(_cells(cell, 'td') for cell in row)}</tr>" for row in rows]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead>\n{body}\n</tbody></table></div>'


def _cells(cell: Cell, tag: str) -> str:
    first, *others = cell if isinstance(cell, tuple) else (cell,)
    rest = "".join(f'<{tag} class="second">{escape(text)}</{tag}>' for text in others)
    return f"<{tag}>{escape(first)}</{tag}>{rest}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs, in their own order."""
    flat: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.extend(flatten(value, f"{prefix}{name}."))
        else:
            flat.append((f"{prefix}{name}", "unset" if value is None else str(value)))
    return flat
