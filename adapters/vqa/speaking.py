"""Captions word by word: beam search, or nucleus sampling (Holtzman et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adapters.vqa.co_attention import KeysValues
from adapters.vqa.config import VqaConfig
from adapters.vqa.meter import Meter
from adapters.vqa.tokens import Tokens
from unicl.data.order import mix


@dataclass(frozen=True)
class Speaker:
    """Says what is in images.

    Args:
        model: Trained for captions.
        tokens: Its vocabulary.
        num_beams: Beams of the search; 1 is greedy.
        top_p: Draw each token of the likeliest that have this probability together; 0 searches.
        max_words: Longest caption in tokens.
        seed: Decides what is drawn, together with the number of each image.
    """

    model: Meter
    tokens: Tokens
    num_beams: int = 3
    top_p: float = 0.0
    max_words: int = 30
    seed: int = 0

    def captions(
        self, image: Float[Tensor, "images places width"], numbers: Sequence[int]
    ) -> list[str]:
        """Return one caption per image.

        Args:
            image: Tokens of the image tower.
            numbers: Numbers of the images, which nothing but the draws depends on.
        """
        memory = self.model.fusion.remember(image)
        say = self._sampled if self.top_p else self._searched
        return [self.tokens.decode(row) for row in say(memory, numbers).tolist()]

    @property
    def _most(self) -> int:
        # With the start and the end.
        return min(self.max_words, self.tokens.context_length - 2)

    def _log_shares(
        self, said: Int64[Tensor, "texts length"], memory: list[KeysValues]
    ) -> Float[Tensor, "texts vocabulary"]:
        """Return the logarithms of the next tokens' probabilities; after an end comes an end."""
        states = self.model.speak(said, memory)[:, -1]
        logits = self.model.heads["words"](states).float()
        never = [token for token in self.tokens.specials if token != self.tokens.end]
        logits[:, never] = -torch.inf
        logits = logits.log_softmax(-1)
        ended = said[:, -1] == self.tokens.end
        logits[ended] = -torch.inf
        logits[ended, self.tokens.end] = 0.0
        return logits

    def _sampled(
        self, memory: list[KeysValues], numbers: Sequence[int]
    ) -> Int64[Tensor, "images length"]:
        said = self._starts(len(numbers), memory)
        generators = [torch.Generator().manual_seed(mix(self.seed, each) >> 1) for each in numbers]
        for _ in range(self._most):
            shares, order = self._log_shares(said, memory).exp().cpu().sort(-1, descending=True)
            # The likeliest is always among them: before it there is nothing.
            shares[shares.cumsum(-1) - shares >= self.top_p] = 0
            chosen = [
                row[torch.multinomial(share, 1, generator=generator)]
                for row, share, generator in zip(order, shares, generators, strict=True)
            ]
            said = torch.cat([said, torch.stack(chosen).to(said.device)], 1)
            if (said[:, -1] == self.tokens.end).all():
                break
        return said

    def _searched(
        self, memory: list[KeysValues], numbers: Sequence[int]
    ) -> Int64[Tensor, "images length"]:
        count, beams = len(numbers), self.num_beams
        memory = [(k.repeat_interleave(beams, 0), v.repeat_interleave(beams, 0)) for k, v in memory]
        said = self._starts(count * beams, memory)
        # At first all beams of an image are the same: only one of them may go on.
        scores = torch.zeros(count, beams, device=said.device)
        scores[:, 1:] = -torch.inf
        first = torch.arange(count, device=said.device)[:, None] * beams
        for _ in range(self._most):
            shares = self._log_shares(said, memory).unflatten(0, (count, beams))
            size = shares.shape[-1]
            scores, best = (scores[..., None] + shares).flatten(1).topk(beams)
            said = said[(first + best // size).flatten()]
            said = torch.cat([said, (best % size).view(-1, 1)], 1)
            if (said[:, -1] == self.tokens.end).all():
                break
        # Of two captions the longer one is not the worse for its length: the tokens that were
        # scored, an end among them if there is one.
        inner = (said[:, 1:] != self.tokens.end).sum(1)
        lengths = (inner + (inner < said.shape[1] - 1)).view(count, beams)
        best = (scores / lengths).argmax(1, keepdim=True)
        return said[(first + best)[:, 0]]

    def _starts(self, count: int, memory: list[KeysValues]) -> Int64[Tensor, "texts 1"]:
        return torch.full((count, 1), self.tokens.start, device=memory[0][0].device)


def build_speaker(model: Meter, tokens: Tokens, config: VqaConfig) -> Speaker:
    """Build what says captions, as a configuration wants them said."""
    return Speaker(
        model,
        tokens,
        num_beams=config.num_beams,
        top_p=config.top_p,
        max_words=config.max_words,
    )
