"""The folder of an index: `index.json`, and beside it the data that it names.

Every change writes its data into a new sub-folder and then replaces `index.json`, which names that
sub-folder: whatever is cut short before leaves the former index whole, and whoever has the former
one open keeps it.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import Literal, get_args

from unicl.data.atomic import PARTIAL_PREFIX, atomic_file, write_error
from unicl.errors import UniclError, UsageError

Kind = Literal["exact", "approximate"]

DESCRIPTION_FILE = "index.json"
FAISS_FILE = "index.faiss"
_LOCK_FILE = "index.lock"
_DATA = re.compile(r"data-(\d+)")
_VERSION = 1


class DamagedIndexError(UniclError):
    """An index that nothing can be found in any more: it has to be built again."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was measured on an index after its last change."""

    milliseconds: float
    """Median time of a search for one query, on the machine and with the threads of that time."""
    recall: float = 1.0
    """Share of the ten nearest items that a search for the ten nearest finds, in 0..1."""
    text_recall: float | None = None
    """The same for the texts that were given to measure it on; `recall` is that of images then."""
    wanted_recall: float | None = None
    """What the recall was to reach; unset for an exact index, which misses nothing."""
    num_lists: int | None = None
    """Lists that the items were divided into; unset for an exact index."""
    num_probed: int | None = None
    """Lists that a search looks through (FAISS calls it nprobe)."""
    num_learned_from: int | None = None
    """Items there were when the lists were laid out; far fewer than now, and it is time to build
    the index again."""

    @property
    def reached(self) -> bool:
        """Whether each recall is what was wanted."""
        recalls = [self.recall] if self.text_recall is None else [self.recall, self.text_recall]
        return self.wanted_recall is None or min(recalls) >= self.wanted_recall

    def summary(self) -> str:
        """One line for a person."""
        if self.wanted_recall is None:
            return f"exact, {self.milliseconds:.2g} ms per query"
        texts = "" if self.text_recall is None else f" ({self.text_recall:.3f} for texts)"
        line = (
            f"approximate, recall@10 {self.recall:.3f}{texts}, {self.milliseconds:.2g} ms per "
            f"query, {self.num_probed:,} of {self.num_lists:,} lists looked through"
        )
        if self.reached:
            return line
        return f"{line}; no number of lists reaches the wanted {self.wanted_recall:g}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `index.json` says."""

    model: str
    """Name of the model that made the embeddings."""
    fingerprint: str
    """Its fingerprint: two models with equal ones make equal embeddings."""
    dim: int
    """Width of the embeddings."""
    num_items: int
    """Rows of the index."""
    kind: Kind
    """What it is."""
    wanted_kind: str
    """What was asked for: one of these or "auto"."""
    wanted_recall: float
    """Recall that an approximate index is to reach."""
    facts: Facts
    """What was measured."""
    data: str = ""
    """Name of the sub-folder with the data."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes of each file in it."""


def read_description(folder: Path) -> Description:
    """Read `index.json`.

    Raises:
        UsageError: The folder holds no index.
        DamagedIndexError: It is damaged, or of another version.
        UniclError: It cannot be read now.
    """
    path = folder / DESCRIPTION_FILE
    try:
        entries = json.loads(path.read_bytes())
        if entries.pop("version") != _VERSION:
            raise DamagedIndexError(f"{path} is of another version of unicl; build the index again")
        description = Description(**{**entries, "facts": Facts(**entries["facts"])})
        numbers = (description.dim, description.num_items, *description.sizes.values())
        if (
            not _DATA.fullmatch(description.data)
            or FAISS_FILE not in description.sizes
            or description.kind not in get_args(Kind)
            or not all(isinstance(number, int) for number in numbers)
        ):
            raise ValueError("it says what no index can be")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder} holds no index ({DESCRIPTION_FILE} is not there); make one with: unicl index"
        ) from error
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedIndexError(f"{path} is damaged; build the index again") from error
    return description


