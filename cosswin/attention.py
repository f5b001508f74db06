"""Window attention with a learned relative position bias (Swin, arXiv:2103.14030, equation 4)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cosswin.windows import WindowLayout, merge, partition, window_layout


class WindowAttention(nn.Module):
    """Multi-head self-attention within the windows of a map.

    Args:
        dim: Channels of the map.
        num_heads: Attention heads; must divide `dim`.
        window_size: The window, one integer per axis; a smaller map shrinks it.
        shift: How far the windows are shifted on each axis.
    """

    def __init__(
        self, dim: int, *, num_heads: int, window_size: tuple[int, ...], shift: tuple[int, ...]
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        rows = math.prod(2 * side - 1 for side in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Float[Tensor, "n *map c"]) -> Float[Tensor, "n *map c"]:
        """Attend within each window of each map."""
        layout = window_layout(x, self.window_size, self.shift)
        if torch.is_autocast_enabled(x.device.type):
            # The projection would cast the windows; cast before, the copy moves half the bytes.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        qkv = self.qkv(partition(x, layout))
        bias = self.position_bias(layout)[None]
        if layout.mask is not None:
            bias = torch.where(layout.mask[:, None], bias, -torch.inf)
        attend = _attend_fused
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            attend = _ExplicitAttention.apply
        return self.proj(merge(attend(qkv, bias), layout))

    def position_bias(self, layout: WindowLayout) -> Float[Tensor, "heads area area"]:
        """Return the bias of each (query, key) pair of a window."""
        # An embedding's backward sums in a fixed order, which indexing's does not.
        rows = F.embedding(layout.pairs, self.relative_position_bias_table)
        # Contiguous, for the sum with the logits runs over it once per window.
        return rows.t().contiguous().view(self.num_heads, layout.area, layout.area)


def _attend_fused(
    qkv: Float[Tensor, "n_windows area qkv"], bias: Float[Tensor, "windows heads area area"]
) -> Float[Tensor, "n_windows area c"]:
    """Attend within windows whose kinds of bias repeat, once per map."""
    windows, heads, *_ = bias.shape
    # Windows count as heads, so that one bias per window serves the whole batch unexpanded.
    q, k, v = rearrange(
        qkv, "(n w) area (three h d) -> three n (w h) area d", three=3, w=windows, h=heads
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))
    return rearrange(out, "n (w h) area d -> (n w) area (h d)", w=windows)


class _ExplicitAttention(torch.autograd.Function):
    """`_attend_fused` for the CPU, where torch has no fused kernel with a gradient for the bias.

    What it runs instead, and its fused kernel without gradients too, take about twice as long on
    small windows as these batched products.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        heads = rearrange(
            qkv, "n area (three h d) -> three (n h) area d", three=3, h=bias.shape[1]
        ).contiguous()
        q, k, v = heads
        q.mul_(q.shape[-1] ** -0.5)
        # A softmax in bfloat16 is both less exact and slower than one in float32 with its casts.
        logits = torch.bmm(q, k.transpose(1, 2)).to(bias.dtype)
        logits.view(-1, *bias.shape).add_(bias)
        weights = logits.softmax(-1).to(qkv.dtype)
        ctx.save_for_backward(heads, weights)
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return rearrange(torch.bmm(weights, v), "(n h) area d -> n area (h d)", h=bias.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        heads, weights = ctx.saved_tensors
        q, k, v = heads
        num_heads = ctx.bias_shape[1]
        grad = rearrange(grad, "n area (h d) -> (n h) area d", h=num_heads)
        grad_heads = torch.empty_like(heads)
        torch.bmm(weights.transpose(1, 2), grad, out=grad_heads[2])
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        torch.bmm(grad_logits, k, out=grad_heads[0]).mul_(q.shape[-1] ** -0.5)
        torch.bmm(grad_logits.transpose(1, 2), q, out=grad_heads[1])
        grad_qkv = rearrange(grad_heads, "three (n h) area d -> n area (three h d)", h=num_heads)
        return grad_qkv, grad_logits.view(-1, *ctx.bias_shape).sum(0, dtype=ctx.bias_dtype)
