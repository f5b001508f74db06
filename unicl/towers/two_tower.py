"""Two towers and the learned scale between them (Florence, section 2.2)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from unicl.errors import UsageError
from unicl.towers.image import BACKBONE, backbone_weights, carry_backbone
from unicl.towers.text import deduplicate, trim

_POSITIONS = "text.positional_embedding"

Images = UInt8[Tensor, "batch *shape"] | Float[Tensor, "batch *shape"]
"""Bytes or floats [batch, channels, height, width], or what else the image tower takes."""


class TwoTower(nn.Module):
    """Images and texts into unit-length fp32 embeddings of one space.

    Args:
        image_tower: Images into features.
        text_tower: Tokens into features of the same width.
        initial_scale: Factor of the similarities at step 0; CLIP's is 1 / 0.07.
        max_scale: Largest factor; the parameter may lie a little above, `scale` never does.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        *,
        initial_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if not 0 < initial_scale <= max_scale:
            raise UsageError(f"initial_scale must lie in (0, {max_scale}], got {initial_scale}")
        self.image = image_tower
        self.text = text_tower
        self.max_scale = max_scale
        # One element in a vector: neither ZeRO nor FSDP takes parameters without axes.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))
        self._locked: list[str] = []

    def lock(self, tower: Literal["image", "text"]) -> None:
        """Keep a tower as it is (LiT, Zhai et al. 2022): no gradient, and eval mode for good."""
        self._locked.append(tower)
        getattr(self, tower).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TwoTower":
        """Switch between training and evaluation; locked towers know evaluation only."""
        super().train(mode)
        for tower in self._locked:
            getattr(self, tower).eval()
        return self

    def encode_image(self, images: Images) -> Float[Tensor, "batch dim"]:
        """Return the unit-length embeddings of images."""
        return _unit_length(self.image(images))

    def encode_image_twice(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch width"]]:
        """Return the unit-length embeddings of images, and the features they are projected from.

        The latter are what a linear probe looks at; a tower without such takes what it has last.
        """
        tower: Any = self.image
        if not hasattr(tower, "pool"):
            features = tower(images)
            return _unit_length(features), features.float()
        pooled = tower.pool(images)
        return _unit_length(tower.projection(pooled)), pooled.float()

    def encode_text(
        self,
        tokens: Int[Tensor, "batch context"],
        economies: bool = True,
        *,
        deduplicated: bool = False,
    ) -> Float[Tensor, "batch dim"]:
        """Return the unit-length embeddings of texts.

        Args:
            tokens: Padded texts, as `tokenize` makes them.
            economies: Encode equal texts once, and no padding that all of them share; changes
                neither values nor gradients, but for the last bits.
            deduplicated: The texts are known to differ, so no time goes into comparing them.
        """
        if not economies:
            return _unit_length(self.text(tokens))
        if getattr(self.text, "trims", True):  # open_clip's towers may need the padding
            tokens = trim(tokens)
        if deduplicated:
            return _unit_length(self.text(tokens))
        unique, inverse = deduplicate(tokens)
        return _unit_length(self.text(unique))[inverse]

    def scale(self) -> Float[Tensor, ""]:
        """Return the factor of the similarities: exp(logit_scale), at most `max_scale`, in fp32."""
        return _BoundedExp.apply(self.logit_scale.float(), self.max_scale)[0]

    def forward(
        self,
        images: Images,
        tokens: Int[Tensor, "texts context"],
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "texts dim"], Float[Tensor, ""]]:
        """Return image embeddings, text embeddings and scale: what the loss takes."""
        return self.encode_image(images), self.encode_text(tokens), self.scale()


def carry_model(
    weights: Mapping[str, Tensor], model: TwoTower, *, source: Path
) -> dict[str, Tensor]:
    """Carry a whole model's weights to another image size, window and context length.

    Texts that fit both contexts keep their features: positions keep their vectors, and those that
    are new start with what `model` has there. What else differs is left as it is.

    Args:
        weights: State dict of a `TwoTower` with an `ImageTower` and a `TextTower`.
        model: What is to take them; it is not changed.
        source: Where they are from, for the errors.

    Raises:
        UsageError: The image tower is of another architecture, or there is none.
    """
    backbone = backbone_weights(weights)
    if not backbone:
        raise UsageError(f"{source} has no whole model's weights: it lacks image.backbone.*")
    image: Any = model.image
    backbone = carry_backbone(backbone, image.backbone, source=source)
    carried = {k: w for k, w in weights.items() if not k.startswith(BACKBONE)}
    carried |= {BACKBONE + k: w for k, w in backbone.items()}
    old, new = carried.get(_POSITIONS), model.state_dict()[_POSITIONS].clone()
    if old is not None and old.shape[1:] == new.shape[1:]:
        kept = min(len(old), len(new))
        new[:kept] = old[:kept]
        carried[_POSITIONS] = new
    return carried


class _BoundedExp(torch.autograd.Function):
    """min(exp(x), limit) that can be left downwards.

    `clamp` has no gradient above the limit: a scale that an optimizer's momentum carried over it
    would stay there for good. Passing every gradient instead lets the parameter climb on unseen,
    and later walk all the way back. So at the limit only gradients that lead down pass, as if the
    parameter were clamped after each step, but without anybody reaching into the optimizer's
    master weights (where a clamped bf16 copy is overwritten).

    The choice looks at a sign, so it needs the gradient of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        """Return min(exp(x), limit)."""
        scale = x.exp().clamp(max=limit)
        ctx.save_for_backward(scale)
        ctx.limit = limit
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Drop what would raise x further: descent subtracts the gradient, so negative ones."""
        (scale,) = ctx.saved_tensors
        rises = (scale >= ctx.limit) & (grad < 0)
        return torch.where(rises, torch.zeros_like(grad), grad * scale), None


def _unit_length(features: Tensor) -> Tensor:
    # Half precision would leave lengths that differ by 1% from one.
    return F.normalize(features.float(), dim=-1)
