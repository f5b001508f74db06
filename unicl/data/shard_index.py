"""What lies beside the tars: an index per shard, and `dataset.json` for all of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from tarfile import BLOCKSIZE, ReadError, TarError, TarInfo
from tarfile import open as open_tar
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int64, UInt8

from unicl.data.atomic import atomic_file
from unicl.data.hash_table import TextHashTable
from unicl.errors import UniclError, UsageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
VIDEO_EXTENSIONS = (
    "mp4",
    "mkv",
    "webm",
    "avi",
    "mov",
    "m4v",
    "mpg",
    "mpeg",
    "flv",
    "wmv",
    "3gp",
    "ogv",
    "ts",
)
# Of a sample with several, the first counts: of a clip with a picture beside it, the picture.
MEDIA_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
TEXT_EXTENSION = "txt"
MISSING = (0, -1)
DATASET_FILE = "dataset.json"
_VERSION = 1
_ARRAYS = ("keys", "key_ends", "images", "texts")


class SampleError(UniclError):
    """A sample that cannot be read, with the reason under which skipped samples are counted."""

    def __init__(self, reason: str, message: str = "") -> None:
        # Both go into `args`, from which an exception is built again on its way out of a worker.
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1] or self.reason


@dataclass(frozen=True)
class Members:
    """One sample inside a tar."""

    key: str
    """Name of the sample: what its members are called before the first dot."""
    image: tuple[int, int]
    """Offset and size in bytes of the image or video, or `MISSING`."""
    text: tuple[int, int]
    """Offset and size in bytes, or `MISSING`."""


@dataclass(frozen=True)
class ShardIndex:
    """The members of all samples of a tar, as a few arrays."""

    keys: UInt8[np.ndarray, " bytes"]
    """All keys in UTF-8, one after the other."""
    key_ends: Int64[np.ndarray, " samples"]
    """End of each sample's key within `keys`."""
    images: Int64[np.ndarray, "samples 2"]
    """Offset and size of each image or video."""
    texts: Int64[np.ndarray, "samples 2"]
    """Offset and size of each text."""

    @classmethod
    def of(cls, samples: list[Members]) -> "ShardIndex":
        """Build the index of these samples."""
        keys = [sample.key.encode("utf-8", "surrogatepass") for sample in samples]
        return cls(
            keys=np.frombuffer(b"".join(keys), np.uint8),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            images=np.array([sample.image for sample in samples], np.int64).reshape(-1, 2),
            texts=np.array([sample.text for sample in samples], np.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.key_ends)

    def __getitem__(self, row: int) -> Members:
        start = self.key_ends[row - 1] if row else 0
        key = self.keys[start : self.key_ends[row]].tobytes().decode("utf-8", "surrogatepass")
        image_start, image_size = self.images[row].tolist()
        text_start, text_size = self.texts[row].tolist()
        return Members(key, (image_start, image_size), (text_start, text_size))

    def save(self, path: Path) -> None:
        """Write the index as a NumPy archive without pickled objects."""
        with atomic_file(path) as file:
            np.savez(file, allow_pickle=False, **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: Path, *, num_samples: int) -> "ShardIndex":
        """Read an index and compare it with the number of samples that it must describe.

        Raises:
            SampleError: The index is missing, damaged or another tar's.
        """
        way_out = "prepare or index its folder again"
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in _ARRAYS}
        except FileNotFoundError as error:
            raise SampleError("missing index", f"{path} is missing; {way_out}") from error
        # What NumPy raises on damaged files is not one family.
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise SampleError("damaged index", f"{path} is damaged; {way_out}") from error
        shapes = [arrays[name].shape for name in _ARRAYS[1:]]
        if shapes != [(num_samples,), (num_samples, 2), (num_samples, 2)]:
            raise SampleError("damaged index", f"{path} is not its tar's; {way_out}")
        return cls(**arrays)


@dataclass(frozen=True)
class Shard:
    """What `dataset.json` says of one shard."""

    name: str
    """File name of the tar."""
    num_samples: int
    """Samples in it."""
    num_bytes: int
    """Size of the tar."""


