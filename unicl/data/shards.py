"""Shards: WebDataset tars with an index beside each, so that any sample can be reached.

A folder of shards holds `shard-000000.tar`, `shard-000000.index`, ..., the text hash table and
`dataset.json`, which is written last: a folder that has it is complete.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from unicl.data.hash_table import TextHashTable
from unicl.data.shard_index import (
    MISSING,
    Members,
    SampleError,
    Shard,
    ShardIndex,
    index_name,
    read_description,
)
from unicl.data.shard_writer import ShardWriter, index_shards
from unicl.errors import UniclError

__all__ = ["RawSample", "SampleError", "ShardSet", "ShardWriter", "index_shards"]

# A shuffle window has 16 shards by default; the index of 10,000 samples takes half a megabyte.
_OPEN_SHARDS = 64
# Members of one sample that lie this close are read at once.
_GAP = 1 << 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard."""

    key: str
    """Name of the sample inside its shard."""
    image: bytes
    """The encoded image or video; empty when the sample has none."""
    text: bytes | None
    """The text as it was stored, hopefully UTF-8; None when the sample has none."""


class ShardSet:
    """Random access to the samples of a folder of shards.

    Opening reads one small file, however many shards there are; indices and tars are opened when
    they are needed. It can be pickled; each process opens its own files.
    """

    def __init__(self, folder: Path, shards: list[Shard], info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self.shard_names = tuple(shard.name for shard in shards)
        self.shard_sizes: Int64[np.ndarray, " shards"] = np.array(
            [shard.num_samples for shard in shards], np.int64
        )
        self.num_samples = int(self.shard_sizes.sum())
        self._num_bytes = [shard.num_bytes for shard in shards]
        self._ends = np.cumsum(self.shard_sizes)
        self._indices: _Recent[ShardIndex] = _Recent(self._load_index)
        self._tars: _Recent[_Tar] = _Recent(self._open_tar)

    @classmethod
    def open(cls, folder: Path, *, strict: bool = False) -> "ShardSet":
        """Open a folder that `ShardWriter` or `index_shards` has completed.

        Args:
            folder: The folder with `dataset.json`.
            strict: Refuse the set if any tar is truncated or any index damaged; otherwise only the
                samples that are lost fail, when they are read.

        Raises:
            UsageError: It is not a folder of shards.
            UniclError: `dataset.json` is damaged or a tar is missing.
        """
        shards, info = read_description(folder)
        present = set(os.listdir(folder))
        missing = [shard.name for shard in shards if shard.name not in present]
        if missing:
            raise UniclError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(shards)} tars are missing); "
                "copy them there or prepare the data set again"
            )
        shard_set = cls(folder, shards, info)
        if strict and (problems := shard_set.problems()):
            raise UniclError(f"{problems[0]} ({len(problems)} of {len(shards)} shards are damaged)")
        return shard_set

    def digest(self) -> str:
        """Return a digest of the tars' names, sizes and numbers of samples as written."""
        shards = zip(self.shard_names, self._num_bytes, self.shard_sizes.tolist(), strict=True)
        return blake2b(repr(list(shards)).encode(), digest_size=16).hexdigest()

    @property
    def first_tar(self) -> Path:
        """Path of the first tar."""
        return self.folder / self.shard_names[0]

    def problems(self, *, indices: bool = True) -> list[str]:
        """Return one line per damaged shard.

        Args:
            indices: Read every index too; otherwise only the sizes of the tars are looked at.
        """
        found = []
        for shard in range(len(self.shard_names)):
            try:
                self._open_tar(shard).check_size(self._num_bytes[shard])
                if indices:
                    self._load_index(shard)
            except SampleError as error:
                found.append(str(error))
        return found

    def table(self) -> TextHashTable:
        """Return the text hash table of the set."""
        return self._table

    @cached_property
    def _table(self) -> TextHashTable:
        return TextHashTable.load(self.folder)

    def label(self, index: int, text: str, key: str) -> int:
        """Return the label of a sample, which its text decides."""
        return self._table.label(text, key)

    def locate(self, index: int) -> tuple[str, int]:
        """Return the name of the tar that holds a sample, and the sample's place in it."""
        shard, row = self._place(index)
        return self.shard_names[shard], row

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.shard_sizes[shard])

    def read(self, index: int) -> RawSample:
        """Return the sample with this number; shards count one after the other.

        Raises:
            SampleError: The tar is truncated or gone, or its index is damaged.
        """
        shard, row = self._place(index)
        members = self._indices[shard][row]
        image, text = self._tars[shard].read(members)
        return RawSample(members.key, image or b"", text)

    def read_text(self, index: int) -> bytes | None:
        """Return a sample's text as `read` does, without reading its image.

        Raises:
            SampleError: The tar is truncated or gone, or its index is damaged.
        """
        shard, row = self._place(index)
        return self._tars[shard].text(self._indices[shard][row])

    def _load_index(self, shard: int) -> ShardIndex:
        path = self.folder / index_name(self.shard_names[shard])
        return ShardIndex.load(path, num_samples=int(self.shard_sizes[shard]))

    def _open_tar(self, shard: int) -> "_Tar":
        return _Tar(self.folder / self.shard_names[shard])

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind; the other process opens its own.
        return {**self.__dict__, "_indices": None, "_tars": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indices = _Recent(self._load_index)
        self._tars = _Recent(self._open_tar)


class _Tar:
    """A tar open for reading at any offset; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            self._descriptor = None
            message = f"cannot read {path}: {error.strerror}; copy or prepare it again"
            raise SampleError("unreadable tar", message) from error

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, members: Members) -> tuple[bytes | None, bytes | None]:
        """Return the image and the text of a sample, None for what it lacks."""
        (image_start, image_size), (text_start, text_size) = members.image, members.text
        if members.image == MISSING or members.text == MISSING:
            return self._member(members.key, *members.image), self._member(
                members.key, *members.text
            )
        start = min(image_start, text_start)
        end = max(image_start + image_size, text_start + text_size)
        if end - start > image_size + text_size + _GAP:
            return self._member(members.key, *members.image), self._member(
                members.key, *members.text
            )
        both = self._bytes(members.key, start, end - start)
        image_start, text_start = image_start - start, text_start - start
        return (
            both[image_start : image_start + image_size],
            both[text_start : text_start + text_size],
        )

    def text(self, members: Members) -> bytes | None:
        """Return the text of a sample, None if it has none."""
        return self._member(members.key, *members.text)

    def _member(self, key: str, start: int, size: int) -> bytes | None:
        return None if (start, size) == MISSING else self._bytes(key, start, size)

    def _bytes(self, key: str, start: int, size: int) -> bytes:
        assert self._descriptor is not None
        try:
            data = os.pread(self._descriptor, size, start)
        except OSError as error:
            raise SampleError(
                "unreadable tar", f"cannot read {self.path}: {error.strerror}"
            ) from error
        if len(data) < size:
            message = f"{self.path} ends before sample {key!r} does; copy or prepare it again"
            raise SampleError("truncated tar", message)
        return data

    def check_size(self, num_bytes: int) -> None:
        """Raise `SampleError` unless the tar has the size that was recorded when it was written."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        if size != num_bytes:
            message = f"{self.path} has {size} bytes, not {num_bytes}; copy or prepare it again"
            raise SampleError("truncated tar" if size < num_bytes else "changed tar", message)


class _Recent(Generic[Value]):
    """The most recently used of many objects, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], Value]) -> None:
        self._make = make
        self._values: OrderedDict[int, Value] = OrderedDict()

    def __getitem__(self, number: int) -> Value:
        value = self._values.get(number)
        if value is None:
            value = self._values[number] = self._make(number)
            while len(self._values) > _OPEN_SHARDS:
                self._values.popitem(last=False)
        else:
            self._values.move_to_end(number)
        return value
