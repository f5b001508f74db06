"""The errors a person sees as one line; the command line turns them into exit codes."""


class UniclError(Exception):
    """A failure worth one line: its message names the thing and the way out (exit code 1)."""

    exit_code = 1
    told = False
    """Whether the first rank says the same: it is then said once."""


class UsageError(UniclError, ValueError):
    """A mistake in what was asked for: an unknown key, a wrong type, a missing path (exit 2)."""

    exit_code = 2