def require_files(folder: Path, description: Description) -> None:
    """See that the files that `index.json` names can be read and are whole.

    Raises:
        DamagedIndexError: One is missing, or has another size.
        UniclError: One cannot be read now.
    """
    for name, size in description.sizes.items():
        path = folder / description.data / name
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedIndexError(f"{path} is missing; build the index again") from error
        except OSError as error:
            raise UniclError(f"cannot read {path}: {error.strerror}") from error
        if found != size:
            raise DamagedIndexError(
                f"{path} has {found:,} bytes, not {size:,}; build the index again"
            )


class Draft:
    """A change of an index that nobody sees yet.

    Args:
        folder: The folder of the index.
        path: The new sub-folder for its data.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder = folder
        self.path = path

    def commit(self, description: Description) -> None:
        """Make the change the index."""
        paths = sorted(self.path.iterdir())
        sizes = {path.name: path.stat().st_size for path in paths}
        entries = asdict(replace(description, data=self.path.name, sizes=sizes))
        for path in (*paths, self.path):
            _sync(path)
        with atomic_file(self._folder / DESCRIPTION_FILE) as file:
            file.write(json.dumps({"version": _VERSION, **entries}, indent=1).encode())
        _sync(self._folder)


@contextmanager
def drafting(folder: Path) -> Iterator[Draft]:
    """Prepare a change of the index in a folder, which may not be there yet.

    Without a commit nothing changes. Nobody else can prepare one meanwhile.

    Raises:
        UsageError: The folder holds other files, and no index.
        UniclError: It cannot be written, or another process is changing the index.
    """
    lock = _locked(folder)
    try:
        path = folder / f"data-{1 + max(_numbers(folder), default=0)}"
        try:
            path.mkdir()
        except OSError as error:
            raise write_error(path, error) from error
        try:
            yield Draft(folder, path)
        finally:
            _sweep(folder, path)
    finally:
        os.close(lock)


def _locked(folder: Path) -> int:
    """Make the folder and lock it; a process that is killed gives the lock back, too."""
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_own(folder)
        lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UniclError(
                f"another process is changing the index {folder}; wait until it is done"
            ) from error
        raise write_error(folder, error) from error
    return lock


def _require_own(folder: Path) -> None:
    """Refuse to scatter an index among files that are none."""
    names = {entry.name for entry in folder.iterdir()}
    if DESCRIPTION_FILE in names:
        return
    own = {_LOCK_FILE} | {name for name in names if name.startswith(PARTIAL_PREFIX)}
    if _LOCK_FILE in names:  # others call folders data-1, too, and what is own may be removed
        own |= {name for name in names if _DATA.fullmatch(name)}
    others = sorted(names - own)
    if others:
        raise UsageError(
            f"{folder} is no index and not empty (there is {others[0]}); choose another folder"
        )


def _numbers(folder: Path) -> list[int]:
    matches = (_DATA.fullmatch(entry.name) for entry in folder.iterdir())
    return [int(match[1]) for match in matches if match]


def _sweep(folder: Path, draft: Path) -> None:
    """Remove the data that `index.json` does not name: former ones and what was cut short."""
    unnamed = {folder / f"data-{number}" for number in _numbers(folder)}
    try:
        unnamed.discard(folder / read_description(folder).data)
    except UsageError:
        pass  # there is no index, so nothing is named
    except UniclError:
        unnamed = {draft}  # whoever can read it may still want the rest
    for path in unnamed:
        rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Output:
    """A file of a draft; what the operating system refuses is a one-line error.

    Args:
        path: Where it goes.

    Raises:
        UniclError: The disk is full, ...; from every method.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, and return how many that were."""
        try:
            return self._file.write(data)
        except OSError as error:
            raise write_error(self._path, error) from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as failed:
            if kind is None:
                raise write_error(self._path, failed) from failed
