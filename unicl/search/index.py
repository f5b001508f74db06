"""A folder with an exact or approximate FAISS index over embeddings and what its rows are."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from unicl.errors import UniclError, UsageError
from unicl.evaluation.retrieval import load_faiss
from unicl.search.approximate import Lists, Sample, on_gpus, search_lists, tune
from unicl.search.folder import (
    FAISS_FILE,
    Description,
    Draft,
    Facts,
    Kind,
    Output,
    drafting,
    read_description,
    require_files,
)
from unicl.search.items import Item, Items, ItemWriter
from unicl.search.vectors import ROWS_AT_ONCE, VectorFile, require_unit

_KINDS = ("exact", "approximate", "auto")

Block = tuple[np.ndarray, Sequence[Item]]
"""Unit-length embeddings, float32 [n, dim], and the item of each row."""

# An exact search reads all embeddings: of so many bytes it takes about 5 ms on one core.
_EXACT_BYTES = 100 << 20

_NUM_TIMED = 100

# Carrying the embeddings to a GPU takes longer than a few queries on the CPU.
_QUERIES_FOR_A_GPU = 64
_MOST_ON_A_GPU = 2048
"""FAISS finds no more than so many items per query on a GPU."""


@dataclass(frozen=True)
class Found:
    """One item that a search found."""

    item: Item
    """What it is."""
    similarity: float
    """Cosine of the angle between its embedding and the query's."""


@dataclass(frozen=True)
class Added:
    """What became of the items that were to be added."""

    num_added: int
    """Items that are now in the index."""
    num_skipped: int
    """Items whose key was there already; the former one stays as it is."""


