"""Ranks, as a launcher names them in the environment: what may be started on several of them."""

import os

from unicl.errors import UsageError


def refuse_ranks(command: str) -> None:
    """Stop what several ranks would all do into one folder.

    Raises:
        UsageError: a launcher has started several.
    """
    started = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if started != "1":
        raise UsageError(f"unicl {command} is for one process, not {started}; start it by itself")
