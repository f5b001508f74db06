"""Pretraining's two objectives: which words are hidden, and which texts do not match (METER)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from adapters.vqa.meter import Meter
from adapters.vqa.negatives import Negatives
from adapters.vqa.text_encoder import MASK
from adapters.vqa.tokens import Tokens
from unicl.data.loader import Batch
from unicl.data.order import mix
from unicl.distributed import ALONE, Ranks, whole_means
from unicl.engine.task import TaskInputs

_HIDING = int.from_bytes(b"hiding")
# Of ten hidden tokens eight become `MASK`, one a random one, one stays (BERT, Devlin et al. 2019).
_MASKED, _REPLACED = 0.8, 0.9


class VisionLanguagePretraining:
    """Image-text pairs into image-text matching and masked language modelling.

    An image is encoded once for three texts: its own, one that does not match, and its own with
    hidden words. What is hidden and what does not match follows from the seed and the sample's
    place in the stream, not from ranks or chunks.

    Args:
        model: The towers, co-attention and heads.
        tokens: The vocabulary.
        negatives: Chooses texts that do not match.
        mask_share: Share of a text's words that are hidden.
        matching_weight: Weight of the matching loss.
        words_weight: Weight of the hidden words' loss.
        seed: Decides what is hidden.
        ranks: The processes that share a batch.
    """

    def __init__(
        self,
        model: Meter,
        tokens: Tokens,
        negatives: Negatives,
        *,
        mask_share: float = 0.15,
        matching_weight: float = 1.0,
        words_weight: float = 1.0,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.negatives = negatives
        self.mask_share = mask_share
        self.weights = (matching_weight, words_weight)
        self.seed = seed
        self.ranks = ranks

    def inputs(self, batch: Batch) -> TaskInputs:
        """Lay out images with their texts, with others, and with their own of hidden words."""
        samples = batch.labels.tolist()
        hidden, targets = hide_words(
            batch.tokens.numpy(),
            self.tokens,
            share=self.mask_share,
            seeds=[mix(self.seed, _HIDING, sample, batch.consumed) for sample in samples],
        )
        others = self.negatives.choose(samples, batch.texts, batch.consumed)
        pairs = {
            "images": batch.images,
            "tokens": batch.tokens,
            "others": self.tokens(others) if others else batch.tokens[:0],
            "hidden": torch.from_numpy(hidden),
            "targets": torch.from_numpy(targets),
        }
        return TaskInputs({"pairs": pairs}, {"num_hidden": (pairs["targets"] >= 0).sum(1)})

    def encode(self, tower: str, rows: dict[str, Tensor]) -> Float[Tensor, "pairs 4"]:
        """Return for each pair: how well both texts match, its words' loss, and words guessed."""
        return self.encode_with(self.model, rows)

    @staticmethod
    def encode_with(model: Meter, rows: Any) -> Float[Tensor, "pairs 4"]:
        """Do the same with another model."""
        image = model.look(rows["images"])
        both = torch.cat([rows["tokens"], rows["others"]])
        own, other = model.match(torch.cat([image, image]), both).chunk(2)
        losses, guessed = model.hidden_words(image, rows["hidden"], rows["targets"])
        return torch.stack([own, other, losses, guessed.float()], 1)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of both losses, each a mean over the whole batch."""
        own, other, losses, guessed = embeddings["pairs"].unbind(1)
        signed = torch.cat([own, -other])
        # The cross-entropy of two outputs is that of their difference.
        matching = F.softplus(-signed).sum()
        sums = torch.stack([matching, losses.sum()])
        counts = torch.stack(
            [sums.new_tensor(len(signed)), context["num_hidden"].sum().to(sums.dtype)]
        )
        right = torch.stack([(signed > 0).sum(), guessed.detach().sum()]).to(sums.dtype)
        means, (*shares,) = whole_means(sums, counts, self.ranks, right)
        loss = means @ means.new_tensor(self.weights)
        names = ("matching", "words")
        metrics = {f"loss/{name}": mean.detach() for name, mean in zip(names, means, strict=True)}
        return loss, metrics | {
            f"{name}/accuracy": share for name, share in zip(names, shares, strict=True)
        }


def hide_words(
    tokens: Int64[np.ndarray, "texts length"],
    vocabulary: Tokens,
    *,
    share: float,
    seeds: Sequence[int],
) -> tuple[Int64[np.ndarray, "texts length"], Int64[np.ndarray, "texts length"]]:
    """Hide some words of each text, as BERT does.

    Whole words are chosen, so many that their share is nearest to `share`, and at least one. Each
    of their tokens becomes `MASK` in 8 cases of 10, a random one of the vocabulary in one, and
    stays in one; all are to be guessed.

    Args:
        tokens: Texts, padded.
        vocabulary: Knows which tokens are a word.
        share: Of the words.
        seeds: One per text; they decide everything.

    Returns:
        The texts in which words are hidden, and what they were, -1 where nothing is.
    """
    words = vocabulary.words(tokens)
    hidden, targets = tokens.copy(), np.full_like(tokens, -1)
    allowed = np.delete(np.arange(vocabulary.size), vocabulary.specials)
    for row, seed in enumerate(seeds):
        count = int(words[row].max()) + 1
        if not count:
            continue
        rng = np.random.default_rng(seed)
        wanted = max(1, round(share * count))
        places = np.isin(words[row], rng.permutation(count)[:wanted]).nonzero()[0]
        draws, replacements = rng.random(len(places)), rng.choice(allowed, len(places))
        targets[row, places] = tokens[row, places]
        hidden[row, places] = np.select(
            [draws < _MASKED, draws < _REPLACED], [MASK, replacements], tokens[row, places]
        )
    return hidden, targets
