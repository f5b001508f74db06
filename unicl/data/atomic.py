"""Files that appear under their final name complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from unicl.errors import UniclError

PARTIAL_PREFIX = ".partial-"


def write_error(path: Path, error: OSError) -> UniclError:
    """Return the one-line error for a write that the operating system refused."""
    reason = error.strerror or str(error)
    return UniclError(f"cannot write {path}: {reason}; free space or choose another folder")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing; rename it to `path` once the block has succeeded.

    The block must read no files: any `OSError` in it counts as a failed write.

    Raises:
        UniclError: The disk is full, the folder is read-only, ...; nothing is left behind.
    """
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
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
