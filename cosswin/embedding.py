"""Overlapping convolutional embedding, CvT's (arXiv:2103.15808), as stem and between the stages.

Florence 2.3 puts it in place of Swin's patch embedding and patch merging, 2.6 in three dimensions.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class ConvShape(NamedTuple):
    """Kernel, stride and padding of a convolution, one integer per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class _Convolution(_ConvNd):
    """A convolution that on a CPU makes one product of a small map.

    The library's own brings the kernel and its gradient into other layouts, which takes longer than
    the convolution of few places. A map's columns, each place's inputs in a row, are then smaller
    than the kernel, and multiply it as it lies. Late maps of short clips are as small.
    """

    def forward(self, x: Float[Tensor, "n c_in *size"]) -> Float[Tensor, "n c *map"]:
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and self._has_few_places(x):
            return self._multiply_columns(x)
        return super().forward(x)

    def _has_few_places(self, x: Tensor) -> bool:
        padding = cast(tuple[int, ...], self.padding)
        axes = zip(x.shape[2:], padding, self.kernel_size, self.stride, strict=True)
        places = math.prod((size + 2 * pad - k) // step + 1 for size, pad, k, step in axes)
        return x.shape[0] * places < self.out_channels

    def _multiply_columns(self, x: Tensor) -> Tensor:
        sides = [side for pad in cast(tuple[int, ...], self.padding)[::-1] for side in (pad, pad)]
        columns = F.pad(x, sides).movedim(1, -1)
        for axis, (kernel, stride) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            columns = columns.unfold(axis + 1, kernel, stride)
        columns = columns.flatten(x.ndim - 1)
        return F.linear(columns, self.weight.flatten(1), self.bias).movedim(-1, 1)


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


_CONVOLUTIONS: dict[int, type[_Conv2d] | type[_Conv3d]] = {2: _Conv2d, 3: _Conv3d}


class ConvEmbedding(nn.Module):
    """Convolution, then LayerNorm over the channels.

    The last two axes are space and padded with zeros. An axis before them is time, whose ends are
    repeated instead: a clip of one still image then gives the features of that image everywhere.
    The padding of time is how often the first frame is repeated; the last one is as often as it
    takes to give one step for each stride begun.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        shape: Kernel, stride and padding; their length is the number of dimensions.
    """

    def __init__(self, in_chans: int, out_chans: int, *, shape: ConvShape) -> None:
        super().__init__()
        dims = len(shape.kernel)
        if dims not in _CONVOLUTIONS or not len(shape.stride) == len(shape.padding) == dims:
            raise ValueError(f"kernel, stride and padding need 2 or 3 numbers each, got {shape}")
        self.shape = shape
        self.proj = _CONVOLUTIONS[
            dims
        ](
            in_chans,
            out_chans,
            shape.kernel,  # type: ignore[arg-type]
            stride=shape.stride,  # type: ignore[arg-type]
            padding=(*(0 for _ in shape.padding[:-2]), *shape.padding[-2:]),  # type: ignore[arg-type]
        )
        self.norm = nn.LayerNorm(out_chans)

    def forward(self, x: Float[Tensor, "n c_in *size"]) -> Float[Tensor, "n *map c"]:
        """Embed channels-first input into channels-last tokens."""
        self._check(x)
        if x.ndim == 5:
            x = self._repeat_ends(x)
        # With the channels last in memory the convolution is faster on images, and its output has
        # the layout that the norm wants; between stages the input has it already.
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return self.norm(self.proj(x.contiguous(memory_format=layout)).movedim(1, -1))

    def _repeat_ends(self, x: Float[Tensor, "n c t h w"]) -> Float[Tensor, "n c padded h w"]:
        frames = x.shape[2]
        kernel, stride, before = (numbers[0] for numbers in self.shape)
        steps = -(-frames // stride)
        after = (steps - 1) * stride + kernel - before - frames
        # Not by F.pad, which would copy a map into another layout first.
        parts = [x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * after
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def _check(self, x: Tensor) -> None:
        kernel, _, padding = self.shape
        size = tuple(x.shape[2:])
        if x.ndim != len(kernel) + 2 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"expected [n, {self.proj.in_channels}, *size] with {len(kernel)} axes of size, "
                f"got {list(x.shape)}"
            )
        space = list(zip(size, padding, kernel, strict=True))[-2:]
        if 0 in size or any(s + 2 * p < k for s, p, k in space):
            raise ValueError(f"an input of size {size} is too small for the kernel {kernel}")
