"""Retrieval in two looks: the towers' best, then co-attention on each of these pairs.

What counts in the end is the sum of both logits, that of a match and the towers' own: where one of
the two cannot tell candidates apart, the other can.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from adapters.vqa.meter import Meter
from adapters.vqa.tokens import Tokens
from unicl.data.loader import Loader
from unicl.evaluation.embeddings import device_of, evaluating
from unicl.evaluation.retrieval import load_faiss, right_ranks


@dataclass(frozen=True)
class Candidates:
    """What the towers bring up for some queries.

    Args:
        queries: Number of each query.
        items: Number of each candidate, the most similar first.
        similarities: Of each candidate and its query, by the towers.
        right: Which of them are right.
        before: Rank of each query's best right item among all, by the towers.
    """

    queries: Int64[Tensor, " queries"]
    items: Int64[Tensor, "queries candidates"]
    similarities: Float[Tensor, "queries candidates"]
    right: Bool[Tensor, "queries candidates"]
    before: Int64[Tensor, " queries"]

    def ranks(self, scores: Float[Tensor, "queries candidates"]) -> Int64[Tensor, " queries"]:
        """Return ranks by other scores of the candidates.

        Where no candidate is right, the rank stays what it was; ties count against the model.
        """
        best = scores.masked_fill(~self.right, -torch.inf).amax(1, keepdim=True)
        after = 1 + ((scores >= best) & ~self.right).sum(1)
        return torch.where(self.right.any(1), after, self.before)


def find_candidates(
    queries: Float[Tensor, "all_queries dim"],
    items: Float[Tensor, "items dim"],
    pairs: Int64[Tensor, "pairs 2"],
    *,
    count: int,
) -> Candidates:
    """Return the items that are most similar to each query that has a right one.

    Args:
        queries: Unit-length embeddings of what is asked.
        items: Unit-length embeddings of what is searched.
        pairs: Number of a query and of a right item, without repetition.
        count: How many.
    """
    faiss = load_faiss()
    asked = pairs[:, 0].unique()
    similarities, found = faiss.knn(
        queries[asked].numpy(),
        items.contiguous().numpy(),
        min(count, len(items)),
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    best = torch.from_numpy(found)
    right = torch.isin(asked[:, None] * len(items) + best, pairs @ torch.tensor([len(items), 1]))
    before = right_ranks(queries, items, pairs)
    return Candidates(asked, best, torch.from_numpy(similarities), right, before)


def match_scores(
    model: Meter,
    loader: Loader,
    tokens: Tokens,
    texts: tuple[str, ...],
    pairs: Int64[Tensor, "pairs 2"],
    place_of: Callable[[int], int],
    *,
    batch_size: int,
) -> Float[Tensor, " pairs"]:
    """Return how well texts match images, pair by pair; each image is encoded once.

    Ranks share the images, and all get all scores.

    Args:
        model: With a matching head.
        loader: The images, whose labels are their rows.
        tokens: The vocabulary.
        texts: The texts.
        pairs: Number of the image and of the text; in order of the images.
        place_of: Number of an image by its row.
        batch_size: Pairs per forward pass.
    """
    device = device_of(model)
    scores = torch.zeros(len(pairs), device=device)
    firsts = pairs[:, 0].contiguous()

    def match(image: Tensor, part: Tensor) -> None:
        words = tokens([texts[number] for number in pairs[part, 1].tolist()])
        scores[part] = model.match(image.expand(len(part), -1, -1), words.to(device))

    def match_own() -> None:
        for batch in loader.epoch():
            if not batch.keys:
                continue
            seen = model.look(batch.images.to(device))
            for image, row in zip(seen, batch.labels.tolist(), strict=True):
                span = torch.searchsorted(firsts, place_of(row) + torch.arange(2)).tolist()
                for part in torch.arange(*span).split(batch_size):
                    match(image, part)

    with evaluating(model):
        loader.ranks.together(match_own)
    return loader.ranks.sum_(scores).cpu()
