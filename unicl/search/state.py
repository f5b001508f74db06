"""One state of an index, opened to be searched."""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from unicl.errors import UniclError, UsageError
from unicl.evaluation.retrieval import load_faiss
from unicl.search.approximate import on_gpus, search_lists
from unicl.search.folder import (
    FAISS_FILE,
    DamagedIndexError,
    Description,
    read_description,
    require_files,
)
from unicl.search.items import Block, Items
from unicl.search.vectors import ROWS_AT_ONCE

# Carrying the embeddings to a GPU takes longer than a few queries on the CPU.
_QUERIES_FOR_A_GPU = 64
_MOST_ON_A_GPU = 2048
"""FAISS finds no more than so many items per query on a GPU."""


class State:
    """An index as it was when it was opened, whatever others do to its folder meanwhile.

    Args:
        folder: The folder of the index.
        description: What its `index.json` says.

    Raises:
        DamagedIndexError: The index is damaged.
        UniclError: It cannot be read now.
    """

    def __init__(self, folder: Path, description: Description) -> None:
        faiss = load_faiss()
        require_files(folder, description)
        self.folder = folder
        self.description = description
        self.data = folder / description.data
        try:
            self.items = Items.open(self.data)
            self.index = faiss.read_index(str(self.data / FAISS_FILE), faiss.IO_FLAG_MMAP_IFC)
        except OSError as error:
            raise UniclError(f"cannot read {self.data}: {error.strerror or error}") from error
        except RuntimeError as error:  # FAISS's own
            raise DamagedIndexError(f"{self.data} is damaged; build the index again") from error
        shape = (description.num_items, description.num_items, description.dim)
        if (self.index.ntotal, len(self.items), self.index.d) != shape:
            raise DamagedIndexError(
                f"{self.data} holds {self.index.ntotal:,} embeddings of width {self.index.d} and "
                f"{len(self.items):,} items, index.json says {shape[0]:,} of width {shape[2]}; "
                "build the index again"
            )
        self._gpu: Any = None
        self._gpu_lock = Lock()

    @classmethod
    def now(cls, folder: Path) -> "State":
        """Open the present one.

        Raises:
            UsageError: The folder holds no index.
            UniclError: The index is damaged, or cannot be read now.
        """
        while True:
            description = read_description(folder)
            try:
                return cls(folder, description)
            except UniclError:
                # Another process may have replaced it since the description was read.
                if read_description(folder).data == description.data:
                    raise

    def require_model(self, model: str, fingerprint: str) -> None:
        """See that embeddings of a model can be compared with those of the index.

        Raises:
            UsageError: Another model made the index.
        """
        description = self.description
        if fingerprint != description.fingerprint:
            raise UsageError(
                f"the index {self.folder} was made with {description.model} "
                f"(fingerprint {description.fingerprint}), not with {model} "
                f"(fingerprint {fingerprint}); use that model or build another index"
            )

    def nearest(
        self, queries: Float32[np.ndarray, "num_queries dim"], k: int
    ) -> tuple[Float32[np.ndarray, "num_queries k"], Int64[np.ndarray, "num_queries k"]]:
        """Similarities and rows of the k nearest items, best first."""
        if self.description.kind == "exact":
            return self._exact(queries, k)
        num_probed = self.description.facts.num_probed or 1
        found = search_lists(self.index, queries, k, num_probed)
        # The nearest lists may hold fewer items than were asked for; other lists have them.
        while (found[1] < 0).any() and num_probed < self.index.nlist:
            num_probed = min(2 * num_probed, self.index.nlist)
            found = search_lists(self.index, queries, k, num_probed)
        return found

    def _exact(
        self, queries: Float32[np.ndarray, "num_queries dim"], k: int
    ) -> tuple[Float32[np.ndarray, "num_queries k"], Int64[np.ndarray, "num_queries k"]]:
        faiss = load_faiss()
        if not faiss.get_num_gpus() or len(queries) < _QUERIES_FOR_A_GPU or k > _MOST_ON_A_GPU:
            return self.index.search(queries, k)
        with self._gpu_lock:  # an index on a GPU serves one thread at a time
            if self._gpu is None:
                self._gpu = on_gpus(self.index)
            return self._gpu.search(queries, k)

    def blocks(self) -> Iterator[Block]:
        """What an exact index was made of."""
        for start in range(0, len(self.items), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(self.items))
            items = [self.items[row] for row in range(start, stop)]
            yield self.index.reconstruct_n(start, stop - start), items
