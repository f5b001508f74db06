"""Co-attention: two stacks whose layers see each other (Florence 2.5; METER, Dou et al. 2022).

A layer has self-attention, cross-attention to the other modality, and an MLP, each with its norm
behind (BERT's order). Both stacks step in parallel: a layer sees the other modality as it was
before the layer of the same number.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [batch, heads, tokens, width of a head]."""

_NORM_EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """Attention of some tokens to others, of several heads.

    Args:
        width: Of the tokens.
        num_heads: Must divide the width.
        dropout: Share of the attention weights, and of what comes out, that is dropped.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, x: Float[Tensor, "batch tokens width"]) -> KeysValues:
        """Return the keys and values of what is attended to."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        seen: KeysValues,
        mask: Bool[Tensor, "batch 1 1 seen"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return what each token gathers from those seen.

        Args:
            x: The tokens that attend.
            seen: What `keys_values` returns.
            mask: Which of those seen are there; None is all.
            causal: Each token sees only those before it and itself.
        """
        dropout = self.dropout if self.training else 0.0
        gathered = F.scaled_dot_product_attention(
            self._heads(self.q(x)), *seen, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return F.dropout(self.proj(gathered.transpose(1, 2).flatten(2)), dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CoAttentionLayer(nn.Module):
    """One modality's layer: self-attention, cross-attention, MLP, a norm behind each.

    Args:
        width: Of the tokens.
        num_heads: Must divide the width.
        mlp_ratio: Hidden width of the MLP over the width.
        dropout: Share of attention weights and of each branch that is dropped.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attention = Attention(width, num_heads, dropout)
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.cross_attention = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.fc1 = nn.Linear(width, int(mlp_ratio * width))
        self.fc2 = nn.Linear(int(mlp_ratio * width), width)
        self.norm3 = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        other: KeysValues | None,
        mask: Bool[Tensor, "batch 1 1 tokens"] | None = None,
        other_mask: Bool[Tensor, "batch 1 1 seen"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after the layer.

        Args:
            x: Tokens of the layer's own modality.
            other: Keys and values of the other one, from `cross_attention`; None skips that part.
            mask: Which of the own tokens are there; None is all.
            other_mask: Which of the other's.
            causal: Own tokens see only those before them and themselves.
        """
        own = self.self_attention.keys_values(x)
        x = self.norm1(x + self.self_attention(x, own, mask, causal=causal))
        if other is not None:
            x = self.norm2(x + self.cross_attention(x, other, other_mask))
        hidden = self.fc2(F.gelu(self.fc1(x)))
        return self.norm3(x + F.dropout(hidden, self.dropout, self.training))


class CoAttention(nn.Module):
    """Tokens of an image and of a text into states that know of each other.

    Args:
        image_width: Of the image tower's tokens.
        text_width: Of the text encoder's tokens.
        width: Of both stacks.
        num_layers: Layers of each stack; METER has 6.
        num_heads: Must divide the width.
        mlp_ratio: Hidden width of the MLPs over the width.
        dropout: Share of attention weights and of each branch that is dropped in training.
        checkpointing: Recompute each layer's activations in the backward pass.
    """

    def __init__(
        self,
        *,
        image_width: int,
        text_width: int,
        width: int = 768,
        num_layers: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.checkpointing = checkpointing
        self.image_projection = nn.Linear(image_width, width)
        self.text_projection = nn.Linear(text_width, width)
        self.modality_embedding = nn.Parameter(torch.empty(2, width))

        def stack() -> nn.ModuleList:
            layers = (
                CoAttentionLayer(width, num_heads, mlp_ratio, dropout) for _ in range(num_layers)
            )
            return nn.ModuleList(layers)

        self.image_layers, self.text_layers = stack(), stack()
        self.image_pooler = nn.Linear(width, width)
        self.text_pooler = nn.Linear(width, width)
        initialise(self, width)
        nn.init.normal_(self.modality_embedding, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name what does not decay although it is a matrix (Florence 3.7)."""
        return {"modality_embedding"}

    def forward(
        self,
        image: Float[Tensor, "batch places image_width"],
        text: Float[Tensor, "batch length text_width"],
        *,
        image_mask: Bool[Tensor, "batch places"] | None = None,
        text_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch places width"], Float[Tensor, "batch length width"]]:
        """Return the states of an image's and of a text's tokens, each knowing of the other.

        Args:
            image: Tokens of the image tower.
            text: Tokens of the text encoder.
            image_mask: Which of the image's tokens are there; the others change nothing.
            text_mask: Which of the text's.
        """
        x, y = self._project_image(image), self._project_text(text)
        x_mask, y_mask = _over_keys(image_mask), _over_keys(text_mask)
        for image_layer, text_layer in self._layers():
            seen_by_image = image_layer.cross_attention.keys_values(y)
            seen_by_text = text_layer.cross_attention.keys_values(x)
            x = self._step(image_layer, x, seen_by_image, x_mask, y_mask)
            y = self._step(text_layer, y, seen_by_text, y_mask, x_mask)
        return x, y

    def remember(self, image: Float[Tensor, "batch places image_width"]) -> list[KeysValues]:
        """Return what each text layer sees of an image that does not look at the text.

        So an image is seen once, however many words are said of it.
        """
        x = self._project_image(image)
        memory = []
        # Nothing sees the image after its last layer.
        for image_layer, text_layer in self._layers():
            memory.append(text_layer.cross_attention.keys_values(x))
            if image_layer is not self.image_layers[-1]:
                x = self._step(image_layer, x, None)
        return memory

    def speak(
        self, text: Float[Tensor, "batch length text_width"], memory: list[KeysValues]
    ) -> Float[Tensor, "batch length width"]:
        """Return the states of a text's tokens, of which each knows those before it and the image.

        Args:
            text: Tokens of the text encoder, which must be causal itself.
            memory: What `remember` returns.
        """
        y = self._project_text(text)
        for layer, seen in zip(self.text_layers, memory, strict=True):
            y = self._step(layer, y, seen, None, None, True)  # causal
        return y

    def pool(
        self,
        image: Float[Tensor, "batch places width"],
        text: Float[Tensor, "batch length width"],
        image_mask: Bool[Tensor, "batch places"] | None = None,
    ) -> Float[Tensor, "batch both"]:
        """Return one vector of twice the width: the image's mean and the text's first token."""
        if image_mask is None:
            mean = image.mean(1)
        else:
            weights = image_mask.to(image.dtype)
            mean = (image * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return torch.cat([self.text_pooler(text[:, 0]), self.image_pooler(mean)], -1).tanh()

    def _layers(self) -> Iterator[tuple[Any, Any]]:
        return zip(self.image_layers, self.text_layers, strict=True)

    def _project_image(self, image: Tensor) -> Tensor:
        return self.image_projection(image) + self.modality_embedding[1]

    def _project_text(self, text: Tensor) -> Tensor:
        return self.text_projection(text) + self.modality_embedding[0]

    def _step(self, layer: nn.Module, *arguments: object) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)


def initialise(module: nn.Module, width: int) -> None:
    """Initialise linear layers as BERT does at its width of 768.

    At others the deviation is such that what a layer gives is as large: of BERT's own a narrow
    layer would give next to nothing.
    """
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.normal_(each.weight, std=0.02 * (768 / width) ** 0.5)
            nn.init.zeros_(each.bias)


def _over_keys(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]
