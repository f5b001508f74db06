"""The text tower: a pre-norm transformer over CLIP's byte-pair vocabulary (Florence, section 2.3).

Two economies change no result: `trim` cuts a batch to its longest text, `deduplicate` leaves one
row of equal texts.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unicl.errors import UsageError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

VOCABULARY_SIZE = 49408
"""CLIP's byte-pair vocabulary; its last and largest token ends a text."""

Activation = Literal["gelu", "quick_gelu"]


class TextTower(nn.Module):
    """Tokens into text features: transformer, value at the end-of-text token, norm, projection.

    On equal weights it equals open_clip's text tower; `from_open_clip` carries them over.

    Args:
        width: Width of the residual stream.
        num_layers: Number of blocks; Florence has 12.
        num_heads: Attention heads; must divide the width.
        mlp_width: Hidden width of the MLPs; unset means four times the width.
        context_length: Longest text in tokens, with start and end.
        embed_dim: Width of the features that come out.
        causal: Each token sees only those before it (CLIP); false lets all tokens of a text see
            each other (BERT), and none the padding.
        activation: Of the MLPs: "gelu", or "quick_gelu", CLIP's first approximation of it.
        norm_eps: Added to the variance in every norm.
        checkpointing: Recompute the blocks' activations in the backward pass.
        vocabulary_size: Number of tokens.

    Raises:
        UsageError: The heads do not divide the width.
    """

    def __init__(
        self,
        *,
        width: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        mlp_width: int | None = None,
        context_length: int = 77,
        embed_dim: int = 512,
        causal: bool = True,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        checkpointing: bool = False,
        vocabulary_size: int = VOCABULARY_SIZE,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"num_heads must divide the width {width}, got {num_heads}")
        self.activation = activation
        self.context_length = context_length
        self.embed_dim = embed_dim
        self.causal = causal
        self.checkpointing = checkpointing
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            _Block(
                width,
                num_heads,
                mlp_width or 4 * width,
                num_layers,
                activation=_ACTIVATIONS[activation],
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, or keep them."""
        self.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Name what does not decay although it is a matrix."""
        return {"positional_embedding", "token_embedding.weight"}

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer: embeddings, blocks, and on top norm and projection."""
        names = dict(self.named_parameters())
        depths = dict.fromkeys(names, len(self.blocks) + 1)
        for name in names:
            if name.startswith("blocks."):
                depths[name] = int(name.split(".")[1]) + 1
            elif name.endswith("_embedding") or name.startswith("token_embedding."):
                depths[name] = 0
        return depths

    def forward(self, tokens: Int[Tensor, "texts length"]) -> Float[Tensor, "texts embed_dim"]:
        """Return the features of texts that end in the vocabulary's largest token.

        Raises:
            UsageError: The texts are longer than the context.
        """
        ends = tokens.argmax(dim=1)
        x = self.states(self.embed(tokens), None if self.causal else ends)
        # Not len(x): that is a plain number, and an exported graph would know one batch size only.
        pooled = x[torch.arange(x.shape[0], device=x.device), ends]
        return self.projection(self.norm(pooled))

    def embed(self, tokens: Int[Tensor, "texts length"]) -> Float[Tensor, "texts length width"]:
        """Return what the blocks begin with: each token's vector and that of its position.

        Raises:
            UsageError: The texts are longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise UsageError(
                f"texts of {length} tokens exceed the context of {self.context_length}"
            )
        return self.token_embedding(tokens) + self.positional_embedding[:length]

    def states(
        self,
        x: Float[Tensor, "texts length width"],
        ends: Int[Tensor, " texts"] | None,
    ) -> Float[Tensor, "texts length width"]:
        """Return what the blocks make of embedded tokens, before the norm.

        Args:
            x: What `embed` returns.
            ends: Place of the last token of each text, up to which its tokens all see each other;
                None lets each see only those before it.
        """
        mask = None if ends is None else _up_to(ends, x.shape[1])
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # No dropout in here, so there is no random state to bring back.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask)
        return x


class _Block(nn.Module):
    """Attention and MLP, each on the norm of its input and added to it."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        num_layers: int,
        *,
        activation: Callable[[Tensor], Tensor],
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.activation = activation
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        # CLIP's initial weights: what the branches add shrinks with the depth.
        residual_std = (2 * width * num_layers) ** -0.5
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.proj.weight, std=residual_std)
        nn.init.normal_(self.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=residual_std)
        for layer in (self.qkv, self.proj):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "texts length width"],
        mask: Bool[Tensor, "texts 1 1 length"] | None,
    ) -> Float[Tensor, "texts length width"]:
        x = x + self._attention(self.norm1(x), mask)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attend = _attend_on_cpu if x.device.type == "cpu" else _attend
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # A causal flag instead of a causal mask: the fused kernels skip what it hides.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the same in plain operations.

    On texts of a dozen tokens the CPU's fused kernel takes as long in fp32, and ten times as long
    forward and backward in bf16.
    """
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).type_as(v) @ v


