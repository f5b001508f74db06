"""Towers of open_clip as modules of ours, or ours in place of a text tower that it equals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from unicl.errors import UsageError
from unicl.towers.text import Activation, TextTower, from_open_clip

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer


class OpenClipImageTower(nn.Module):
    """Images into image features by open_clip's own image tower.

    Its last projection becomes a module of its own, where it is not part of the pooling.

    Args:
        visual: The image tower of an open_clip model, which is taken over.
        name: What the model is called, for the errors.
        config: The model's configuration in open_clip's words, and with it the text tower's.
        preprocess: Its preprocessing in open_clip's words; bytes are normalised by its mean and
            standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        *,
        name: str,
        config: Mapping[str, Any],
        preprocess: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.projection = _take_projection(visual)
        self.visual: Any = visual
        self.name = name
        self.config = dict(config)
        self.preprocess = dict(preprocess)
        for statistic in ("mean", "std"):
            buffer = 255 * torch.tensor(preprocess[statistic])[:, None, None]
            self.register_buffer(statistic, buffer, persistent=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them.

        Raises:
            UsageError: The model cannot do that.
        """
        # open_clip's wrapper of timm's models turns their refusal into a log line, and its ResNets
        # do nothing at all.
        model = getattr(self.visual, "trunk", self.visual)
        able = hasattr(self.visual, "trunk") or hasattr(self.visual, "transformer")
        try:
            if not able:
                raise AttributeError
            model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):
            raise UsageError(
                f"image_tower.checkpointing has no effect on {self.name}; leave it out"
            ) from None

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer: by timm's groups, or by those that open_clip locks.

        Raises:
            UsageError: The model has no such groups.
        """
        trunk: Any = getattr(self.visual, "trunk", None)
        names = [name for name, _ in self.named_parameters()]
        if hasattr(trunk, "group_matcher"):
            within = [name.removeprefix("visual.trunk.") for name in names if ".trunk." in name]
            top = "<head>"  # no rule matches it
            named = iter([(name, None) for name in (*within, top)])
            depths = group_with_matcher(named, trunk.group_matcher(), reverse=True)
            head = depths.pop(top)
            return {name: depths.get(name.removeprefix("visual.trunk."), head) for name in names}
        if not hasattr(self.visual, "transformer"):
            raise UsageError(f"optimizer.layer_decay has no effect on {self.name}; leave it out")
        bottom = ("conv1.", "class_embedding", "positional_embedding", "ln_pre.")
        return _block_depths(names, "visual.", bottom=bottom, last=("ln_post.",))

    def forward(
        self, images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch embed_dim"]:
        """Return image features; bytes are normalised first, floats are taken as they are."""
        return self.projection(self.pool(images))

    def pool(
        self, images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch width"]:
        """Return the features before the projection: what a linear probe looks at."""
        if not images.is_floating_point():
            images = images.to(self.mean.dtype).sub_(self.mean).div_(self.std)
        return _pooled(self.visual(images))

    def open_clip_state(self) -> dict[str, Tensor]:
        """Return the weights under the names of the tower that was taken over."""
        weights = self.visual.state_dict()
        if isinstance(self.projection, nn.Linear):
            return weights | {"proj": self.projection.weight.detach().T}
        return weights | {f"head.{name}": w for name, w in self.projection.state_dict().items()}


class OpenClipTextTower(nn.Module):
    """Tokens into text features by open_clip's own text tower, where ours does not equal it.

    Args:
        text: The text tower of an open_clip model, projection included.
        name: What the model is called, for the errors.
    """

    trims = False
    """Padding counts: some pool the last position, some have another token at the end."""

    def __init__(self, text: nn.Module, *, name: str) -> None:
        super().__init__()
        self.text: Any = text
        self.name = name

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them."""
        self.text.set_grad_checkpointing(enable)

    def layer_depths(self) -> dict[str, int]:
        """Number each parameter's layer: embeddings, blocks, and on top norm and projection.

        Raises:
            UsageError: The tower is not open_clip's own, so its blocks are not known.
        """
        names = [name for name, _ in self.named_parameters()]
        if not any(name.startswith("text.transformer.resblocks.") for name in names):
            raise UsageError(f"optimizer.layer_decay has no effect on {self.name}; leave it out")
        bottom = ("token_embedding.", "positional_embedding", "cls_emb")
        return _block_depths(names, "text.", bottom=bottom)

    def forward(self, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts embed_dim"]:
        """Return text features."""
        return _pooled(self.text(tokens))


def own_text_tower(text: nn.Module) -> TextTower | None:
    """Build ours, which is faster, with the weights of a text tower that is CLIP's causal one."""
    from open_clip.transformer import TextTransformer

    if not isinstance(text, TextTransformer) or not (activation := _plain_activation(text)):
        return None
    return from_open_clip(
        text.state_dict(),
        num_heads=text.heads,
        activation=activation,
        norm_eps=text.ln_final.eps,
    )


def _plain_activation(text: "TextTransformer") -> Activation | None:
    """Return the activation of a text tower that has nothing which ours has not."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    blocks: list[Any] = list(text.transformer.resblocks)
    plain = (
        text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type == "argmax"
        and isinstance(text.text_projection, nn.Parameter)
        and all(type(block) is ResidualAttentionBlock for block in blocks)
        and all(isinstance(block.ls_1, nn.Identity) for block in blocks)
    )
    kinds = {(type(block.mlp.gelu), getattr(block.mlp.gelu, "approximate", "")) for block in blocks}
    if not plain or len(kinds) != 1:
        return None
    known: dict[Any, Activation] = {(nn.GELU, "none"): "gelu", (QuickGELU, ""): "quick_gelu"}
    return known.get(kinds.pop())


def _block_depths(
    names: Sequence[str], prefix: str, *, bottom: tuple[str, ...], last: tuple[str, ...] = ()
) -> dict[str, int]:
    """Number the parameters of a transformer of open_clip: bottom 0, blocks from 1 on, rest top.

    `last` belongs to the last block.
    """
    blocks = f"{prefix}transformer.resblocks."
    number = {
        name: int(name[len(blocks) :].split(".")[0]) for name in names if name.startswith(blocks)
    }
    top = max(number.values()) + 2
    depths = {}
    for name in names:
        within = name.removeprefix(prefix)
        if name in number:
            depths[name] = number[name] + 1
        else:
            depths[name] = 0 if within.startswith(bottom) else top - within.startswith(last or "\n")
    return depths


def _take_projection(visual: Any) -> nn.Module:
    """Take the last projection out of an image tower; nothing where it is part of its pooling."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        weight, visual.proj = visual.proj.detach().T.contiguous(), None
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        projection.weight.data = weight
        return projection
    if hasattr(visual, "trunk") and not hasattr(visual.head, "pool"):
        projection, visual.head = visual.head, nn.Identity()
        return projection
    return nn.Identity()


def _pooled(output: Any) -> Tensor:
    # Towers that also feed a decoder (CoCa) return their tokens, too.
    return output[0] if isinstance(output, tuple) else output
