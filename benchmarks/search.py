"""How fast is a search over a million embeddings, and how much of what is nearest does it find?

Embeddings of images are not spread evenly: they share a direction, gather around what images show,
and vary far more along some axes than along others. The vectors are made in that way, from a seed:
a shared offset of length 1, plus the centre of one of 20,000 clusters (for a million vectors), plus
noise. Clusters are drawn with Zipf weights of exponent 0.5; centres have an expected squared length
of 1 and noise one of 0.5, both with variances of 1/i along axis i. Two unrelated vectors then have
a cosine of about 0.4, two of a cluster one of about 0.8. These are choices, not measurements of a
model. Queries are further draws that are not in the index. Beside them stand noisier clusters
(noise as large as the centres) and, as the worst case, vectors without any structure: there, the
nearest items are hardly nearer than all others, and no lists can tell where they are.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Bar, Result
from unicl.search.index import SearchIndex
from unicl.search.items import Item

_DIM = 512
_BLOCK = 16_384
_PER_CLUSTER = 50
_ZIPF = 0.5
_K = 10
_RECALL = 0.95
T = TypeVar("T")


@dataclass(frozen=True)
class Making:
    """How vectors are made."""

    name: str
    exponent: float
    """Variance along axis i is i to the power of minus this."""
    offset: float
    """Length of what all vectors share."""
    noise: float
    """Squared length of the noise, in that of the centres."""
    clustered: bool = True


_MAKINGS = (
    Making("clusters, cosine 0.8 within", exponent=1.0, offset=1.0, noise=0.5),
    Making("noisier clusters, cosine 0.67 within", exponent=1.0, offset=1.0, noise=1.0),
    Making("no structure at all", exponent=0.0, offset=0.0, noise=1.0, clustered=False),
)


def measure(*, quick: bool) -> Result:
    """Build both indices for each kind of vectors, and ask each further query by itself."""
    count, num_queries = (4_000, 20) if quick else (1_000_000, 200)
    rows = [_measure(making, count, num_queries) for making in _MAKINGS]
    first = rows[0]
    what = f"search over {count:,} vectors of {_DIM} dimensions"
    return Result(
        bars=[
            Bar(f"{what}, recall@10", float(first["recall_at_10"]), _RECALL, "", "at least"),
            Bar(f"{what}, median of a query", float(first["median_ms"]), 10, "ms", "at most"),
            Bar(f"{what}, 95% of the queries", float(first["p95_ms"]), None, "ms", "at most"),
            Bar(f"{what}, building the index", float(first["build_s"]), 300, "s", "at most"),
        ],
        tables={"Approximate beside exact index, one query at a time": rows},
        facts={
            "vectors": count,
            "dim": _DIM,
            "queries": num_queries,
            "wanted_recall": _RECALL,
            "build": "from embeddings in blocks to the index on disk, its own recall measured",
        },
    )


def _measure(making: Making, count: int, num_queries: int) -> dict[str, Any]:
    queries = np.concatenate(list(draw(making, num_queries, seed=1)))
    folder = Path(tempfile.mkdtemp(prefix="unicl-search-"))
    try:
        names = {"model": making.name, "fingerprint": making.name}
        exact = SearchIndex.build(folder / "exact", _blocks(making, count), kind="exact", **names)
        exact_ms, truth = _ask(exact, queries)
        blocks = _Timed(_blocks(making, count))
        start = time.perf_counter()
        index = SearchIndex.build(
            folder / "approximate", blocks, kind="approximate", recall=_RECALL, **names
        )
        # The vectors are drawn while the index takes them; drawing is not part of building.
        build_s = time.perf_counter() - start - blocks.seconds
        own_ms, found = _ask(index, queries)
        recalls = [len(set(a) & set(b)) / _K for a, b in zip(found, truth, strict=True)]
        facts = index.facts
        size = sum(path.stat().st_size for path in (folder / "approximate").rglob("*.faiss"))
    finally:
        shutil.rmtree(folder)
    return {
        "vectors": making.name,
        "recall_at_10": float(np.mean(recalls)),
        "its_own_measure": facts.recall,
        "median_ms": float(np.median(own_ms)),
        "p95_ms": float(np.percentile(own_ms, 95)),
        "exact_ms": float(np.median(exact_ms)),
        "build_s": build_s,
        "lists_seen": f"{facts.num_probed:,} of {facts.num_lists:,}",
        "index_mib": size / 2**20,
    }


def draw(making: Making, count: int, *, seed: int) -> Iterator[NDArray[np.float32]]:
    """Blocks of unit-length vectors; the seed chooses them, centres are the same for all seeds."""
    axes = np.arange(1, _DIM + 1, dtype=np.float32) ** (-making.exponent / 2)
    axes /= np.linalg.norm(axes)
    fixed = np.random.default_rng(0)
    offset = fixed.standard_normal(_DIM, dtype=np.float32)
    offset *= making.offset / np.linalg.norm(offset)
    num_clusters = 1_000_000 // _PER_CLUSTER
    centres = axes * fixed.standard_normal((num_clusters, _DIM), dtype=np.float32)
    weights = np.arange(1, num_clusters + 1) ** -_ZIPF
    generator = np.random.default_rng(seed + 1)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        noise = axes * generator.standard_normal((size, _DIM), dtype=np.float32)
        vectors = offset + making.noise**0.5 * noise
        if making.clustered:
            vectors += centres[generator.choice(num_clusters, size, p=weights / weights.sum())]
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _blocks(making: Making, count: int) -> Iterator[tuple[NDArray[np.float32], list[Item]]]:
    first = 0
    for vectors in draw(making, count, seed=0):
        yield vectors, [Item(str(first + row), "", "") for row in range(len(vectors))]
        first += len(vectors)


class _Timed(Generic[T]):
    """An iterator that adds up how long its own work takes."""

    def __init__(self, inner: Iterator[T]) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __iter__(self) -> "_Timed[T]":
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self._inner)
        finally:
            self.seconds += time.perf_counter() - start


def _ask(index: SearchIndex, queries: NDArray[np.float32]) -> tuple[list[float], list[list[str]]]:
    """Milliseconds and keys found for each query, one after the other, all of them warm."""
    index.search(queries, _K)
    times, found = [], []
    for row in range(len(queries)):
        start = time.perf_counter()
        (best,) = index.search(queries[row : row + 1], _K)
        times.append(1000 * (time.perf_counter() - start))
        found.append([one.item.key for one in best])
    return times, found
