"""The class names and prompt templates that CLIP's authors chose for the public sets."""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from unicl.data.prompts import TEMPLATES
from unicl.errors import UniclError

# What an image of a class without templates of its own is called.
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_names(name: str) -> tuple[str, ...]:
    """Return the names of a set's classes, in CLIP's order, which numbers them."""
    if name == "imagenet":
        # Slow to import, and needed for this set alone.
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    return tuple(_read()[name]["classes"])


def templates(name: str) -> tuple[str, ...]:
    """Return the prompt ensemble of a set, each with one `{}`."""
    if name == "imagenet":
        # Without the bare name, which is the UniCL release's addition to CLIP's 80.
        return TEMPLATES["clip"][1:]
    return tuple(_read()[name]["templates"])


def class_numbers(name: str, own_names: Sequence[str]) -> list[int]:
    """Return the number of each class that the data set's own files name.

    Raises:
        UniclError: A class is none of the set's.
    """
    renamed = _read()[name].get("renamed", {})
    numbers = {_plain(other): number for number, other in enumerate(class_names(name))}
    found = [numbers.get(_plain(renamed.get(own, own))) for own in own_names]
    if None in found:
        raise UniclError(f"{own_names[found.index(None)]!r} is no class of {name}")
    return [number for number in found if number is not None]


@cache
def _read() -> dict[str, Any]:
    return json.loads((files("unicl.data") / "assets" / "clip_classes.json").read_bytes())


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("/", " ").lower()
