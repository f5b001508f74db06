"""How models of open_clip are named: an architecture and its weights, a folder, the hub."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from unicl.errors import UsageError

CONFIG = "open_clip_config.json"
"""The file that makes a folder one of open_clip's."""

LOCAL = "local-dir:"
"""What the name of a folder in its format begins with."""

HUB = "hf-hub:"
"""What the name of a repository of the hub begins with."""


def has_scheme(architecture: str) -> bool:
    """Return whether a name is one of a folder or a repository."""
    return architecture.startswith((HUB, LOCAL))


def parse_name(name: str, *, weights: bool) -> tuple[str, str | None]:
    """Split a name into architecture, or scheme and place, and the tag or file of its weights.

    A file whose weights are not needed may be gone.

    Raises:
        UsageError: There is no such architecture, tag, file or folder.
    """
    import open_clip

    if name.startswith(HUB):
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", name.removeprefix(HUB)):
            raise UsageError(f"open_clip:{name} must be open_clip:{HUB}ORG/NAME")
        return name, None
    if name.startswith(LOCAL):
        path = Path(name.removeprefix(LOCAL)) / CONFIG
        if not path.is_file():
            raise UsageError(f"open_clip:{name}: there is no {path}; name a folder that has one")
        return name, None
    architecture, _, source = name.partition("/")
    models = open_clip.list_models()
    if name and architecture not in models and Path(name).is_dir():
        return parse_name(f"{LOCAL}{name}", weights=weights)
    if architecture not in models:
        nearest = _nearest(architecture, models, "see open_clip.list_models()")
        raise UsageError(f"open_clip has no architecture {architecture!r}; {nearest}")
    if not source:
        return architecture, None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    tag = source.lower().replace("-", "_")  # as open_clip spells them
    if tag in tags:
        return architecture, tag
    is_path = "/" in source or bool(Path(source).suffix)
    if Path(source).is_file() or (is_path and not weights):
        return architecture, source
    if is_path:
        raise UsageError(f"open_clip:{name}: there is no file {source}; give one, or a tag")
    nearest = _nearest(tag, tags, f"it has {', '.join(tags) or 'none'}")
    raise UsageError(f"open_clip has no weights {source!r} of {architecture}; {nearest}")


def absolute_name(name: str) -> str:
    """Return a name that means the same in any working directory: its folder or file absolute.

    Raises:
        UsageError: There is no such architecture, tag or folder.
    """
    import open_clip

    architecture, source = parse_name(name, weights=False)
    if architecture.startswith(LOCAL):
        return f"{LOCAL}{Path(architecture.removeprefix(LOCAL)).resolve()}"
    if source is None or open_clip.get_pretrained_cfg(architecture, source):
        return name
    return f"{architecture}/{Path(source).resolve()}"


def _nearest(word: str, words: Sequence[str], otherwise: str) -> str:
    found = difflib.get_close_matches(word, words, n=3, cutoff=0.4)
    return f"did you mean {', '.join(found)}?" if found else otherwise
