"""Sources: where images and texts come from before they are shards (Florence, section 2.1)."""

import csv
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unicl.errors import UniclError, UsageError

IMAGE_COLUMNS = ("image", "image_path", "path", "filepath", "file_name", "filename")
TEXT_COLUMNS = ("caption", "text", "title")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# The bytes that an image file begins with; its name may say otherwise.
_SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"P6": "ppm",
}


@dataclass(frozen=True)
class Entry:
    """An image and its text on their way into a shard."""

    key: str
    """Unique name within the source, fit for a WebDataset key."""
    image: bytes
    """The encoded image, as the source has it."""
    extension: str
    """Of the image's real file type."""
    text: str
    """The description; never empty."""


@dataclass(frozen=True)
class SkippedEntry:
    """Something in a source that cannot become a sample."""

    reason: str
    """What skipped entries are counted by."""
    where: str
    """The file or row, for a person who wants to look."""


@runtime_checkable
class Source(Protocol):
    """Where `prepare` takes its samples from; anything with these members will do."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of its parts; one empty name when it has a single part."""

    @property
    def info(self) -> dict[str, Any]:
        """What `dataset.json` shall say of it."""

    def num_entries(self, split: str) -> int | None:
        """Return the number of entries of a part, if that is known beforehand."""

    def entries(self, split: str) -> Generator[Entry | SkippedEntry, None, None]:
        """Go through a part, always in the same order."""


def open_source(
    spec: str, *, image_column: str | None = None, text_column: str | None = None
) -> Source:
    """Open a source by what a person would type.

    Args:
        spec: `twemoji`, a .csv or .tsv file, or a folder that has one folder of images per class.
            A folder that is itself called twemoji is `./twemoji`.
        image_column: Column of a table with the images' paths; unset takes the first it knows.
        text_column: Column of a table with the texts; unset takes the first it knows.

    Raises:
        UsageError: There is no such source, or it does not look like one.
    """
    if not spec:
        raise UsageError("the source is empty; give a folder, a .csv, a .tsv, or twemoji")
    if spec == "twemoji":
        from unicl.data.twemoji import Twemoji

        return Twemoji()
    path = Path(spec)
    if (image_column is not None or text_column is not None) and path.is_dir():
        raise UsageError(f"columns are named for a .csv or .tsv; {spec} is a folder")
    if path.is_dir():
        return ClassFolder(path)
    if not path.exists():
        raise UsageError(f"source {spec} does not exist; give a folder, a .csv, a .tsv, or twemoji")
    if path.suffix.lower() not in _DELIMITERS:
        hint = "; of tars, give the folder" if ".tar" in path.suffixes else ""
        raise UsageError(f"source {spec} is no folder, .csv or .tsv, and not twemoji{hint}")
    return Table(path, image_column=image_column, text_column=text_column)


class ClassFolder:
    """A folder of folders: `folder/golden_retriever/*.jpg` are images of a "golden retriever".

    The images of all classes are mixed, by a hash of their paths: shards that hold one class each
    could not be shuffled into useful batches.
    """

    splits = ("",)

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        try:
            folders = sorted(path for path in folder.iterdir() if visible_folder(path))
            paths = [
                path.relative_to(folder)
                for class_folder in folders
                for path in sorted(class_folder.rglob("*"))
                if path.is_file() and not path.name.startswith(".")
            ]
        except OSError as error:
            raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
        if not paths:
            raise UsageError(f"{folder} has no images; expected {folder}/CLASS_NAME/IMAGE.jpg")
        self._paths = sorted(paths, key=lambda path: (blake2b(bytes(path)).digest(), path))
        self.info: dict[str, Any] = {
            "source": "class folder",
            "classes": [class_name(path.name) for path in folders],
        }

    def num_entries(self, split: str) -> int:
        """Return the number of files in the class folders."""
        return len(self._paths)

    def entries(self, split: str) -> Generator[Entry | SkippedEntry, None, None]:
        """Go through the files of all classes, mixed."""
        for number, path in enumerate(self._paths):
            text = class_name(path.parts[0])
            yield _entry(number, self._folder / path, text, where=str(path))


