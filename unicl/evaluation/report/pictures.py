"""What images are taken for, in pictures: confusion, examples, and what texts bring up."""

from html import escape

from unicl.evaluation.answers import SavedAnswers, SavedExample
from unicl.evaluation.page import picture
from unicl.evaluation.report.confusion import confusion
from unicl.evaluation.report.contents import Report, TextQuery


def answers(report: Report) -> str:
    """Return confusion and examples of each set and run; of several the first is unfolded."""
    names = dict.fromkeys(name for run in report.runs for name in run.answers)
    blocks = [
        (f"{name}, {run.name}" if len(report.runs) > 1 else name, block)
        for name in names
        for run in report.runs
        if name in run.answers and (block := _block(run.answers[name]))
    ]
    if not blocks:
        return ""
    if len(blocks) == len(report.runs) == 1:
        shown = blocks[0][1]
    else:
        shown = "\n".join(
            f"<details{' open' if number == 0 else ''}><summary>{escape(name)}</summary>\n{block}"
            "</details>"
            for number, (name, block) in enumerate(blocks)
        )
    return f"<h2>What it sees</h2>\n{shown}"


def _block(saved: SavedAnswers) -> str:
    parts = [confusion(saved)]
    right = [example for example in saved.examples if example.right]
    wrong = [example for example in saved.examples if not example.right]
    if saved.examples:
        parts.append(
            "<p class=\"soft\">In bold the image's own name; below it the model's best guesses and "
            "how sure it is of each.</p>"
        )
    for heading, examples in (("Named right", right), ("Named wrong", wrong)):
        if examples:
            cards = "\n".join(_card(example) for example in examples)
            parts.append(f'<h3>{heading}</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(filter(None, parts))


def _card(example: SavedExample) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if name == example.truth else ""}">'
        f'<i style="width:{100 * min(max(probability, 0.0), 1.0):.1f}%"></i>'
        f"<span>{escape(name)}</span><span>{_sureness(probability)}</span></div>"
        for name, probability in example.guesses
    )
    return (
        f'<div class="card">{picture(example.image, example.truth)}'
        f'<div><div class="truth">{escape(example.truth)}</div>{guesses}</div></div>'
    )


def _sureness(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.01 else "&lt;1%"


def queries(report: Report) -> str:
    """Return the text queries, each with the images it brings up."""
    if not report.queries:
        return ""
    rows = "\n".join(_query(query) for query in report.queries)
    return (
        "<h2>Looking for images by text</h2>\n"
        '<p class="soft">The five images nearest to each text, best first. A frame marks images '
        f"that have this very name.</p>\n{rows}"
    )


def _query(query: TextQuery) -> str:
    figures = "".join(
        f'<figure class="{"right" if found.right else "other"}">'
        f"{picture(found.image, found.text)}<figcaption>{escape(found.text)}"
        f"{' &#10003;' if found.right else ''}</figcaption></figure>"
        for found in query.images
    )
    return f'<div class="query"><b>{escape(query.text)}</b><div class="hits">{figures}</div></div>'