class SearchIndex:
    """Embeddings that can be searched, memory-mapped; `build`, `open`, `add` and `search`.

    Several threads may search at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = _Opened.now(folder)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        blocks: Iterable[Block],
        *,
        model: str,
        fingerprint: str,
        kind: str = "auto",
        recall: float = 0.95,
        texts: Float32[np.ndarray, "num_texts dim"] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> "SearchIndex":
        """Make an index in a folder; one that is there is replaced once the new one is complete.

        Of items with one key the first is taken. While it works, the embeddings lie in the folder.

        Args:
            folder: Where it goes.
            blocks: Unit-length embeddings [n, dim] with their items; gone through once.
            model: Name of the model that made them.
            fingerprint: Fingerprint of that model.
            kind: "exact" looks at every item; "approximate" at those in the nearest lists; "auto"
                is exact up to 100 MiB of embeddings, which takes about 5 ms per query.
            recall: Share of the ten nearest items that an approximate index is to find, in 0..1.
            texts: Embeddings of texts like those that will be searched for. Recall is then held
                to for them, too: they lie further from images than images from each other.
            progress: Told in a few words what is done, whenever that changes.

        Raises:
            UsageError: There is no embedding, they are not of unit length and one width, or a
                setting is impossible.
            UniclError: The folder cannot be written.
        """
        folder = Path(folder)
        if kind not in _KINDS:
            kinds = ", ".join(_KINDS)
            raise UsageError(f"there is no kind of index {kind!r}; choose from {kinds}")
        if not 0 < recall <= 1:
            raise UsageError(f"recall must be above 0 and at most 1, got {recall}")
        plan = _Plan(model, fingerprint, kind, recall)
        with drafting(folder) as draft:
            _build(draft, blocks, plan, texts, progress or _say_nothing)
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "SearchIndex":
        """Open an index; nothing but its description is read before it is searched.

        Raises:
            UsageError: The folder holds no index.
            UniclError: The index is damaged.
        """
        return cls(Path(folder))

    def add(
        self,
        blocks: Iterable[Block],
        *,
        model: str,
        fingerprint: str,
        progress: Callable[[str], None] | None = None,
    ) -> Added:
        """Add items; if anything fails, the index stays as it was.

        Items whose key is in the index are skipped, so that a data set that has grown can be given
        whole. An exact index becomes what building it at once would have made. The lists of an
        approximate one stay as they were laid out, and its recall is measured again: when that
        falls, or searches become slow, build it again.

        Args:
            blocks: Unit-length embeddings [n, dim] with their items; gone through once.
            model: Name of the model that made them.
            fingerprint: Fingerprint of that model.
            progress: Told in a few words what is done, whenever that changes.

        Raises:
            UsageError: Another model made the index, or the embeddings have another width.
            UniclError: The folder cannot be written.
        """
        self.require_model(model, fingerprint)
        with drafting(self.folder) as draft:
            former = _Opened.now(self.folder)  # Another process may have added to it meanwhile.
            former.require_model(model, fingerprint)
            extend = _rebuild if former.description.kind == "exact" else _extend
            added = extend(draft, former, blocks, progress or _say_nothing)
        self._open = _Opened.now(self.folder)
        return added

    def search(
        self, queries: Float32[np.ndarray, "num_queries dim"], k: int = 10
    ) -> list[list[Found]]:
        """The k nearest items of each query, best first; all items where there are fewer.

        Args:
            queries: Unit-length embeddings, made with the model of the index.
            k: How many to find.

        Raises:
            UsageError: The queries have another width or length than the index needs, or k is 0.
        """
        opened = self._open
        require_unit(queries, opened.description.dim, what="the queries")
        if k < 1:
            raise UsageError(f"a search needs k of at least 1, got {k}")
        similarities, rows = opened.nearest(queries, min(k, len(opened.items)))
        return [
            [
                Found(opened.items[row], similarity)
                for similarity, row in zip(*best, strict=True)
                if row >= 0
            ]
            for best in zip(similarities.tolist(), rows.tolist(), strict=True)
        ]

    def require_model(self, model: str, fingerprint: str) -> None:
        """See that embeddings of a model can be compared with those of the index.

        Raises:
            UsageError: Another model made the index.
        """
        self._open.require_model(model, fingerprint)

    @property
    def num_items(self) -> int:
        """Rows of the index."""
        return self._open.description.num_items

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._open.description.dim

    @property
    def model(self) -> str:
        """Name of the model that made the embeddings."""
        return self._open.description.model

    @property
    def fingerprint(self) -> str:
        """Fingerprint of that model."""
        return self._open.description.fingerprint

    @property
    def kind(self) -> Kind:
        """What it is; never "auto"."""
        return self._open.description.kind

    @property
    def facts(self) -> Facts:
        """What was measured after its last change."""
        return self._open.description.facts

    @property
    def items(self) -> Items:
        """What each row is."""
        return self._open.items


class _Opened:
    """One state of an index, which stays the same whatever others do to the folder."""

    def __init__(self, folder: Path, description: Description) -> None:
        faiss = load_faiss()
        require_files(folder, description)
        self.folder = folder
        self.description = description
        self.data = folder / description.data
        try:
            self.items = Items.open(self.data)
            self.index = faiss.read_index(str(self.data / FAISS_FILE), faiss.IO_FLAG_MMAP_IFC)
        except (OSError, RuntimeError) as error:  # RuntimeError is FAISS's own
            raise UniclError(f"{self.data} is damaged; build the index again") from error
        shape = (description.num_items, description.num_items, description.dim)
        if (self.index.ntotal, len(self.items), self.index.d) != shape:
            raise UniclError(
                f"{self.data} holds {self.index.ntotal:,} embeddings of width {self.index.d} and "
                f"{len(self.items):,} items, index.json says {shape[0]:,} of width {shape[2]}; "
                "build the index again"
            )
        self._gpu: Any = None
        self._gpu_lock = Lock()

    @classmethod
    def now(cls, folder: Path) -> "_Opened":
        """Open the present state."""
        while True:
            description = read_description(folder)
            try:
                return cls(folder, description)
            except UniclError:
                # Another process may have replaced it since the description was read.
                if read_description(folder).data == description.data:
                    raise

    def require_model(self, model: str, fingerprint: str) -> None:
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


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    model: str
    fingerprint: str
    kind: str
    recall: float


class _Newcomers:
    """The blocks without the items whose key was there before, and how many those were."""

    def __init__(self, blocks: Iterable[Block], known: Iterable[str], dim: int | None) -> None:
        self._blocks = blocks
        self._known = set(known)
        self._dim = dim
        self.num_added = 0
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Block]:
        for vectors, items in self._blocks:
            if not len(items) and not len(vectors):
                continue
            require_unit(vectors, self._dim, what="the embeddings")
            if len(vectors) != len(items):
                raise UsageError(f"a block has {len(vectors)} embeddings and {len(items)} items")
            self._dim = vectors.shape[1]
            rows = []
            for row, item in enumerate(items):
                if item.key not in self._known:
                    self._known.add(item.key)
                    rows.append(row)
            self.num_added += len(rows)
            self.num_skipped += len(items) - len(rows)
            if len(rows) == len(items):
                yield np.ascontiguousarray(vectors), items
            elif rows:
                yield vectors[rows], [items[row] for row in rows]


def _build(
    draft: Draft,
    blocks: Iterable[Block],
    plan: _Plan,
    texts: Float32[np.ndarray, "num_texts dim"] | None,
    say: Callable[[str], None],
) -> None:
    say("reading the embeddings")
    path = draft.path / "vectors.f32"
    with VectorFile(path) as file, ItemWriter(draft.path) as writer:
        for block, items in _Newcomers(blocks, (), None):
            file.write(block)
            writer.write(items)
    if file.dim is None:
        raise UsageError("there are no embeddings to make an index of")
    if texts is not None:
        require_unit(texts, file.dim, what="the texts' embeddings")
    vectors = file.read()
    kind: Kind = "exact" if plan.kind == "exact" else "approximate"
    if plan.kind == "auto" and vectors.nbytes <= _EXACT_BYTES:
        kind = "exact"
    if kind == "exact":
        facts = _write_exact(draft, vectors)
    else:
        facts = _write_approximate(draft, vectors, texts, plan.recall, say)
    path.unlink()
    draft.commit(
        Description(
            model=plan.model,
            fingerprint=plan.fingerprint,
            dim=file.dim,
            num_items=len(vectors),
            kind=kind,
            wanted_kind=plan.kind,
            wanted_recall=plan.recall,
            facts=facts,
        )
    )


def _write_exact(draft: Draft, vectors: Float32[np.ndarray, "num_items dim"]) -> Facts:
    index = load_faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)  # at once, for an index that grows takes twice the memory
    _write(draft, index)
    return Facts(milliseconds=_milliseconds(lambda query: index.search(query, 10), vectors))


def _write_approximate(
    draft: Draft,
    vectors: Float32[np.ndarray, "num_items dim"],
    texts: Float32[np.ndarray, "num_texts dim"] | None,
    recall: float,
    say: Callable[[str], None],
) -> Facts:
    say("learning the lists")
    lists = Lists.learn(vectors)
    sample = Sample.draw(vectors, texts)
    say("filling the lists")
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[start : start + ROWS_AT_ONCE]
        sample.see(block, start)
        lists.add(block)
    return _write_lists(draft, lists, sample, recall, len(vectors), say)


def _write_lists(
    draft: Draft,
    lists: Lists,
    sample: Sample,
    recall: float,
    num_learned_from: int,
    say: Callable[[str], None],
) -> Facts:
    index = lists.index
    facts = tune(lists, sample, recall, say)
    say("writing the index")
    _write(draft, index)
    sample.save(draft.path)
    return Facts(
        **facts,
        num_learned_from=num_learned_from,
        milliseconds=_milliseconds(
            lambda query: search_lists(index, query, 10, facts["num_probed"]), sample.queries
        ),
    )


def _rebuild(
    draft: Draft, former: _Opened, blocks: Iterable[Block], say: Callable[[str], None]
) -> Added:
    """Add to an exact index; one that was left to choose its kind may become approximate."""
    old = former.description
    known = (item.key for item in former.items)
    newcomers = _Newcomers(blocks, known, old.dim)
    plan = _Plan(old.model, old.fingerprint, old.wanted_kind, old.wanted_recall)
    _build(draft, chain(former.blocks(), newcomers), plan, None, say)
    return Added(newcomers.num_added, newcomers.num_skipped)


def _extend(
    draft: Draft, former: _Opened, blocks: Iterable[Block], say: Callable[[str], None]
) -> Added:
    """Add to an approximate index."""
    old = former.description
    lists = Lists(load_faiss().read_index(str(former.data / FAISS_FILE)))
    sample = Sample.load(former.data)
    newcomers = _Newcomers(blocks, (item.key for item in former.items), old.dim)
    say("filling the lists")
    with ItemWriter(draft.path, former.data) as writer:
        for vectors, items in newcomers:
            sample.see(vectors, lists.index.ntotal)
            lists.add(vectors)
            writer.write(items)
    if newcomers.num_added:
        learned_from = old.facts.num_learned_from or old.num_items
        facts = _write_lists(draft, lists, sample, old.wanted_recall, learned_from, say)
        draft.commit(replace(old, num_items=lists.index.ntotal, facts=facts))
    return Added(newcomers.num_added, newcomers.num_skipped)


def _write(draft: Draft, index: Any) -> None:
    faiss = load_faiss()
    with Output(draft.path / FAISS_FILE) as output:
        faiss.write_index(index, faiss.PyCallbackIOWriter(output.write))


def _milliseconds(
    search: Callable[[np.ndarray], object], vectors: Float32[np.ndarray, "num_vectors dim"]
) -> float:
    """Median time of a search for one query."""
    times = []
    for row in range(-1, min(len(vectors), _NUM_TIMED)):  # the first is to warm up
        query = np.array(vectors[[row]])
        start = time.perf_counter()
        search(query)
        times.append(time.perf_counter() - start)
    return 1000 * median(times[1:])


def _say_nothing(words: str) -> None:
    pass
