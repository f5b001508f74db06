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
from jaxtyping import Float, Float64, Int
from torch import Tensor

from unicl.data.hash_table import text_label
from unicl.data.loader import Tokenize
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import (
    Embedded,
    Samples,
    TwoTowers,
    count_before,
    embed_images,
    embed_texts,
)

# Best items looked at per query, however small k is; a longer tie counts as a miss.
_TIES = 63

# Queries whose best items exist at one time.
_QUERIES_AT_ONCE = 2048


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
        image_to_text = recall(images, texts, found.pairs, self.ks)
        text_to_image = recall(texts, images, found.pairs.flip(1), self.ks)
        return {
            f"{self.prefix}/{direction}_r{k}": value
            for direction, recalls in (("i2t", image_to_text), ("t2i", text_to_image))
            for k, value in recalls.items()
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


def recall(
    queries: Float[Tensor, "num_queries dim"],
    items: Float[Tensor, "num_items dim"],
    pairs: Int[Tensor, "num_pairs 2"],
    ks: Sequence[int],
    weights: Float64[Tensor, " num_queries"] | None = None,
) -> dict[int, float]:
    """Share of the queries with a right item among the best k, for each k.

    Only queries that have a right item count. Ties count against the model: a right item is among
    the best k when fewer than k wrong ones are at least as similar; a collapsed model scores zero,
    not by luck. Memory holds the best items of some queries, never all similarities.

    Args:
        queries: unit-length embeddings of what is asked.
        items: unit-length embeddings of what is searched.
        ks: where the list of the best is cut.
        pairs: number of the query and number of a right item, in any order, without repetition.
        weights: how often each query counts; None counts each once.
    """
    faiss = load_faiss()
    asked = pairs[:, 0].unique()
    depth = min(max(*ks, _TIES) + 1, len(items))
    codes = (pairs[:, 0] * len(items) + pairs[:, 1]).numpy()
    searched = items.contiguous().numpy()
    ranks = []
    for block in asked.split(_QUERIES_AT_ONCE):
        similarities, best = faiss.knn(
            queries[block].numpy(), searched, depth, metric=faiss.METRIC_INNER_PRODUCT
        )
        right = np.isin(block.numpy()[:, None] * len(items) + best, codes)
        seen = right.any(axis=1)
        if depth < len(items):
            # A tie that goes on past the end of the list: nobody knows how many wrong items it has.
            last_right = np.where(right, similarities, -np.inf).max(axis=1)
            seen &= last_right > similarities[:, -1]
        found = torch.from_numpy(seen)
        before = torch.full((len(block),), depth)
        before[found] = count_before(
            torch.from_numpy(similarities[seen]),
            torch.from_numpy(right[seen]),
            queries[block[found]],
            items,
            torch.from_numpy(best[seen]),
        )
        ranks.append(before)
    counts = torch.ones(len(asked)).double() if weights is None else weights[asked]
    found = torch.cat(ranks)
    return {k: (((found < k).double() @ counts) / counts.sum()).item() for k in ks}


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
