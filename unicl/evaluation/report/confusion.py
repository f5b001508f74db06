"""Which classes are taken for which: a heat map, or of many classes the pairs confused most."""

from html import escape

import numpy as np

from unicl.evaluation.answers import SavedAnswers
from unicl.evaluation.page import Cell, Column, percent, table

# More rows than these are a carpet that nobody reads.
_MOST_MAPPED = 40
_PAIRS = 15


def confusion(saved: SavedAnswers) -> str:
    """Return the map or the pairs; nothing where no confusion was kept."""
    if saved.confusion is None or not saved.confusion.any():
        return ""
    return _map(saved) if len(saved.class_names) <= _MOST_MAPPED else _pairs(saved)


def _map(saved: SavedAnswers) -> str:
    assert saved.confusion is not None
    names = [escape(name) for name in saved.class_names]
    heads = "".join(f'<th scope="col"><span>{name}</span></th>' for name in names)
    lines = []
    for row, counts in enumerate(saved.confusion):
        cells = "".join(
            _cell(int(count), int(counts.sum()), names[row], names[column], right=row == column)
            for column, count in enumerate(counts)
        )
        lines.append(f'<tr><th scope="row">{names[row]}</th>{cells}</tr>')
    rows = "\n".join(lines)
    return (
        "<h3>What is taken for what</h3>\n"
        '<p class="soft">A row per class, a column per first guess; figures are images, and the '
        "deeper the colour the larger their share of the class.</p>\n"
        f'<div class="scroll"><table class="map"><thead><tr><th></th>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(count: int, of: int, truth: str, guess: str, *, right: bool) -> str:
    if count == 0:
        return "<td></td>"
    colour = "--right" if right else "--second"
    return (
        f'<td style="background:color-mix(in srgb, var({colour}) {100 * count / of:.0f}%, '
        f'transparent)" title="{truth}, taken for {guess}: {count:,} of {of:,}">{count:,}</td>'
    )


def _pairs(saved: SavedAnswers) -> str:
    assert saved.confusion is not None
    wrong = saved.confusion.copy()
    np.fill_diagonal(wrong, 0)
    totals = saved.confusion.sum(axis=1)
    # A stable order: of pairs that are confused equally often, the earlier class comes first.
    most = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    rows: list[list[Cell]] = [
        [
            saved.class_names[truth],
            saved.class_names[guess],
            f"{wrong[truth, guess]:,} of {totals[truth]:,}",
            percent(wrong[truth, guess] / totals[truth]),
        ]
        for truth, guess in zip(*np.unravel_index(most, wrong.shape), strict=True)
        if wrong[truth, guess]
    ]
    if not rows:
        return ""
    columns = [Column("Images of", words=True), Column("Taken for", words=True)]
    columns += [Column("How often"), Column("Share")]
    return f"<h3>Confused most often</h3>\n{table(columns, rows)}"
