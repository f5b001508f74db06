"""How an index is made and how it changes: drafts of its data, committed once they are whole."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float32

from unicl.errors import UsageError
from unicl.evaluation.retrieval import load_faiss
from unicl.search.approximate import Lists, Sample, search_lists, tune
from unicl.search.folder import FAISS_FILE, Description, Draft, Facts, Kind, Output
from unicl.search.items import Block, ItemWriter
from unicl.search.state import State
from unicl.search.vectors import ROWS_AT_ONCE, VectorFile, require_unit

# An exact search reads all embeddings: of so many bytes it takes about 5 ms on one core.
_EXACT_BYTES = 100 << 20

_NUM_TIMED = 100


@dataclass(frozen=True)
class Added:
    """What became of the items that were to be added."""

    num_added: int
    """Items that are now in the index."""
    num_skipped: int
    """Items whose key was there already; the former one stays as it is."""


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    model: str
    """Name of the model that made the embeddings."""
    fingerprint: str
    """Its fingerprint."""
    kind: str
    """What the index is to be: exact, approximate or auto."""
    recall: float
    """Recall that an approximate index is to reach."""


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


def build(
    draft: Draft,
    blocks: Iterable[Block],
    plan: Plan,
    texts: Float32[np.ndarray, "num_texts dim"] | None,
    say: Callable[[str], None],
) -> Added:
    """Make an index of blocks of embeddings with their items.

    Raises:
        UsageError: There is no embedding, or they are not of unit length and one width.
    """
    say("reading the embeddings")
    path = draft.path / "vectors.f32"
    with VectorFile(path) as file, ItemWriter(draft.path) as writer:
        newcomers = _Newcomers(blocks, (), None)
        for block, items in newcomers:
            file.write(block)
            writer.write(items)
    if file.dim is None:
        raise UsageError("there are no embeddings to make an index of")
    if texts is not None:
        require_unit(texts, file.dim, what="the texts' embeddings")
    vectors = file.read()
    kind = chosen_kind(plan.kind, *vectors.shape)
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
    return Added(newcomers.num_added, newcomers.num_skipped)


def chosen_kind(wanted: str, num_items: int, dim: int) -> Kind:
    """What an index of so many embeddings becomes; `wanted` is a kind or "auto"."""
    num_bytes = num_items * dim * np.dtype(np.float32).itemsize
    if wanted == "exact" or (wanted == "auto" and num_bytes <= _EXACT_BYTES):
        return "exact"
    return "approximate"


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
    sample = Sample.draw(vectors, texts)
    lists = Lists.learn(vectors, sample.own)
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


def rebuild(
    draft: Draft,
    former: State,
    blocks: Iterable[Block],
    texts: Float32[np.ndarray, "num_texts dim"] | None,
    say: Callable[[str], None],
) -> Added:
    """Add to an exact index; one that was left to choose its kind may become approximate."""
    old = former.description
    known = (item.key for item in former.items)
    newcomers = _Newcomers(blocks, known, old.dim)
    plan = Plan(old.model, old.fingerprint, old.wanted_kind, old.wanted_recall)
    build(draft, chain(former.blocks(), newcomers), plan, texts, say)
    return Added(newcomers.num_added, newcomers.num_skipped)


def extend(
    draft: Draft, former: State, blocks: Iterable[Block], say: Callable[[str], None]
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
