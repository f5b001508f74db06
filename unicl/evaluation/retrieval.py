"""Image-to-text and text-to-image retrieval through FAISS (Florence 3.5).

An image is right for a text when some sample of the set pairs them: images with equal pixels are
one image with several texts, equal texts are one text with several images.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl.data.hash_table import text_label
from unicl.data.loader import Tokenize
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import (
    NEAR,
    Embedded,
    Samples,
    TwoTowers,
    count_before,
    embed_images,
    embed_texts,
)

# Best items that FAISS lists per query; few right ones of a good model are not among them.
_LISTED = 64

# Queries whose best items exist at one time, and similarities of those that are compared with all.
_QUERIES_AT_ONCE = 2048
_SIMILARITIES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Hit:
    """One retrieved image."""

    key: str
    text: str
    similarity: float
    right: bool
    """Whether the query is a text of this image."""


@dataclass(frozen=True)
class Pairs:
    """The unique images and texts of a set, and which of them belong together."""

    image_rows: Int[Tensor, " num_images"]
    """Row of each unique image among the set's samples."""
    texts: tuple[str, ...]
    """Unique texts."""
    labels: tuple[int, ...]
    """Their labels."""
    pairs: Int[Tensor, "num_pairs 2"]
    """Number of the image and number of the text of each pair, without repetition."""

    @classmethod
    def of(cls, embedded: Embedded) -> "Pairs":
        """Find them in an embedded set; an image whose text is empty is in no pair."""
        image_of: dict[bytes, int] = {}
        text_of: dict[int, int] = {}
        image_rows: list[int] = []
        texts: list[str] = []
        pairs: dict[tuple[int, int], None] = {}
        samples = zip(embedded.contents, embedded.labels.tolist(), embedded.texts, strict=True)
        for row, (content, label, text) in enumerate(samples):
            if content not in image_of:
                image_of[content] = len(image_rows)
                image_rows.append(row)
            if not text.strip():
                continue
            if label not in text_of:
                text_of[label] = len(texts)
                texts.append(text)
            pairs[image_of[content], text_of[label]] = None
        if not pairs:
            raise UniclError("no image of the evaluation set has a text to be retrieved by")
        return cls(
            torch.tensor(image_rows), tuple(texts), tuple(text_of), torch.tensor(list(pairs))
        )


class Retrieval:
    """Evaluator: how often a right text is among the best k for an image, and the other way round.

    Args:
        loader: the held-out images, one text each.
        tokenize: texts to token numbers.
        ks: the k of recall at k.
        batch_size: texts per forward pass.
        autocast: type of the towers' arithmetic; None computes in the parameters' own.
        prefix: first part of the metrics' names.
    """

    def __init__(
        self,
        loader: Samples,
        tokenize: Tokenize,
        *,
        ks: Sequence[int] = (1, 5, 10),
        batch_size: int = 256,
        autocast: torch.dtype | None = None,
        prefix: str = "retrieval",
    ) -> None:
        if not ks or min(ks) < 1:
            raise UsageError(f"recall at k needs at least one k, each 1 or more, got {tuple(ks)}")
        self.loader = loader
        self.tokenize = tokenize
        self.ks = tuple(ks)
        self.batch_size = batch_size
        self.autocast = autocast
        self.prefix = prefix

    def __call__(self, model: TwoTowers, embedded: Embedded | None = None) -> dict[str, float]:
        """Recalls in 0..1, `i2t_r1` to `t2i_r10`; `embedded` saves embedding the images again."""
        embedded = self._images(model, embedded)
        found = Pairs.of(embedded)
        images = embedded.embeddings[found.image_rows]
        texts = self._texts(model, found.texts)
        sides = {
            "i2t": right_ranks(images, texts, found.pairs),
            "t2i": right_ranks(texts, images, found.pairs.flip(1)),
        }
        return {
            f"{self.prefix}/{side}_{name}": value
            for side, ranks in sides.items()
            for name, value in recalls(ranks, self.ks).items()
        }

    def search(
        self,
        model: TwoTowers,
        queries: Sequence[str],
        k: int = 5,
        embedded: Embedded | None = None,
    ) -> list[list[Hit]]:
        """The best k different images for each query, best first."""
        embedded = self._images(model, embedded)
        found = Pairs.of(embedded)
        index = flat_index(embedded.embeddings[found.image_rows])
        similarities, images = index.search(
            self._texts(model, queries).numpy(), min(k, index.ntotal)
        )
        labels_of: list[set[int]] = [set() for _ in found.image_rows]
        for image, text in found.pairs.tolist():
            labels_of[image].add(found.labels[text])
        rows = found.image_rows.tolist()
        return [
            [
                Hit(
                    key=embedded.keys[rows[image]],
                    text=embedded.texts[rows[image]],
                    similarity=float(similarity),
                    right=text_label(query, "") in labels_of[image],
                )
                for similarity, image in zip(*best, strict=True)
            ]
            for query, *best in zip(queries, similarities, images, strict=True)
        ]

    def _images(self, model: TwoTowers, embedded: Embedded | None) -> Embedded:
        if embedded is None:
            return embed_images(model, self.loader, autocast=self.autocast)
        return embedded

    def _texts(self, model: TwoTowers, texts: Sequence[str]) -> Float[Tensor, "num_texts dim"]:
        return embed_texts(model, texts, self.tokenize, self.batch_size, autocast=self.autocast)


