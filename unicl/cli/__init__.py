"""The command line: one line for a mistake, exit code 2 for usage and 1 for failure.

Imports no torch until a command needs it, so that `unicl --help` answers at once.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

import unicl
from unicl.cli import training, using
from unicl.config import Recipe, Skill, warn_once, working_plugins
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

_OF_RECIPES = ("demo", "train", "verify-gradients", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake never ends in a traceback."""
    _log_to_stderr()
    # torch's threads spin while they wait, on cores that the loader's workers could use: a third
    # of the throughput on a busy machine. Read when torch is imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _clean_up_when_terminated()
        words, overrides = _split(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(words)
        if overrides and not arguments.takes_overrides:
            raise UsageError(f"--{next(iter(overrides))} is no option here; see unicl --help")
        arguments.run(arguments, overrides)
    except UniclError as error:
        return error.exit_code if error.told else _fail(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", UniclError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unicl", description=unicl.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unicl {unicl.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    training.add_commands(commands)
    using.add_commands(commands)
    for plugin in working_plugins():
        if isinstance(plugin, Skill):
            try:
                plugin.add_commands(commands)
            except Exception as error:  # somebody's code: it must not cost the other commands
                warn_once(f"left out: the commands of plug-in {plugin.name}: {error}")
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part the recipe's keys (`--a.b VALUE`, `--a.b=VALUE`) from a command's own options."""
    # The deepspeed launcher puts an option of its own before the command.
    command = next((word for word in words if not word.startswith("-")), "")
    # Elsewhere such a word may be an option of the command's own.
    top_level = {field.name for field in fields(Recipe)} if command in _OF_RECIPES else set()
    plain, overrides = [], {}
    rest = iter(words)
    for word in rest:
        if word.startswith("--local_rank="):  # what the deepspeed launcher adds; LOCAL_RANK tells
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in key or key in top_level):
            plain.append(word)
            continue
        if not equals:
            following = next(rest, None)
            if following is None:
                raise UsageError(f"--{key} needs a value")
            value = following
        overrides[key] = value
    return plain, overrides


def _clean_up_when_terminated() -> None:
    """Make a job that is cancelled end like one that Ctrl-C ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, through the same door as every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _fail(message: str, code: int) -> int:
    logger.error("unicl: error: %s", " ".join(message.split()))
    return code


def _log_to_stderr() -> None:
    """Write messages as plain lines; looked up at each line, so that a progress bar stays below."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            sys.stderr.write(self.format(record) + "\n")

    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