def _up_to(ends: Tensor, length: int) -> Bool[Tensor, "texts 1 1 length"]:
    # By position, not by token: padding is token 0, and so is the text "!".
    return (torch.arange(length, device=ends.device) <= ends[:, None])[:, None, None]


def trim(tokens: Int[Tensor, "texts context"]) -> Int[Tensor, "texts length"]:
    """Cut the padding that all texts of a batch share; reads one number from the device."""
    if len(tokens) == 0:
        return tokens
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


def deduplicate(
    tokens: Int[Tensor, "texts context"],
) -> tuple[Int[Tensor, "unique context"], Int[Tensor, "texts"]]:
    """Return the distinct rows, and for every text the row that it equals."""
    return torch.unique(tokens, dim=0, return_inverse=True)


def tokenize(texts: Sequence[str], context_length: int = 77) -> Int[Tensor, "texts context"]:
    """Turn texts into CLIP's tokens with start and end, padded with 0; longer texts are cut."""
    # A bare string is a sequence of strings too, its characters; it is meant as one text.
    texts = [texts] if isinstance(texts, str) else list(texts)
    return _tokenizer()(texts, context_length=context_length)


@functools.cache
def _tokenizer() -> "SimpleTokenizer":
    from open_clip.tokenizer import SimpleTokenizer  # reads its vocabulary: late, and once

    return SimpleTokenizer()


def from_open_clip(
    weights: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    causal: bool = True,
    activation: Activation = "gelu",
    norm_eps: float = 1e-5,
) -> TextTower:
    """Build the text tower that a state dict of open_clip holds.

    Args:
        weights: State dict of open_clip's `TextTransformer`, `CLIP` or `CustomTextCLIP`; what is
            not text is left aside.
        num_heads: Attention heads; unset means 64 channels each, as in all of CLIP's towers.
        causal: Whether the tower was trained with a causal mask.
        activation: What it was trained with; OpenAI's own models with "quick_gelu".
        norm_eps: What it was trained with.

    Raises:
        UsageError: A weight of a text tower is missing.
    """
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    own = {_own_name(k[len(prefix) :]): w for k, w in weights.items() if k.startswith(prefix)}
    num_layers = len([name for name in own if re.fullmatch(r"blocks\.\d+\.qkv\.weight", name)])
    try:
        context_length, width = own["positional_embedding"].shape
        own["projection.weight"] = own.pop("text_projection").T
        tower = TextTower(
            width=width,
            num_layers=num_layers,
            num_heads=num_heads or width // 64,
            mlp_width=len(own["blocks.0.fc1.bias"]),
            context_length=context_length,
            embed_dim=len(own["projection.weight"]),
            causal=causal,
            activation=activation,
            norm_eps=norm_eps,
            vocabulary_size=len(own["token_embedding.weight"]),
        )
        tower.load_state_dict({name: own[name] for name in tower.state_dict()})
    except KeyError as error:
        raise UsageError(
            f"not the weights of an open_clip text tower: {error} is missing"
        ) from None
    return tower


def to_open_clip(tower: TextTower) -> dict[str, Tensor]:
    """Return a tower's weights under the names and in the shapes of open_clip's text tower."""
    weights = tower.state_dict()
    projection = weights.pop("projection.weight")
    named = {_their_name(name): weight for name, weight in weights.items()}
    return {**named, "text_projection": projection.T}


_OWN_NAMES = {
    "transformer.resblocks.": "blocks.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "ln_final.": "norm.",
    "attn.in_proj_": "qkv.",
    "attn.out_proj.": "proj.",
    "mlp.c_fc.": "fc1.",
    "mlp.c_proj.": "fc2.",
}


def _own_name(name: str) -> str:
    for theirs, own in _OWN_NAMES.items():
        name = name.replace(theirs, own)
    return name


def _their_name(name: str) -> str:
    for theirs, own in _OWN_NAMES.items():
        name = name.replace(own, theirs)
    return name