def right_ranks(
    queries: Float[Tensor, "num_queries dim"],
    items: Float[Tensor, "num_items dim"],
    pairs: Int[Tensor, "num_pairs 2"],
    times: Int[Tensor, " num_queries"] | None = None,
) -> Int[Tensor, " num_ranks"]:
    """Rank of the best right item of each query that has one, in the queries' order; 1 is best.

    Exact, as in fp64. Ties count against the model: a rank is one more than the number of wrong
    items that are at least as similar, so that a collapsed model ranks last, not by luck. FAISS
    finds the best items; all are compared only for a query whose right ones are not among them.
    Memory holds the similarities of some queries at a time, never all.

    Args:
        queries: unit-length embeddings of what is asked.
        items: unit-length embeddings of what is searched.
        pairs: number of the query and number of a right item, in any order, without repetition.
        times: how often each query's rank is given; None gives each once.
    """
    asked = pairs[:, 0].unique()
    before = [
        _count_before(block, queries, items, pairs) for block in asked.split(_QUERIES_AT_ONCE)
    ]
    ranks = torch.cat(before) + 1
    return ranks if times is None else ranks.repeat_interleave(times[asked])


def _count_before(
    block: Int[Tensor, " num_asked"],
    queries: Float[Tensor, "num_queries dim"],
    items: Float[Tensor, "num_items dim"],
    pairs: Int[Tensor, "num_pairs 2"],
) -> Int[Tensor, " num_asked"]:
    """Wrong items that come before the right ones of these queries."""
    faiss = load_faiss()
    depth = min(_LISTED, len(items))
    similarities, best = map(
        torch.from_numpy,
        faiss.knn(
            queries[block].numpy(),
            items.contiguous().numpy(),
            depth,
            metric=faiss.METRIC_INNER_PRODUCT,
        ),
    )
    right = torch.isin(block[:, None] * len(items) + best, pairs @ torch.tensor([len(items), 1]))
    # Beyond the end of the list there may be items as similar as its last, right ones among them.
    end = similarities[:, -1] + NEAR if depth < len(items) else torch.full((1,), -torch.inf)
    listed = similarities.masked_fill(~right, -torch.inf).amax(dim=1) > end
    before = torch.empty_like(block)
    before[listed] = count_before(
        similarities[listed], right[listed], queries[block[listed]], items, best[listed]
    )
    for rows in (~listed).nonzero()[:, 0].split(max(1, _SIMILARITIES_AT_ONCE // len(items))):
        before[rows] = _count_before_all(block[rows], queries, items, pairs)
    return before


def _count_before_all(
    block: Int[Tensor, " num_asked"],
    queries: Float[Tensor, "num_queries dim"],
    items: Float[Tensor, "num_items dim"],
    pairs: Int[Tensor, "num_pairs 2"],
) -> Int[Tensor, " num_asked"]:
    right = torch.zeros(len(block), len(items), dtype=torch.bool)
    askers, right_items = pairs[torch.isin(pairs[:, 0], block)].T.contiguous()
    right[torch.searchsorted(block, askers), right_items] = True
    every = torch.arange(len(items)).expand(len(block), -1)
    return count_before(queries[block] @ items.T, right, queries[block], items, every)


def recalls(ranks: Int[Tensor, " num_ranks"], ks: Sequence[int]) -> dict[str, float]:
    """Share of the queries with a right item among the best k, in 0..1: `r1`, `r5`, ..."""
    return {f"r{k}": (ranks <= k).double().mean().item() for k in ks}


def rank_metrics(ranks: Int[Tensor, " num_ranks"], ks: Sequence[int]) -> dict[str, float]:
    """Recalls, and beside them `median_rank` and `mean_rank` (MdR and MnR of video retrieval)."""
    return {
        **recalls(ranks, ks),
        "median_rank": float(np.median(ranks.numpy())),
        "mean_rank": ranks.double().mean().item(),
    }


def flat_index(embeddings: Float[Tensor, "num_items dim"]) -> Any:
    """An exact inner-product FAISS index over embeddings."""
    faiss = load_faiss()
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.contiguous().numpy())
    return index


def load_faiss() -> ModuleType:
    """FAISS, with as many threads as torch has here; call it again before each use."""
    # Late, because the import takes a good part of a second and few commands need it. FAISS
    # brings an OpenMP of its own, which starts a thread per core whatever torch was told, and which
    # is told anew in each Python thread.
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # SWIG's types, on Python 3.12 and later
        import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
