"""Anchors: one square per place of each level, and boxes as seen from them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Of the centre and of the logarithm of the sides, in shares of the anchor.
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# A side grows at most so far beyond its anchor's: exp() of a bad guess must stay finite.
_MAX_GROWTH = math.log(1000 / 16)


def anchor_boxes(
    sizes: list[tuple[int, int]], *, scale: float = 8.0, device: torch.device | None = None
) -> list[Float[Tensor, "_ 4"]]:
    """Return the anchors of each level, row by row: squares in the middle of their places.

    Args:
        sizes: Height and width of each level's map; level k has a stride of 8 * 2**k pixels.
        scale: Side of an anchor in strides.
        device: Where to make them.
    """
    levels = []
    for level, (height, width) in enumerate(sizes):
        stride = 8 * 2**level
        y = (torch.arange(height, device=device) + 0.5) * stride
        x = (torch.arange(width, device=device) + 0.5) * stride
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        half = scale * stride / 2
        levels.append(torch.cat([centres - half, centres + half], -1))
    return levels


def encode_boxes(
    boxes: Float[Tensor, "n 4"], anchors: Float[Tensor, "n 4"]
) -> Float[Tensor, "n 4"]:
    """Return boxes as seen from their anchors: shifts of the centre, logarithms of the sides."""
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    deltas = torch.cat(
        [(centres - anchor_centres) / anchor_sides, (sides / anchor_sides).log()], -1
    )
    return deltas * deltas.new_tensor(_WEIGHTS)


def decode_boxes(
    deltas: Float[Tensor, "n 4"], anchors: Float[Tensor, "n 4"]
) -> Float[Tensor, "n 4"]:
    """Return the boxes that `encode_boxes` has seen so; sides are at most 62.5 anchors long."""
    shifts, growths = (deltas / deltas.new_tensor(_WEIGHTS)).split(2, -1)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    centres = anchor_centres + shifts * anchor_sides
    halves = anchor_sides * growths.clamp(max=_MAX_GROWTH).exp() / 2
    return torch.cat([centres - halves, centres + halves], -1)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low