def index_name(tar_name: str) -> str:
    """Return the name of the index that belongs to a tar."""
    return f"{tar_name.removesuffix('.tar')}.index"


def write_description(
    folder: Path, shards: list[Shard], table: TextHashTable, info: dict[str, Any]
) -> None:
    """Write `dataset.json`, which makes a folder of shards complete."""
    description = {
        "version": _VERSION,
        "num_samples": sum(shard.num_samples for shard in shards),
        "texts": table.summary(),
        "info": info,
        "shards": [asdict(shard) for shard in shards],
    }
    with atomic_file(folder / DATASET_FILE) as file:
        file.write(json.dumps(description, indent=1, ensure_ascii=False).encode())


def read_description(folder: Path) -> tuple[list[Shard], dict[str, Any]]:
    """Read the shards and the info from `dataset.json`.

    Raises:
        UsageError: The folder has none.
        UniclError: It is damaged, of another version, or lists no samples.
    """
    path = folder / DATASET_FILE
    try:
        description = json.loads(path.read_bytes())
        if description["version"] != _VERSION:
            raise UniclError(f"{path} is of another version of unicl; prepare the data set again")
        shards = [Shard(**shard) for shard in description["shards"]]
        info = dict(description["info"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(_no_description(folder)) from error
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UniclError(f"{path} is damaged; prepare the data set again") from error
    if not any(shard.num_samples for shard in shards):
        raise UniclError(f"{folder} holds no samples; prepare the data set again")
    return shards, info


def _no_description(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder; make it with: unicl prepare SOURCE --out {folder}"
    inner = sorted(str(path.parent) for path in folder.glob(f"*/{DATASET_FILE}"))
    if inner:
        return f"{folder} has no {DATASET_FILE}; did you mean {' or '.join(inner)}?"
    return (
        f"{folder} has no {DATASET_FILE}; make such a folder with: unicl prepare SOURCE --out DIR "
        f"(or, if tars lie there: unicl prepare {folder})"
    )


def scan_tar(path: Path) -> tuple[list[Members], bool]:
    """List the samples of a WebDataset tar; the second value says whether that is the whole tar.

    Raises:
        UniclError: The file cannot be read, or is not an uncompressed tar.
    """
    samples: list[Members] = []
    for sample in tar_samples(path):
        if sample is None:
            return samples, False
        key, found = sample
        image = next((found[name] for name in MEDIA_EXTENSIONS if name in found), MISSING)
        samples.append(Members(key, image, found.get(TEXT_EXTENSION, MISSING)))
    return samples, True


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]] | None]:
    """Go through a WebDataset tar: each sample's key, and offset and size by extension.

    As WebDataset does, neighbouring members with one key form a sample. None comes last if the tar
    was cut short.

    Raises:
        UniclError: The file cannot be read, or is not an uncompressed tar.
    """
    files = _tar_files(path)
    for key, members in groupby(
        files, key=lambda member: "" if member is None else _key(member.name)
    ):
        found = {
            _extension(member.name): (member.offset_data, member.size)
            for member in members
            if member is not None
        }
        yield (key, found) if found else None


def _tar_files(path: Path) -> Iterator[TarInfo | None]:
    # None at the end of a tar that was cut short.
    try:
        with open_tar(path, "r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    # tarfile would keep every member; a shard may have millions.
                    tar.members.clear()  # type: ignore[attr-defined]
                    if member.isfile() and _key(member.name):
                        yield member
            except ReadError:
                yield None
            else:
                # tarfile takes a damaged header for the end; a true end is a block of zeros.
                with open(path, "rb") as file:
                    file.seek(tar.offset)
                    if file.read(BLOCKSIZE).strip(b"\0"):
                        yield None
    except TarError as error:
        message = f"{path} is not an uncompressed tar; unpack or remove it"
        raise UniclError(message) from error
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror or error}") from error


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension, at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), extension.lower()


def _key(name: str) -> str:
    return split_name(name)[0]


def _extension(name: str) -> str:
    return split_name(name)[1]
