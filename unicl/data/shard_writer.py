"""Writing shards: WebDataset tars, the index beside each, the text hash table, `dataset.json`."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from types import TracebackType
from typing import Any, BinaryIO

from unicl.data.atomic import atomic_file, write_error
from unicl.data.hash_table import TextHashTable
from unicl.data.shard_index import (
    DATASET_FILE,
    MEDIA_EXTENSIONS,
    MISSING,
    TEXT_EXTENSION,
    Members,
    Shard,
    ShardIndex,
    index_name,
    scan_tar,
    split_name,
    write_description,
)
from unicl.errors import UniclError, UsageError


class ShardWriter:
    """Write samples into shards; a context manager whose end completes the folder.

    The bytes of the tars depend on the samples alone: no times, no users.

    Args:
        folder: Where the shards go; made if it is missing.
        samples_per_shard: Samples of every shard but the last.
        info: What `dataset.json` shall say besides: where the data came from, credits, class names.

    Raises:
        UsageError: The folder holds shards already.
        UniclError: The disk is full, the folder is read-only, ...
    """

    def __init__(
        self, folder: Path, *, samples_per_shard: int = 10_000, info: dict[str, Any] | None = None
    ) -> None:
        if samples_per_shard < 1:
            raise UsageError(f"samples_per_shard must be positive, got {samples_per_shard}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error
        if any(folder.glob("*.tar")) or (folder / DATASET_FILE).exists():
            raise UsageError(f"{folder} holds shards already; remove it or choose another folder")
        self.folder = folder
        self.table = TextHashTable()
        self._samples_per_shard = samples_per_shard
        self._info = info or {}
        self._shards: list[Shard] = []
        self._members: list[Members] = []
        self._file: AbstractContextManager[BinaryIO] | None = None
        self._stream: BinaryIO | None = None
        self._offset = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish_shard()
            self.table.save(self.folder)
            write_description(self.folder, self._shards, self.table, self._info)
        elif self._file is not None:
            # Removes the unfinished shard; the error itself goes on as it came.
            self._file.__exit__(GeneratorExit, GeneratorExit(), None)

    def write(self, key: str, image: bytes, extension: str, text: str) -> None:
        """Append a sample.

        Args:
            key: Unique name, without a dot after its last slash, where WebDataset ends a key.
            image: The encoded image.
            extension: Of the image's file type, such as jpg.
            text: Stored as it is.

        Raises:
            UsageError: WebDataset could not read a sample of that key or extension.
            UniclError: The disk is full, the folder is read-only, ...
        """
        if extension not in MEDIA_EXTENSIONS:
            known = ", ".join(MEDIA_EXTENSIONS)
            raise UsageError(f"extension {extension!r} of {key!r} is not one of: {known}")
        if not key or split_name(f"{key}.{extension}") != (key, extension) or "\0" in key:
            raise UsageError(f"key {key!r} is empty or has a dot after its last slash; rename it")
        if self._members and self._members[-1].key == key:
            raise UsageError(f"two neighbouring samples are called {key!r}; rename one")
        stored = text.encode()
        # Both headers before the first write: a name that is too long leaves no half sample.
        image_header = _header(f"{key}.{extension}", image)
        text_header = _header(f"{key}.{TEXT_EXTENSION}", stored)
        if self._stream is None:
            self._start_shard()
        image_place = self._append(image_header, image)
        text_place = self._append(text_header, stored)
        self._members.append(Members(key, image_place, text_place))
        self.table.add(text, key)
        if len(self._members) == self._samples_per_shard:
            self._finish_shard()

    def _start_shard(self) -> None:
        self._file = atomic_file(self.folder / f"shard-{len(self._shards):06d}.tar")
        self._stream = self._file.__enter__()
        self._offset = 0

    def _append(self, header: bytes, data: bytes) -> tuple[int, int]:
        place = self._offset + len(header), len(data)
        self._put(header + data + bytes(-len(data) % BLOCKSIZE))
        return place

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        assert self._stream is not None
        try:
            self._stream.write(data)
        except OSError as error:
            file, self._file, self._stream = self._file, None, None
            file.__exit__(type(error), error, error.__traceback__)
        self._offset += len(data)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        # The end of a tar: two empty blocks, then padding up to a whole record.
        end = 2 * BLOCKSIZE
        self._put(bytes(end + -(self._offset + end) % RECORDSIZE))
        file, self._file, self._stream = self._file, None, None
        file.__exit__(None, None, None)
        shard = Shard(f"shard-{len(self._shards):06d}.tar", len(self._members), self._offset)
        ShardIndex.of(self._members).save(self.folder / index_name(shard.name))
        self._shards.append(shard)
        self._members = []


def _header(name: str, data: bytes) -> bytes:
    member = TarInfo(name)
    member.size = len(data)
    try:
        return member.tobuf(USTAR_FORMAT)
    except ValueError as error:
        raise UsageError(f"{name!r} is too long a name for a tar; shorten the key") from error


def index_shards(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Index the WebDataset tars of a folder where they lie, so that `ShardSet` can open it.

    The tars are read once, in the order of their names, and not touched. Of a damaged tar the
    samples before the damage are indexed; its name goes into `truncated` of the info. Samples
    without image or text are indexed as well and counted in `skipped`; a loader leaves them out.

    Args:
        folder: The folder of tars; the index files are written into it.
        progress: Called with the number of tars that are done, and of all.

    Raises:
        UsageError: The folder is missing or has no tars.
        UniclError: No sample has an image and a text, a file is not a tar, a tar cannot be read, or
            the folder is read-only.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UsageError(f"{folder} has no *.tar to index; name the folder of WebDataset tars")
    table = TextHashTable()
    shards, truncated, skipped = [], [], Counter[str]()
    for number, path in enumerate(paths, start=1):
        samples, whole = scan_tar(path)
        if not whole:
            truncated.append(path.name)
        skipped += _add_texts(table, path, samples)
        ShardIndex.of(samples).save(folder / index_name(path.name))
        shards.append(Shard(path.name, len(samples), path.stat().st_size))
        if progress is not None:
            progress(number, len(paths))
    if not table.num_samples:
        what = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "none"
        raise UniclError(
            f"the tars in {folder} hold no sample with an image and a text ({what}); "
            f"the two are files with one name, such as 000.jpg and 000.txt"
        )
    table.save(folder)
    info = {"source": "indexed tars", "truncated": truncated, "skipped": skipped}
    write_description(folder, shards, table, info)


def _add_texts(table: TextHashTable, path: Path, samples: list[Members]) -> Counter[str]:
    """Add the texts that a loader will use to the table; count the samples that it will skip."""
    skipped: Counter[str] = Counter()
    try:
        with open(path, "rb") as file:
            for sample in samples:
                if sample.text == MISSING or sample.image == MISSING:
                    skipped["no text" if sample.text == MISSING else "no image"] += 1
                    continue
                file.seek(sample.text[0])
                try:
                    table.add(file.read(sample.text[1]).decode(), sample.key)
                except UnicodeDecodeError:
                    skipped["text is not UTF-8"] += 1
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror or error}") from error
    return skipped
