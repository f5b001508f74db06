"""A folder of embeddings and what their rows are: `unicl embed` writes it, `unicl index` reads it.

`embeddings.npy` opens with `numpy.load(..., mmap_mode="r")`, `items.jsonl` has a line per row, and
`collection.json`, written last, says which model made them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from unicl.data.atomic import PARTIAL_PREFIX, atomic_file, write_error
from unicl.errors import UniclError, UsageError
from unicl.search.items import Block, Item

_EMBEDDINGS = "embeddings.npy"
_ITEMS = "items.jsonl"
_DESCRIPTION = "collection.json"
_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Embeddings on disk."""

    folder: Path
    """Where they lie."""
    model: str
    """Name of the model that made them."""
    fingerprint: str
    """Its fingerprint."""
    num_items: int
    """Rows."""
    dim: int
    """Width."""

    @classmethod
    def open(cls, folder: Path) -> "Collection":
        """Open what `write` has completed.

        Raises:
            UsageError: the folder holds no embeddings.
        """
        try:
            fields = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            return cls(folder=folder, **fields)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{folder} holds no embeddings; `unicl embed MODEL DATA --out {folder}` writes them"
            ) from error

    @classmethod
    def write(
        cls, folder: Path, blocks: Iterable[Block], *, model: str, fingerprint: str
    ) -> "Collection":
        """Write blocks of embeddings [n, dim] with their items.

        Raises:
            UsageError: the folder is not empty, or there is nothing in the blocks.
            UniclError: it cannot be written.
        """
        require_empty(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"{PARTIAL_PREFIX}*"):
                path.unlink()
        except OSError as error:
            raise write_error(folder, error) from error
        num_items, dim = 0, 0
        with atomic_file(folder / _EMBEDDINGS) as vectors, atomic_file(folder / _ITEMS) as lines:
            for embeddings, items in blocks:
                if not len(items):
                    continue  # none of the block's images could be read
                if not num_items:
                    dim = embeddings.shape[1]
                    _write_header(vectors, 0, dim)
                vectors.write(np.ascontiguousarray(embeddings, np.float32).data)
                # ASCII: a file name may hold bytes that are no UTF-8.
                lines.writelines(json.dumps(asdict(item)).encode() + b"\n" for item in items)
                num_items += len(items)
            if not num_items:
                raise UsageError("there is nothing to embed")
            vectors.seek(0)
            _write_header(vectors, num_items, dim)
        fields = {"model": model, "fingerprint": fingerprint, "num_items": num_items, "dim": dim}
        with atomic_file(folder / _DESCRIPTION) as file:
            file.write(json.dumps(fields, indent=1).encode())
        return cls(folder=folder, **fields)  # type: ignore[arg-type]

    def embeddings(self) -> Float32[np.ndarray, "num_items dim"]:
        """Map the embeddings into memory.

        Raises:
            UniclError: they are damaged.
        """
        path = self.folder / _EMBEDDINGS
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UniclError(f"{path} is damaged ({error}); embed the images again") from error
        if found.shape != (self.num_items, self.dim):
            raise UniclError(
                f"{path} has shape {list(found.shape)}, {_DESCRIPTION} says "
                f"{[self.num_items, self.dim]}; embed the images again"
            )
        return found

    def blocks(self) -> Iterator[Block]:
        """Go through embeddings and items together.

        Raises:
            UniclError: they are damaged.
        """
        embeddings = self.embeddings()
        items = self._items()
        for start in range(0, self.num_items, _ROWS):
            rows = embeddings[start : start + _ROWS]
            yield rows, list(islice(items, len(rows)))

    def _items(self) -> Iterator[Item]:
        path = self.folder / _ITEMS
        try:
            with open(path, encoding="utf-8") as lines:
                for line, _ in zip(lines, range(self.num_items), strict=True):
                    yield Item(**json.loads(line))
        except OSError as error:
            raise UniclError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise UniclError(f"{path} is damaged; embed the images again") from error


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds more than what a writer that was cut short has left.

    Raises:
        UsageError: it does.
        UniclError: it is a file, or cannot be read.
    """
    try:
        held = folder.exists() and any(
            not path.name.startswith(PARTIAL_PREFIX) for path in folder.iterdir()
        )
    except OSError as error:
        raise write_error(folder, error) from error
    if held:
        raise UsageError(f"{folder} is not empty; choose another --out")


def _write_header(file, num_rows: int, dim: int) -> None:  # type: ignore[no-untyped-def]
    # NumPy pads the header so that the number of rows can grow in place.
    fields = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, dim)}
    np.lib.format.write_array_header_1_0(file, fields)
