"""Overlapping convolutional embedding, CvT's (arXiv:2103.15808), as stem and between the stages.

Florence 2.3 puts it in place of Swin's patch embedding and patch merging, 2.6 in three dimensions.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class ConvShape(NamedTuple):
    """Kernel, stride and padding of a convolution, one integer per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


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
