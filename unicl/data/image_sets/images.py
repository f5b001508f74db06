"""Where the images of a set lie: in files, in an array of pixels, in tars.

All three give encoded bytes, so that one decoder reads whatever a set has.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from unicl.data.shards import RawSample, SampleError, ShardSet
from unicl.errors import UniclError


@runtime_checkable
class Images(Protocol):
    """Random access to encoded images; can be pickled, and a fork copies nothing large."""

    @property
    def num_samples(self) -> int:
        """Number of images."""

    def digest(self) -> str:
        """Return hexadecimal digits that change when the images or their order may have changed.

        Raises:
            UniclError: Images are missing.
        """

    def read(self, index: int) -> RawSample:
        """Return an image as `shards.RawSample` with an empty text.

        Raises:
            SampleError: It is out of reach.
        """

    def locate(self, index: int) -> tuple[str, int]:
        """Return where an image lies, and its place there."""


class ImageFiles:
    """One file per image.

    Args:
        folder: What the names are relative to; not part of the digest.
        names: Paths of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        # A million strings would be copied by every worker that merely counts references to them.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    @property
    def num_samples(self) -> int:
        """Number of files."""
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """Paths of the files below the folder."""
        return [os.fsdecode(name) for name in self._names]

    def digest(self) -> str:
        """Return a digest of the folder, and of the files' names, sizes and times, in order.

        Raises:
            UniclError: Files are missing.
        """
        # Names, sizes and times may be the same in two parts of one set, or in two sets.
        digest = blake2b(os.fsencode(os.path.abspath(self.folder)), digest_size=16)
        missing = []
        for name in self._names:
            try:
                status = os.stat(os.path.join(os.fsencode(self.folder), name))
            except OSError:
                missing.append(name)
                continue
            digest.update(b"%s\0%d %d\0" % (name, status.st_size, status.st_mtime_ns))
        if missing:
            raise UniclError(
                f"{len(missing)} of {self.num_samples} images are missing in {self.folder}, such "
                f"as {_text(missing[0])}; unpack or download the data set again"
            )
        return digest.hexdigest()

    def read(self, index: int) -> RawSample:
        """Return the bytes of a file; its key is its path below the folder."""
        key = self.locate(index)[0]
        path = os.path.join(os.fsencode(self.folder), self._names[index])
        try:
            with open(path, "rb") as file:
                return RawSample(key, file.read(), b"")
        except FileNotFoundError as error:
            raise SampleError("missing file", f"{key} is not in {self.folder}") from error
        except OSError as error:
            message = f"cannot read {key} in {self.folder}: {error.strerror}"
            raise SampleError("unreadable file", message) from error

    def locate(self, index: int) -> tuple[str, int]:
        """Return the path below the folder, and the index."""
        return _text(self._names[_checked(index, self.num_samples)]), index


class PixelArray:
    """Images as one array.

    Args:
        pixels: Grey or RGB values.
        where: What messages call the array.
    """

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "num_images height width"]
        | UInt8[np.ndarray, "num_images height width 3"],
        where: str,
    ) -> None:
        self.pixels = pixels
        self.where = where

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def digest(self) -> str:
        """Return a digest of all pixels."""
        digest = blake2b(repr(self.pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def read(self, index: int) -> RawSample:
        """Return an image as a BMP, which loses nothing and costs next to nothing."""
        pixels = self.pixels[_checked(index, self.num_samples)]
        file = BytesIO()
        Image.fromarray(pixels).save(file, "BMP")
        return RawSample(f"{index:06d}", file.getvalue(), b"")

    def locate(self, index: int) -> tuple[str, int]:
        """Return the name of the array, and the index."""
        return self.where, _checked(index, self.num_samples)


@dataclass(frozen=True)
class TarImages:
    """Some samples of a set of tars."""

    shards: ShardSet
    """All samples."""
    rows: Int64[np.ndarray, " num_images"]
    """Which of them."""

    @property
    def num_samples(self) -> int:
        """Number of samples chosen."""
        return len(self.rows)

    def digest(self) -> str:
        """Return a digest of the tars' names, sizes and times of change, and of the choice."""
        names = ImageFiles(self.shards.folder, self.shards.shard_names).digest()
        return blake2b(names.encode() + self.rows.tobytes(), digest_size=16).hexdigest()

    def read(self, index: int) -> RawSample:
        """Return a sample without its text."""
        sample = self.shards.read(self._row(index))
        return RawSample(sample.key, sample.image, b"")

    def locate(self, index: int) -> tuple[str, int]:
        """Return the name of the tar, and the sample's place in it."""
        return self.shards.locate(self._row(index))

    def _row(self, index: int) -> int:
        return int(self.rows[_checked(index, self.num_samples)])


def _checked(index: int, num_samples: int) -> int:
    if not 0 <= index < num_samples:
        raise IndexError(f"image {index} of {num_samples}")
    return index


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
