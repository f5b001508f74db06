"""The model card: what a model is, where it is from and how it is used, for people and for hubs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says that the model itself does not know."""

    name: str
    """The model's name, its title."""
    license: str = "other"
    """A hub's identifier of the licence of the weights, such as apache-2.0."""
    description: str = ""
    """What the model is, in a sentence or two."""
    trained_on: str = ""
    """The data, and how much of it."""
    tags: Sequence[str] = ()
    """Further tags; every card has some of its own."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name."""


def render(card: Card, *, library: str, usage: str, notes: Sequence[str] = ()) -> str:
    """Write a model card in Markdown, with the YAML head that hubs read.

    Args:
        card: What is known of the model.
        library: What loads it: "open_clip", "onnx", "unicl".
        usage: Python code.
        notes: Paragraphs on what the format needs, or leaves out.
    """
    tags = dict.fromkeys(("clip", "unicl", *card.tags))
    head = [
        "---",
        f"license: {_quoted(card.license)}",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags:",
        *(f"- {_quoted(tag)}" for tag in tags),
        "---",
    ]
    parts = ["\n".join(head), f"# {card.name}"]
    if card.description:
        parts.append(card.description)
    parts += [
        "Two towers, for images and for texts, that embed into one space of unit vectors.",
        "## Training data",
        card.trained_on or "Not stated.",
        "## Use",
        f"```python\n{usage.strip()}\n```",
        *notes,
    ]
    if card.metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in card.metrics.items()]
        parts += ["## Metrics", "\n".join(["| metric | value |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _quoted(value: str) -> str:
    # In quotes no word means a number, a boolean or the start of something.
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
