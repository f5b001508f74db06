"""METER: image tower, text encoder, co-attention, heads (Florence 2.5; Dou et al. 2022)."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.vqa.co_attention import CoAttention, KeysValues
from adapters.vqa.config import VqaConfig
from adapters.vqa.heads import AnswerHead, WordHead, matching_head
from adapters.vqa.text_encoder import TextEncoder
from unicl.towers.image import ImageTower
from unicl.towers.two_tower import Images, TwoTower


class Fused(NamedTuple):
    """What co-attention makes of images and texts, pair by pair."""

    image: Float[Tensor, "pairs places width"]
    text: Float[Tensor, "pairs length width"]
    pooled: Float[Tensor, "pairs both"]


class Meter(TwoTower):
    """Two towers whose tokens meet in co-attention, and a head for each objective.

    The towers' own projections stay as they were, so that it embeds images and texts as well as its
    towers still do.

    Args:
        image_tower: Images into tokens.
        text_encoder: Texts into tokens; one that is no text tower embeds none.
        config: The co-attention, and what it is for.
        num_tokens: Size of the vocabulary.
        scales: `initial_scale` and `max_scale` of the towers' similarities.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_encoder: nn.Module,
        config: VqaConfig,
        *,
        num_tokens: int,
        **scales: float,
    ) -> None:
        super().__init__(image_tower, text_encoder, **scales)
        encoder: Any = text_encoder
        self.objective = config.objective
        self.fusion = CoAttention(
            image_width=image_tower.token_width,
            text_width=encoder.width,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            checkpointing=config.checkpointing,
        )
        both = 2 * config.width
        self.heads = nn.ModuleDict()
        if config.objective == "answers":
            self.heads["answers"] = AnswerHead(both, len(config.answers))
        else:
            self.heads["words"] = WordHead(config.width, num_tokens)
        if config.objective == "pretraining":
            self.heads["matching"] = matching_head(both)
        self.rates = {"fusion": config.fusion_rate, "heads": config.head_rate}
        self._lock_unused()

    def _lock_unused(self) -> None:
        """Keep as it is what this objective never uses.

        What has no gradient on one rank would keep all others waiting.
        """
        unused: list[Any] = [
            self.logit_scale,
            self.image.projection,
            _part(self.text, "projection"),
        ]
        if self.objective == "captions":
            unused += [self.fusion.image_pooler, self.fusion.text_pooler]
            unused += [self.fusion.image_layers[-1]]
            for layer in self.fusion.image_layers:
                unused += [layer.cross_attention, layer.norm2]
        if self.objective != "pretraining":
            unused += [_part(self.text, "mask_embedding")]
        for part in unused:
            if part is not None:
                part.requires_grad_(False)

    def look(self, images: Images) -> Float[Tensor, "batch places image_width"]:
        """Return the tokens of images."""
        image: Any = self.image
        return image.tokens(images)

    def fuse(
        self,
        image: Float[Tensor, "pairs places image_width"],
        tokens: Int[Tensor, "pairs length"],
        *,
        image_mask: Bool[Tensor, "pairs places"] | None = None,
    ) -> Fused:
        """Let the tokens of images meet those of texts.

        Args:
            image: What `look` returns.
            tokens: Texts, padded.
            image_mask: Which of the image's tokens are there; None is all.
        """
        tokens, lengths = self._trimmed(tokens)
        there = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x, y = self.fusion(
            image, self._encoder.encode(tokens), image_mask=image_mask, text_mask=there
        )
        return Fused(x, y, self.fusion.pool(x, y, image_mask))

    def match(
        self,
        image: Float[Tensor, "pairs places image_width"],
        tokens: Int[Tensor, "pairs length"],
    ) -> Float[Tensor, " pairs"]:
        """Return how much likelier texts match images than not, as logits in fp32."""
        logits = self.heads["matching"](self.fuse(image, tokens).pooled).float()
        return logits[:, 1] - logits[:, 0]

    def answer(
        self,
        image: Float[Tensor, "pairs places image_width"],
        tokens: Int[Tensor, "pairs length"],
    ) -> Float[Tensor, "pairs answers"]:
        """Return a logit per answer, in fp32; each answer is right or not by itself."""
        return self.heads["answers"](self.fuse(image, tokens).pooled).float()

    def hidden_words(
        self,
        image: Float[Tensor, "pairs places image_width"],
        tokens: Int[Tensor, "pairs length"],
        targets: Int[Tensor, "pairs length"],
    ) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Return per text the sum of its hidden tokens' losses, and how many were guessed.

        Args:
            image: What `look` returns.
            tokens: Texts in which tokens are hidden.
            targets: What they were; -1 where nothing is to be guessed.
        """
        states = self.fuse(image, tokens).text
        return self._guess(states, targets[:, : states.shape[1]])

    def next_words(
        self,
        image: Float[Tensor, "pairs places image_width"],
        tokens: Int[Tensor, "pairs length"],
    ) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Return per text the sum of its tokens' losses, how many were guessed, and of how many.

        Each is guessed from the image and the tokens before it.
        """
        tokens, lengths = self._trimmed(tokens, least=2)  # one to begin with, one to guess
        states = self.speak(tokens[:, :-1], self.fusion.remember(image))
        inner = torch.arange(tokens.shape[1] - 1, device=tokens.device) < lengths[:, None] - 1
        losses, guessed = self._guess(states, torch.where(inner, tokens[:, 1:], -1))
        return losses, guessed, lengths - 1

    def speak(
        self, tokens: Int[Tensor, "pairs length"], memory: list[KeysValues]
    ) -> Float[Tensor, "pairs length width"]:
        """Return the states of texts whose tokens see those before them, and the image."""
        return self.fusion.speak(self._encoder.encode(tokens, causal=True), memory)

    @property
    def _encoder(self) -> TextEncoder:
        encoder: Any = self.text
        return encoder

    def _trimmed(self, tokens: Tensor, *, least: int = 1) -> tuple[Tensor, Tensor]:
        """Cut the padding that all texts share; return the texts' lengths, too."""
        lengths = self._encoder.lengths(tokens)
        return tokens[:, : max(least, int(lengths.max()))], lengths

    def _guess(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        chosen = targets >= 0
        # Without any, one counts nothing: a head that is not used would keep other ranks waiting.
        chosen[0, 0] |= ~chosen.any()
        rows = chosen.nonzero()[:, 0]
        sought = targets[chosen]
        logits = self.heads["words"](states[chosen]).float()
        losses = F.cross_entropy(logits, sought, ignore_index=-1, reduction="none")
        right = (logits.argmax(-1) == sought).long()
        count = len(targets)
        return (
            losses.new_zeros(count).index_add(0, rows, losses),
            right.new_zeros(count).index_add(0, rows, right),
        )


def _part(module: nn.Module, name: str) -> Any:
    return getattr(module, name, None)
