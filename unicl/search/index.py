"""A folder with an exact or approximate FAISS index over embeddings and what its rows are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from unicl.errors import UsageError
from unicl.search import KINDS
from unicl.search.change import Added, Plan, build, chosen_kind, extend, rebuild
from unicl.search.folder import Facts, Kind, drafting
from unicl.search.items import Block, Item, Items
from unicl.search.state import State
from unicl.search.vectors import require_unit


@dataclass(frozen=True)
class Found:
    """One item that a search found."""

    item: Item
    """What it is."""
    similarity: float
    """Cosine of the angle between its embedding and the query's."""


class SearchIndex:
    """Embeddings that can be searched, memory-mapped; `build`, `open`, `add` and `search`.

    Several threads may search at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state = State.now(folder)
        self.num_skipped = 0
        """Items that `build` left out, for an item before them had their key."""

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

        Of items with one key the first is taken, and `num_skipped` says how many others there were.
        While it works, the embeddings lie in the folder.

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
        require_setting(kind, recall)
        plan = Plan(model, fingerprint, kind, recall)
        with drafting(folder) as draft:
            built = build(draft, blocks, plan, texts, progress or _say_nothing)
        index = cls(folder)
        index.num_skipped = built.num_skipped
        return index

    @classmethod
    def open(cls, folder: str | Path) -> "SearchIndex":
        """Open an index; nothing but its description is read before it is searched.

        Raises:
            UsageError: The folder holds no index.
            UniclError: The index is damaged, or cannot be read now.
        """
        return cls(Path(folder))

    def add(
        self,
        blocks: Iterable[Block],
        *,
        model: str,
        fingerprint: str,
        texts: Float32[np.ndarray, "num_texts dim"] | None = None,
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
            texts: As in `build`, for an exact index that becomes approximate; one that is so
                already keeps its own.
            progress: Told in a few words what is done, whenever that changes.

        Raises:
            UsageError: Another model made the index, or the embeddings have another width.
            UniclError: The folder cannot be written.
        """
        self.require_model(model, fingerprint)
        with drafting(self.folder) as draft:
            former = State.now(self.folder)  # Another process may have added to it meanwhile.
            former.require_model(model, fingerprint)
            say = progress or _say_nothing
            if former.description.kind == "exact":
                added = rebuild(draft, former, blocks, texts, say)
            else:
                added = extend(draft, former, blocks, say)
        self._state = State.now(self.folder)
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
        state = self._state
        require_unit(queries, state.description.dim, what="the queries")
        if k < 1:
            raise UsageError(f"a search needs k of at least 1, got {k}")
        similarities, rows = state.nearest(queries, min(k, len(state.items)))
        return [
            [
                Found(state.items[row], similarity)
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
        self._state.require_model(model, fingerprint)

    @property
    def num_items(self) -> int:
        """Rows of the index."""
        return self._state.description.num_items

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._state.description.dim

    @property
    def model(self) -> str:
        """Name of the model that made the embeddings."""
        return self._state.description.model

    @property
    def fingerprint(self) -> str:
        """Fingerprint of that model."""
        return self._state.description.fingerprint

    @property
    def kind(self) -> Kind:
        """What it is; never "auto"."""
        return self._state.description.kind

    def kind_with(self, num_more: int) -> Kind:
        """What it would be with so many further items."""
        description = self._state.description
        if description.kind == "approximate":
            return "approximate"
        num_items = description.num_items + num_more
        return chosen_kind(description.wanted_kind, num_items, description.dim)

    @property
    def facts(self) -> Facts:
        """What was measured after its last change."""
        return self._state.description.facts

    @property
    def items(self) -> Items:
        """What each row is."""
        return self._state.items


def require_setting(kind: str, recall: float) -> None:
    """Refuse a kind or a recall that `SearchIndex.build` does not know.

    Raises:
        UsageError: It is one.
    """
    if kind not in KINDS:
        kinds = ", ".join(KINDS)
        raise UsageError(f"there is no kind of index {kind!r}; choose from {kinds}")
    if not 0 < recall <= 1:
        raise UsageError(f"recall must be above 0 and at most 1, got {recall}")


def _say_nothing(words: str) -> None:
    pass
