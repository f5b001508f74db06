"""Files that appear under their final name complete or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from unicl.errors import UniclError, UsageError

PARTIAL_PREFIX = ".partial-"

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_error(path: Path, error: OSError) -> UniclError:
    """Return the one-line error for a write that the operating system refused."""
    reason = error.strerror or str(error)
    free = "free space or " if error.errno in _FULL else ""
    return UniclError(f"cannot write {path}: {reason}; {free}choose another place")


def partial_path(path: Path) -> Path:
    """Return where a file or folder is prepared that will be renamed to `path`: beside it.

    Raises:
        UsageError: There is no place beside it, for it has no name of its own.
    """
    if path.name in ("", ".."):
        raise UsageError(
            f"cannot write {path}: it is this folder or one above; choose another place"
        )
    return path.with_name(f"{PARTIAL_PREFIX}{path.name}")


def require_parent(path: Path) -> None:
    """Refuse, before there is any work, a file whose folder is not there.

    Raises:
        UsageError: There is no such folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing; rename it to `path` once the block has succeeded.

    The block must read no files: any `OSError` in it counts as a failed write.

    Raises:
        UsageError: The path has no name of its own, such as `.`.
        UniclError: The disk is full, the folder is read-only, ...; nothing is left behind.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise
