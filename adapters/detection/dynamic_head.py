"""Dynamic Head (Dai et al. 2021): the three attentions of Florence's object-level adapter (2.4)."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapters.detection.deformable import Sampling, by_tap
from unicl.errors import UsageError

_GROUPS = 16
_REDUCTION = 4


class DynamicHead(nn.Module):
    """Blocks of scale-, spatial- and task-aware attention over the levels of a pyramid.

    The paper's figure brings all levels to one size, as a tensor level x place x channel, and takes
    the attentions in the order scale, spatial, task. The released code builds no such tensor: at
    each level a block reads that level and its two neighbours by deformable convolutions (spatial),
    weighs the three (scale), and ends with a dynamic ReLU (task). This is the latter.

    Parameters are named as in the released code (microsoft/DynamicHead), so a loader has to cut off
    no more than what stands before `dyhead_tower`.

    Args:
        channels: Channels of every level, a multiple of 16.
        num_blocks: Blocks; 6 in the paper.
        released_offsets: Read the coarser neighbour as the released code does, whose offsets there
            are the first values of a buffer that was made for a larger map. Only for weights that
            were trained that way.
        checkpointing: Recompute each block's activations in the backward pass.

    Raises:
        UsageError: The channels do not divide into the groups of the norm.
    """

    def __init__(
        self,
        channels: int = 256,
        num_blocks: int = 6,
        *,
        released_offsets: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or channels % _GROUPS:
            raise UsageError(
                f"a Dynamic Head needs a multiple of {_GROUPS} channels, got {channels}"
            )
        self.checkpointing = checkpointing
        self.dyhead_tower = nn.ModuleList(
            DynamicHeadBlock(channels, released_offsets=released_offsets) for _ in range(num_blocks)
        )

    def forward(self, levels: list[Float[Tensor, "n c _ _"]]) -> list[Float[Tensor, "n c _ _"]]:
        """Return levels of the same sizes.

        Args:
            levels: The maps of a pyramid, finest first, each half as large as the one before it,
                rounded up.

        Raises:
            ValueError: A level has another size.
        """
        _check_sizes(levels)
        for block in self.dyhead_tower:
            if self.checkpointing and torch.is_grad_enabled():
                levels = checkpoint(block, levels, use_reentrant=False, preserve_rng_state=False)
            else:
                levels = block(levels)
        return levels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, or keep them."""
        self.checkpointing = enable


class DynamicHeadBlock(nn.Module):
    """One block; all levels share its weights.

    Args:
        channels: Channels of every level.
        released_offsets: As in `DynamicHead`.
    """

    def __init__(self, channels: int, *, released_offsets: bool = False) -> None:
        super().__init__()
        self.released_offsets = released_offsets
        # The convolutions of the coarser level, of this one and of the finer one, in that order.
        self.DyConv = nn.ModuleList(DeformConvNorm(channels) for _ in range(3))
        attention = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(attention.weight, std=0.01)
        nn.init.zeros_(attention.bias)  # type: ignore[arg-type]
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), attention, nn.ReLU())
        self.relu = DynamicReLU(channels)
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)

    def forward(self, levels: list[Float[Tensor, "n c _ _"]]) -> list[Float[Tensor, "n c _ _"]]:
        """Mix every level with its neighbours."""
        # Sampling reads whole pixels; this is also what convolutions are fastest with.
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        # Once for all levels.
        kernels = [by_tap(cast(DeformConvNorm, each).conv.weight) for each in self.DyConv]
        return [self._level(levels, index, kernels) for index in range(len(levels))]

    def _level(self, levels: Sequence[Tensor], index: int, kernels: Sequence[Tensor]) -> Tensor:
        level = levels[index]
        offset, mask = self.offset(level).split([18, 9], dim=1)
        mask = mask.sigmoid()
        here = Sampling(offset, mask, size=_size(level))
        coarser, own, finer = (
            partial(cast(DeformConvNorm, conv), kernel)
            for conv, kernel in zip(self.DyConv, kernels, strict=True)
        )
        sources = [own(here, level)]
        if index > 0:
            below = levels[index - 1]
            sources.append(finer(Sampling(offset, mask, size=_size(below), stride=2), below))
        if index < len(levels) - 1:
            above = levels[index + 1]
            if self.released_offsets:
                there = _first_values(offset, mask, _size(above))
                read = F.interpolate(
                    coarser(there, above), size=_size(level), mode="bilinear", align_corners=True
                )
            else:
                read = coarser(here, above)
            sources.append(read)
        weighed = [
            source * (_hard_sigmoid(self.AttnConv(source)) / len(sources)) for source in sources
        ]
        return self.relu(sum(weighed[1:], weighed[0]))


class DeformConvNorm(nn.Module):
    """A deformable convolution and the norm after it.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Holds the weights and their start; its places come from outside.
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.GroupNorm(_GROUPS, channels)

    def forward(
        self,
        kernel: Float[Tensor, "c c 3 3"],
        sampling: Sampling,
        x: Float[Tensor, "n c h w"],
    ) -> Float[Tensor, "n c ho wo"]:
        """Read a map where `sampling` says, with the weights as `by_tap` lays them out."""
        return self.bn(sampling.conv(x, kernel, self.conv.bias))


class DynamicReLU(nn.Module):
    """The larger of two lines, drawn for each channel of each image (Chen et al. 2020, DY-ReLU-B).

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // _REDUCTION
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4 * channels)
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Apply them; at the start they are near those of a ReLU."""
        parts = _hard_sigmoid(self.fc(x.mean((2, 3)))) - 0.5
        slope, intercept, slope2, intercept2 = parts[:, :, None, None].chunk(4, dim=1)
        # The larger line as one of them and what the other is above it: fewer passes than maximum's
        # gradient takes.
        above = F.relu(x * (2 * (slope - slope2) + 1) + (intercept - intercept2))
        return x * (2 * slope2) + intercept2 + above


def _hard_sigmoid(x: Tensor) -> Tensor:
    # Precise under autocast, too: what it scales stays so.
    return F.hardsigmoid(x.float() if x.dtype.itemsize < 4 else x)


def _first_values(offset: Tensor, mask: Tensor, size: tuple[int, int]) -> Sampling:
    """Take each image's first offsets and gains, in memory's order, for a smaller map."""
    n, places = len(offset), size[0] * size[1]
    return Sampling(
        offset.flatten(1)[:, : 18 * places].view(n, 18, *size),
        mask.flatten(1)[:, : 9 * places].view(n, 9, *size),
        size=size,
    )


def _size(level: Tensor) -> tuple[int, int]:
    return level.shape[2], level.shape[3]


def _check_sizes(levels: Sequence[Tensor]) -> None:
    for below, above in pairwise(levels):
        half = tuple((side + 1) // 2 for side in _size(below))
        if _size(above) != half:
            raise ValueError(
                f"a level of {_size(below)} is followed by one of {_size(above)}, not of {half}"
            )
