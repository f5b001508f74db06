"""The text hash table: texts decide labels (Florence, section 2.2).

Equal texts get equal labels on every machine and in every process, without coordination. A label
is a hash of the text before any prompt template is applied.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unicl.data.atomic import atomic_file
from unicl.errors import UniclError

TEXTS_FILE = "texts.tsv"
COLLISIONS_FILE = "collisions.tsv"
_TEXTS_COLUMNS = ("label", "count", "text")
_COLLISIONS_COLUMNS = ("label", "digest", "text")


def normalise(text: str) -> str:
    """Return the text in Unicode's NFC form with every run of white space as one space.

    Florence merges byte-identical descriptions. These two steps only undo differences that a person
    cannot see; upper and lower case stay apart.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_label(text: str, key: str) -> int:
    """Return the signed 64-bit label of a text; an empty text gets the label of its sample's key.

    Texts that are equal after `normalise` agree. Two different texts can agree by chance (in one
    of 37 sets of 1e9 texts); `TextHashTable` finds and separates those.
    """
    return _label(_digest(_identity(text, key)), bits=64)


def _identity(text: str, key: str) -> str:
    # What the label is a hash of. No normalised text begins with a space, so no key equals a text;
    # the escapes keep every identity on one line of a file.
    return normalise(text) or " " + key.encode("unicode_escape").decode("ascii")


def _is_key(identity: str) -> bool:
    return identity.startswith(" ")


def _digest(identity: str, attempt: int = 0) -> bytes:
    # surrogatepass: a str that came from a file name may hold what UTF-8 forbids.
    data = identity.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=16, salt=attempt.to_bytes(16, "little")).digest()


def _label(digest: bytes, *, bits: int) -> int:
    label = int.from_bytes(digest[:8], "little") & (2**bits - 1)
    return label - 2**bits if label >= 2 ** (bits - 1) else label


@dataclass(slots=True)
class _Entry:
    text: str
    count: int


