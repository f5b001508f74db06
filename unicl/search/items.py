"""What each row of an index is; on disk one line of JSON per row, read one at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from shutil import copyfile
from types import TracebackType

import numpy as np
from jaxtyping import Int64

from unicl.data.atomic import write_error
from unicl.search.folder import DamagedIndexError, Output

LINES_FILE = "items.jsonl"
ENDS_FILE = "items.npy"


@dataclass(frozen=True)
class Item:
    """What one row of an index is."""

    key: str
    """Its name, which no other row of the index has."""
    where: str
    """Where the image lies, in words of whoever made the index: a path, or a shard and a number."""
    text: str
    """Its text; may be empty."""


Block = tuple[np.ndarray, Sequence[Item]]
"""Unit-length embeddings, float32 [n, dim], and the item of each row."""


class Items:
    """The items of an index, memory-mapped: a million of them are no million Python objects."""

    def __init__(self, lines: mmap, ends: Int64[np.ndarray, " num_items"]) -> None:
        self._lines = lines
        self._ends = ends

    @classmethod
    def open(cls, folder: Path) -> "Items":
        """Map the items that an `ItemWriter` left in a folder.

        Raises:
            FileNotFoundError: They are not there.
            DamagedIndexError: They are damaged.
        """
        try:
            ends = np.load(folder / ENDS_FILE, mmap_mode="r", allow_pickle=False)
            with open(folder / LINES_FILE, "rb") as file:
                lines = mmap(file.fileno(), 0, access=ACCESS_READ)
            if ends.dtype != np.int64 or ends.ndim != 1 or ends[-1] != len(lines):
                raise ValueError("the two files do not belong together")
        except (ValueError, EOFError, IndexError) as error:
            raise DamagedIndexError(
                f"the items in {folder} are damaged; build the index again"
            ) from error
        return cls(lines, ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Item:
        if not 0 <= row < len(self):
            raise IndexError(f"item {row} of {len(self)}")
        start = int(self._ends[row - 1]) if row else 0
        try:
            return Item(*json.loads(self._lines[start : int(self._ends[row])]))
        except (ValueError, TypeError) as error:
            raise DamagedIndexError(f"item {row} is damaged; build the index again") from error

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))


class ItemWriter:
    """Writes the items of an index into a folder, behind those of a former one if there is any.

    Args:
        folder: Where the two files go.
        former: The folder of the index that is continued.

    Raises:
        UniclError: The disk is full, ...; from every method.
    """

    def __init__(self, folder: Path, former: Path | None = None) -> None:
        self._folder = folder
        self._ends = [] if former is None else [np.load(former / ENDS_FILE, allow_pickle=False)]
        lines = folder / LINES_FILE
        try:
            if former is not None:
                copyfile(former / LINES_FILE, lines)
        except OSError as error:
            raise write_error(lines, error) from error
        self._output = Output(lines)

    def write(self, items: Sequence[Item]) -> None:
        """Append items."""
        # ASCII, so that any path fits: a file name may hold bytes that are no UTF-8.
        lines = [json.dumps(astuple(item)).encode() + b"\n" for item in items]
        start = int(self._ends[-1][-1]) if self._ends else 0
        self._ends.append(start + np.cumsum([len(line) for line in lines], dtype=np.int64))
        self._output.write(b"".join(lines))

    def __enter__(self) -> "ItemWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; they are complete unless an error ended the block."""
        self._output.__exit__(kind, error, trace)
        if kind is None and self._ends:
            with Output(self._folder / ENDS_FILE) as output:
                np.save(output, np.concatenate(self._ends), allow_pickle=False)
