"""Folders that appear under their final name complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from unicl.data.atomic import partial_path, write_error
from unicl.errors import UniclError, UsageError


def require_new(folder: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        UsageError: It is no empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; remove it, or choose another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Open a folder beside `folder` to write into; rename it once the block has succeeded.

    Raises:
        UsageError: There is something in `folder` already, or it has no name of its own.
        UniclError: The disk is full, the place is read-only, ...; nothing is left behind.
    """
    require_new(folder)
    partial = partial_path(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(folder, error) from error
        if isinstance(error, SafetensorError):
            raise UniclError(f"cannot write {folder}: {error}; choose another folder") from error
        raise