class TextHashTable:
    """Labels of a data set's texts, with their counts and the collisions that were found.

    Args:
        bits: Width of the labels; less than 64 only makes collisions likely enough to test.
    """

    def __init__(self, *, bits: int = 64) -> None:
        self._bits = bits
        self._folder: Path | None = None
        self._moved: dict[bytes, tuple[int, str]] = {}

    @cached_property
    def _entries(self) -> dict[int, _Entry]:
        # `label` needs only the collisions, so a loaded table reads its texts when somebody asks.
        if self._folder is None:
            return {}
        rows = _read_rows(self._folder / TEXTS_FILE, _TEXTS_COLUMNS, (int, int, str))
        return {label: _Entry(text, count) for label, count, text in rows}

    def add(self, text: str, key: str) -> int:
        """Count a sample's text and return its label.

        Of two different texts with one hash, the one that came first keeps it; the other gets a
        hash of the text and a number, recorded so that `label` finds it again.
        """
        identity = _identity(text, key)
        digest = _digest(identity)
        label = self._label(digest)
        entry = self._entries.get(label)
        if entry is not None and entry.text != identity:
            label, entry = self._free_label(identity), None
            self._moved[digest] = (label, identity)
        if entry is None:
            entry = self._entries[label] = _Entry(identity, 0)
        entry.count += 1
        return label

    def label(self, text: str, key: str) -> int:
        """Return the label of a text, added or not, honouring recorded collisions."""
        return self._label(_digest(_identity(text, key)))

    def _label(self, digest: bytes) -> int:
        moved = self._moved.get(digest)
        return _label(digest, bits=self._bits) if moved is None else moved[0]

    def _free_label(self, identity: str) -> int:
        if len(self._entries) >= 2**self._bits:
            raise UniclError(
                f"more than {2**self._bits} texts do not fit labels of {self._bits} bits"
            )
        attempt = 1
        while (label := _label(_digest(identity, attempt), bits=self._bits)) in self._entries:
            attempt += 1
        return label

    def count(self, text: str) -> int:
        """Return the number of samples with this text."""
        if not normalise(text):
            return self.num_empty
        entry = self._entries.get(self.label(text, ""))
        return entry.count if entry is not None and entry.text == normalise(text) else 0

    @property
    def texts(self) -> tuple[str, ...]:
        """Unique texts, normalised, by falling count; of equal counts, the first added first."""
        return tuple(entry.text for entry in self._by_count() if not _is_key(entry.text))

    @property
    def num_samples(self) -> int:
        """Number of samples added, those with an empty text included."""
        return sum(entry.count for entry in self._entries.values())

    @property
    def num_texts(self) -> int:
        """Number of unique texts, the empty one not among them."""
        return sum(not _is_key(entry.text) for entry in self._entries.values())

    @property
    def num_empty(self) -> int:
        """Number of samples whose text is empty."""
        return sum(entry.count for entry in self._entries.values() if _is_key(entry.text))

    @property
    def num_shared(self) -> int:
        """Number of samples whose text at least one other sample has too."""
        entries = self._entries.values()
        return sum(entry.count for entry in entries if entry.count > 1 and not _is_key(entry.text))

    @property
    def collisions(self) -> dict[str, int]:
        """Label of each text that did not get its own hash, because another text has it."""
        return {text: label for label, text in self._moved.values()}

    def summary(self) -> dict[str, int]:
        """Return the counts that a person wants to see first."""
        return {
            "num_texts": self.num_texts,
            "num_shared": self.num_shared,
            "num_empty": self.num_empty,
            "num_collisions": len(self._moved),
        }

    def save(self, folder: Path) -> None:
        """Write `texts.tsv` and `collisions.tsv`, two tables of plain UTF-8 text, into a folder.

        A text that begins with a space stands for an empty one and is the key of its sample.

        Raises:
            UniclError: A file cannot be written.
        """
        texts = (
            (self._label(_digest(entry.text)), entry.count, entry.text)
            for entry in self._by_count()
        )
        moved = ((label, digest.hex(), text) for digest, (label, text) in self._moved.items())
        _write_rows(folder / TEXTS_FILE, _TEXTS_COLUMNS, texts)
        _write_rows(folder / COLLISIONS_FILE, _COLLISIONS_COLUMNS, moved)

    @classmethod
    def load(cls, folder: Path, *, bits: int = 64) -> "TextHashTable":
        """Read the table that `save` wrote; its texts are read when they are first needed.

        Raises:
            UniclError: A file is missing or damaged.
        """
        table = cls(bits=bits)
        if not (folder / TEXTS_FILE).is_file():
            raise UniclError(f"{folder / TEXTS_FILE} is missing; prepare the data set again")
        kinds = (int, bytes.fromhex, str)
        for label, digest, text in _read_rows(folder / COLLISIONS_FILE, _COLLISIONS_COLUMNS, kinds):
            table._moved[digest] = (label, text)
        table._folder = folder
        return table

    def _by_count(self) -> list[_Entry]:
        return sorted(self._entries.values(), key=lambda entry: -entry.count)


def _write_rows(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with atomic_file(path) as file:
        for row in (columns, *rows):
            file.write(("\t".join(map(str, row)) + "\n").encode("utf-8", "surrogatepass"))


def _read_rows(
    path: Path, columns: tuple[str, ...], kinds: tuple[Callable[[str], Any], ...]
) -> Iterator[list[Any]]:
    number = 0
    try:
        with open(path, "rb") as file:
            # A binary file splits at line feeds only; text has further line separators.
            for number, line in enumerate(file, start=1):
                row = line.decode("utf-8", "surrogatepass").removesuffix("\n").split("\t")
                # A file that was cut short lacks the last line feed.
                if len(row) != len(columns) or not line.endswith(b"\n"):
                    raise ValueError("not a whole row")
                if number == 1 and tuple(row) != columns:
                    raise ValueError("another header")
                if number > 1:
                    yield [kind(cell) for kind, cell in zip(kinds, row, strict=True)]
        if number == 0:
            raise ValueError("no header")
    except OSError as error:
        raise UniclError(
            f"cannot read {path}: {error.strerror}; prepare the data set again"
        ) from error
    except ValueError as error:
        raise UniclError(f"{path}, line {number} is damaged; prepare the data set again") from error
