"""An approximate index: the items in lists around centroids, of which a search sees the nearest.

Embeddings are kept in half precision: beside fp32 it finds the same in half the memory and less
time; with 8 bits recall falls and nothing gets faster, with fewer (product quantization, RaBitQ) it
falls far. A graph (HNSW) answers several times faster, but takes too long to build, cannot be
brought to any recall by looking further, and is not the same twice when threads build it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from unicl.errors import UniclError
from unicl.evaluation.retrieval import load_faiss
from unicl.search.folder import Output

# Recall is measured on the ten nearest, as is usual.
NUM_NEAREST = 10

SAMPLE_FILE = "sample.npz"

_NUM_QUERIES = 1000

# Queries whose order of all lists exists at one time.
_QUERIES_AT_ONCE = 256

# What half precision may change of a similarity, in dimensions to the power of minus one half: a
# number is off by up to 2 ** -12 of itself, and this is about three standard deviations.
_TIE = 3 * 2**-12

# FAISS's advice: lists in proportion to the root of the number of items, and about 40 items of
# each to learn its centroid from.
_LISTS_PER_ROOT = 4
_LEARNED_FROM_PER_LIST = 48
_ITERATIONS = 10

# One-sided 95%: the recall of all queries is then rarely below that of those it was measured on.
_DEVIATIONS = 1.645


class Lists:
    """The inverted lists: learned once, then added to.

    Args:
        index: the FAISS index, trained, and in memory.
    """

    def __init__(self, index: Any) -> None:
        self.index = index
        self._coarse = on_gpus(load_faiss().downcast_index(index.quantizer))

    @classmethod
    def learn(
        cls,
        vectors: Float32[np.ndarray, "num_items dim"],
        held_out: Int64[np.ndarray, " num_held_out"],
        *,
        seed: int = 0,
    ) -> "Lists":
        """Lay the lists out for vectors, from a sample of them; they stay empty.

        Args:
            vectors: What is to be found.
            held_out: Rows that are not learned from: an item that was lies closer to a centroid
                than any other query will.
            seed: Chooses the sample.
        """
        faiss = load_faiss()
        dim = vectors.shape[1]
        rows = np.setdiff1d(np.arange(len(vectors)), held_out)
        if not len(rows):
            rows = held_out  # there is one item only
        num_lists = max(1, min(round(_LISTS_PER_ROOT * len(vectors) ** 0.5), len(rows) // 39))
        sample = vectors[rows[_drawn(len(rows), num_lists * _LEARNED_FROM_PER_LIST, seed)]]
        clustering = faiss.Clustering(dim, num_lists)
        clustering.niter, clustering.seed = _ITERATIONS, seed
        # Centroids of unit length: the nearest of them is then the one of the largest product.
        clustering.spherical = True
        clustering.min_points_per_centroid = 1  # fewer only draw a line on the terminal
        clustering.train(sample, on_gpus(faiss.IndexFlatIP(dim)))
        centroids = faiss.IndexFlatIP(dim)
        centroids.add(faiss.vector_to_array(clustering.centroids).reshape(num_lists, dim))
        index = faiss.IndexIVFScalarQuantizer(
            centroids, dim, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        index.train(sample[:1])  # half precision has nothing to learn, but FAISS asks for it
        return cls(index)

    def add(self, vectors: Float32[np.ndarray, "n dim"]) -> None:
        """Append vectors."""
        load_faiss()
        from faiss.contrib.ivf_tools import add_preassigned

        _, nearest = self._coarse.search(vectors, 1)
        add_preassigned(self.index, vectors, nearest[:, 0].copy())

    def places(self) -> Int64[np.ndarray, " num_items"]:
        """The list that each item is in."""
        faiss = load_faiss()
        places = np.empty(self.index.ntotal, np.int64)
        lists = self.index.invlists
        for number in range(self.index.nlist):
            if size := lists.list_size(number):
                places[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return places


@dataclass
class Sample:
    """Queries, and the items that are really nearest to them.

    They are kept with the index: that is how recall is measured again when items were added,
    although the embeddings in full precision are gone.
    """

    queries: Float32[np.ndarray, "num_queries dim"]
    """Images of the index first, then texts if there were any."""
    own: Int64[np.ndarray, " num_queries"]
    """The row of each query itself, which does not count as found; -1 for a text."""
    similarities: Float32[np.ndarray, "num_queries depth"]
    """Of the nearest, best first."""
    nearest: Int64[np.ndarray, "num_queries depth"]
    """Their rows; -1 where there are no more items."""

    @classmethod
    def draw(
        cls,
        vectors: Float32[np.ndarray, "num_items dim"],
        texts: Float32[np.ndarray, "num_texts dim"] | None = None,
        *,
        seed: int = 1,
    ) -> "Sample":
        """Take some items, and some texts, as queries; they have seen no item yet."""
        own = _drawn(len(vectors), min(_NUM_QUERIES, 1 + len(vectors) // 4), seed)
        queries = vectors[own]
        if texts is not None:
            chosen = _drawn(len(texts), _NUM_QUERIES, seed)
            queries = np.concatenate([queries, texts[chosen]])
            own = np.concatenate([own, np.full(len(chosen), -1)])
        # One more than is asked for, because a query that is an item finds itself.
        shape = (len(queries), NUM_NEAREST + 1)
        return cls(np.array(queries), own, np.full(shape, -np.inf, np.float32), np.full(shape, -1))

    def see(self, vectors: Float32[np.ndarray, "n dim"], first: int) -> None:
        """Compare the queries with the items from row `first` on, and keep the nearest."""
        faiss = load_faiss()
        block = on_gpus(faiss.IndexFlatIP(vectors.shape[1]))
        block.add(vectors)
        similarities, rows = block.search(self.queries, self.nearest.shape[1])
        similarities[rows < 0] = -np.inf
        rows[rows >= 0] += first
        best = faiss.ResultHeap(*self.nearest.shape, keep_max=True)
        best.add_result(self.similarities, self.nearest)
        best.add_result(similarities, rows)
        best.finalize()
        self.similarities, self.nearest = best.D, best.I

    @property
    def counts(self) -> Bool[np.ndarray, "num_queries depth"]:
        """Which of the nearest a search has to find: the ten nearest but for the query itself."""
        return (self.nearest >= 0) & _others(self.nearest, self.own)

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        archive = BytesIO()
        np.savez(
            archive,
            allow_pickle=False,
            queries=self.queries,
            own=self.own,
            similarities=self.similarities,
            nearest=self.nearest,
        )
        with Output(folder / SAMPLE_FILE) as output:
            output.write(archive.getbuffer())

    @classmethod
    def load(cls, folder: Path) -> "Sample":
        """Read it from a folder.

        Raises:
            UniclError: It is damaged.
        """
        path = folder / SAMPLE_FILE
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**arrays)
        # What NumPy raises on damaged files is not one family.
        except Exception as error:
            raise UniclError(f"{path} is damaged; build the index again") from error


def tune(lists: Lists, sample: Sample, wanted: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Find the smallest number of lists to look through at which the wanted recall is reached.

    Recall is held to it for images and texts apart, with 95% confidence. Where each item that
    should be found lies in the order of the lists says what number that is; then it is measured by
    searching, for half precision may cost a little more.

    Args:
        lists: the lists, with all items.
        sample: queries and what is nearest to them.
        wanted: recall to be reached, in 0..1.
        say: told when a number of lists is tried.

    Returns:
        The `Facts` that are known by then, by name.
    """
    index = lists.index
    texts = sample.own < 0
    groups = [group for group in (~texts, texts) if group.any()]

    def enough(recalls: np.ndarray) -> bool:
        return all(_surely(recalls[group], wanted) for group in groups)

    needed = _lists_needed(lists, sample)
    low, probed = 1, index.nlist
    while low < probed:
        middle = (low + probed) // 2
        if enough(_share(needed <= middle, sample.counts)):
            probed = middle
        else:
            low = middle + 1
    while True:
        say(f"measuring recall, looking through {probed:,} of {index.nlist:,} lists")
        recalls = _recalls(index, sample, probed)
        if enough(recalls) or probed == index.nlist:
            break
        probed = min(index.nlist, probed + max(1, probed // 16))
    return {
        "recall": float(recalls[~texts].mean()),
        "text_recall": float(recalls[texts].mean()) if texts.any() else None,
        "wanted_recall": wanted,
        "num_lists": index.nlist,
        "num_probed": probed,
    }


def search_lists(
    index: Any, queries: Float32[np.ndarray, "num_queries dim"], k: int, num_probed: int
) -> tuple[Float32[np.ndarray, "num_queries k"], Int64[np.ndarray, "num_queries k"]]:
    """Similarities and rows of the nearest items, best first; row -1 where the lists hold fewer."""
    probed = load_faiss().SearchParametersIVF(nprobe=num_probed)
    return index.search(queries, k, params=probed)


def on_gpus(index: Any) -> Any:
    """Return an index on all GPUs, or as it is where there are none."""
    faiss = load_faiss()
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() else index


def _lists_needed(lists: Lists, sample: Sample) -> Int64[np.ndarray, "num_queries depth"]:
    """How many lists a search has to look through to come to each of the nearest items."""
    places = lists.places()[sample.nearest]
    needed = np.empty_like(places)
    for start in range(0, len(places), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        _, order = lists.index.quantizer.search(sample.queries[rows], lists.index.nlist)
        needed[rows] = 1 + np.take_along_axis(order.argsort(axis=1), places[rows], axis=1)
    return needed


def _recalls(index: Any, sample: Sample, num_probed: int) -> Float64[np.ndarray, " num_queries"]:
    """Share of the nearest items that a search finds for each query.

    Told by similarity, not by row: of items that are equally near, any will do.
    """
    counts = sample.counts
    depth = counts.shape[1]
    similarities, rows = search_lists(index, sample.queries, depth, num_probed)
    furthest = np.where(counts, sample.similarities, np.inf).min(axis=1, keepdims=True)
    tie = _TIE / sample.queries.shape[1] ** 0.5
    near = (rows >= 0) & _others(rows, sample.own) & (similarities >= furthest - tie)
    num_wanted = np.maximum(counts.sum(axis=1), 1)
    return np.where(counts.any(axis=1), np.minimum(near.sum(axis=1) / num_wanted, 1), 1.0)


def _others(rows: np.ndarray, own: np.ndarray) -> Bool[np.ndarray, "num_queries depth"]:
    """The first ten of each query that are not the query itself."""
    others = rows != own[:, None]
    return others & (others.cumsum(axis=1) <= NUM_NEAREST)


def _share(found: np.ndarray, counts: np.ndarray) -> Float64[np.ndarray, " num_queries"]:
    num_wanted = counts.sum(axis=1)
    return np.where(num_wanted, (found & counts).sum(axis=1) / np.maximum(num_wanted, 1), 1.0)


def _surely(recalls: np.ndarray, wanted: float) -> bool:
    """Whether the mean of further queries' recalls is what is wanted, too."""
    doubt = _DEVIATIONS * recalls.std() / len(recalls) ** 0.5
    return bool(recalls.mean() - doubt >= wanted)


def _drawn(count: int, wanted: int, seed: int) -> Int64[np.ndarray, " drawn"]:
    """Up to `wanted` of the first `count` numbers, in rising order: one way through a file."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(count, min(count, wanted), replace=False))
