"""Embeddings on their way into an index: checked, and kept on disk until they are in it."""

from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float32

from unicl.errors import UsageError
from unicl.search.folder import Output

# Rows that are worked on at one time.
ROWS_AT_ONCE = 16_384

# The largest error of a length that still counts as 1: that of half precision.
_UNIT = 1e-2


def require_unit(vectors: np.ndarray, dim: int | None, *, what: str) -> None:
    """See that vectors are float32 [n, dim] of unit length.

    Args:
        vectors: the vectors.
        dim: their width; None takes any.
        what: what they are, such as "the queries".

    Raises:
        UsageError: they are not.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise UsageError(
            f"{what} must be float32 of shape [n, dim], "
            f"got {vectors.dtype} of shape {list(vectors.shape)}"
        )
    if dim is not None and vectors.shape[1] != dim:
        raise UsageError(
            f"{what} are {vectors.shape[1]} wide, the index is {dim} wide: "
            "embed them with the model of the index"
        )
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    # Written so that a length that is not a number is wrong, too.
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _UNIT))
    if len(wrong):
        raise UsageError(
            f"{what} must be of unit length: row {wrong[0]} has length {lengths[wrong[0]]:.3g} "
            f"({len(wrong)} of {len(vectors)} rows are wrong)"
        )


class VectorFile:
    """A file of vectors, written block by block and read as one memory-mapped array.

    Args:
        path: where it goes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._output = Output(path)
        self.dim: int | None = None
        """Width of the vectors, once there are any."""

    def write(self, vectors: Float32[np.ndarray, "n dim"]) -> None:
        """Append vectors of one width."""
        self.dim = vectors.shape[1]
        self._output.write(np.ascontiguousarray(vectors).data)

    def read(self) -> Float32[np.ndarray, "num_vectors dim"]:
        """Map all of them, after the file was closed."""
        assert self.dim is not None
        return np.memmap(self._path, np.float32, mode="r").reshape(-1, self.dim)

    def __enter__(self) -> "VectorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._output.__exit__(kind, error, trace)
