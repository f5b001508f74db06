"""A stage of CoSwin: Swin-V1 pre-norm blocks, then the embedding that leads to the next stage."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosswin.attention import WindowAttention
from cosswin.embedding import ConvEmbedding


class Block(nn.Module):
    """Window attention and an MLP, each with a norm before and a residual around it.

    Args:
        dim: Channels of the map.
        num_heads: Attention heads.
        window_size: The window, one integer per axis.
        shifted: Whether the windows are shifted by half their size.
        mlp_ratio: Hidden width of the MLP over `dim`.
        drop_path: Probability that a branch is skipped, per sample, in training.
        layer_scale: Initial value of one gain vector that multiplies both branches; None for none.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: tuple[int, ...],
        shifted: bool,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        shift = tuple(side // 2 if shifted else 0 for side in window_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads=num_heads, window_size=window_size, shift=shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Float[Tensor, "n *map c"]) -> Float[Tensor, "n *map c"]:
        """Add both branches to the map."""
        x = self._add(x, self.attn(self.norm1(x)))
        return self._add(x, self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + self.drop_path(branch)


class Stage(nn.Module):
    """Blocks at one resolution; every second one has shifted windows.

    Args:
        dim: Channels of the map.
        drop_paths: Drop-path rate of each block; their number is the stage's depth.
        num_heads: Attention heads.
        window_size: The window, one integer per axis.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        layer_scale: Initial LayerScale; None for none.
        downsample: The embedding that leads to the next stage; None in the last one.
    """

    def __init__(
        self,
        dim: int,
        *,
        drop_paths: Sequence[float],
        num_heads: int,
        window_size: tuple[int, ...],
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        downsample: ConvEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads=num_heads,
                window_size=window_size,
                shifted=index % 2 == 1,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                layer_scale=layer_scale,
            )
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "n *map c"]) -> Float[Tensor, "n *map c"]:
        """Run the blocks; the way to the next stage is `downsample`, which the model takes."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
