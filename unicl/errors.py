"""The errors a person sees as one line; the command line turns them into exit codes."""

from pathlib import Path


class UniclError(Exception):
    """A failure worth one line: its message names the thing and the way out (exit code 1)."""

    exit_code = 1
    told = False
    """Whether the first rank says the same: it is then said once."""


class UsageError(UniclError, ValueError):
    """A mistake in what was asked for: an unknown key, a wrong type, a missing path (exit 2)."""

    exit_code = 2


def no_model(name: str) -> UsageError:
    """Say that a model's name is no path, and how those are named that are none."""
    others = "; other models are named open_clip:NAME[/WEIGHTS] or open_clip:hf-hub:ORG/NAME"
    # Whoever leaves out open_clip: writes a slash, too, but before it no folder's name.
    first = name.partition("/")[0]
    is_path = "/" in name and (first == "~" or Path(first).exists())
    return UsageError(
        f"there is no model {name}: no such file or folder{'' if is_path else others}"
    )