class Table:
    """A CSV or TSV file with a header; a column of image paths, relative to the file, one of texts.

    Rows stay in their order.
    """

    splits = ("",)

    def __init__(
        self, path: Path, *, image_column: str | None = None, text_column: str | None = None
    ) -> None:
        self.name = str(path)
        self._path = path
        self.info: dict[str, Any] = {"source": path.name}
        _, columns = next(self._rows(), (0, []))
        if columns is None:
            raise UsageError(f"the header of {path} is malformed; check its quotes")
        if not columns:
            raise UsageError(f"{path} is empty; expected a header and one row per image")
        if not all(_is_utf8(column) and "\0" not in column for column in columns):
            raise UsageError(f"{path} is no table in UTF-8 text; save it as one")
        self._num_columns = len(columns)
        self._image = _find_column(path, columns, image_column, IMAGE_COLUMNS, "image column")
        self._text = _find_column(path, columns, text_column, TEXT_COLUMNS, "text column")
        if self._image == self._text:
            raise UsageError(f"{path}: the column {columns[self._text]} cannot be image and text")

    def num_entries(self, split: str) -> None:
        """Return None: counting the rows would mean reading the file twice."""

    def entries(self, split: str) -> Generator[Entry | SkippedEntry, None, None]:
        """Go through the rows."""
        rows = self._rows()
        next(rows)
        for number, (line, row) in enumerate(rows):
            where = f"line {line}"
            if row is None:
                yield SkippedEntry("malformed row", where)
                continue
            if len(row) <= max(self._image, self._text):
                yield SkippedEntry("row too short", where)
                continue
            if any(row[self._num_columns :]):  # most often a comma in a text without quotes
                yield SkippedEntry("row too long", where)
                continue
            path = self._path.parent / row[self._image]
            yield _entry(number, path, row[self._text], where=f"{where}: {row[self._image]}")

    def _rows(self) -> Iterator[tuple[int, list[str] | None]]:
        """Go through the rows that are not blank, each with its line; None if it is malformed."""
        delimiter = _DELIMITERS[self._path.suffix.lower()]
        # A title of a web page can be longer than the 128 KiB that the csv module allows.
        csv.field_size_limit(1 << 24)
        try:
            # Bytes that are not UTF-8 come through as surrogates; `_entry` counts their rows.
            with open(
                self._path, encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as file:
                # Strict, or a quote that is never closed would swallow all rows after it unseen.
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                while True:
                    line = reader.line_num + 1
                    try:
                        row = next(reader)
                    except StopIteration:
                        return
                    except csv.Error as error:
                        # Of a misplaced quote the row alone is lost, of a missing one the rest.
                        if reader.line_num > line and "expected after" not in str(error):
                            raise UniclError(
                                f"{self._path}: the row from line {line} on does not end: {error}; "
                                "close its quote, and write a quote inside of quotes twice"
                            ) from error
                        yield line, None
                    else:
                        if row:
                            yield line, row
        except OSError as error:
            raise UsageError(f"cannot read {self._path}: {error.strerror}") from error


def _is_utf8(text: str) -> bool:
    """Say whether a text that was read with surrogates for wrong bytes has none of them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_column(
    path: Path, columns: Sequence[str], wanted: str | None, known: Sequence[str], setting: str
) -> int:
    names = [column.strip().lower() for column in columns]
    for name in (wanted.strip().lower(),) if wanted is not None else known:
        if name in names:
            return names.index(name)
    raise UsageError(
        f"{path} has no column {wanted or ' or '.join(known)}; it has {', '.join(columns)}: "
        f"name the {setting}"
    )


def _entry(number: int, path: Path, text: str, *, where: str) -> Entry | SkippedEntry:
    where = where.encode("utf-8", "backslashreplace").decode()
    if not text.strip():
        return SkippedEntry("no text", where)
    if not _is_utf8(text):
        return SkippedEntry("text is not UTF-8", where)
    try:
        image = path.read_bytes()
    except FileNotFoundError:
        return SkippedEntry("missing file", where)
    # A path with a NUL is a ValueError.
    except (OSError, ValueError):
        return SkippedEntry("unreadable file", where)
    extension = image_type(image)
    if extension is None:
        return SkippedEntry("not an image", where)
    return Entry(_key(number, path), image, extension, text)


def image_type(image: bytes) -> str | None:
    """Return the file extension that an image's first bytes call for; None for what is none."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _SIGNATURES.items() if image.startswith(start)), None)


def _key(number: int, path: Path) -> str:
    # The number makes it unique, the rest lets a person find the image again. A tar has room for
    # 100 bytes, and a dot would end the key.
    return f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)[:80]}"


def class_name(folder_name: str) -> str:
    """Return the name of the class whose images lie in a folder of this name."""
    return " ".join(folder_name.replace("_", " ").split())


def visible_folder(path: Path) -> bool:
    """Say whether a path is a folder that a person sees."""
    return path.is_dir() and not path.name.startswith(".")
