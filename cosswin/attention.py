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

_WINDOWS_AT_ONCE = 1024
"""Windows times heads; 256 is as fast, and all heads at once are up to 10% slower in fp32."""


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
        num_heads = bias.shape[1]
        split = rearrange(qkv, "n area (three h d) -> three n h area d", three=3, h=num_heads)
        _, n, _, area, width = split.shape
        out = qkv.new_empty(n, area, num_heads, width)
        groups, saved = _head_groups(n, num_heads), []
        for group in groups:
            # Of a single head these are views, and nothing is copied before the products.
            q, k, v = (part[:, group].flatten(0, 1) for part in split)
            # A softmax in bfloat16 is less exact and slower than one in float32 with its casts.
            logits = torch.bmm(q, k.mT).to(bias.dtype).view(-1, *bias[:, group].shape)
            torch.add(bias[:, group], logits, alpha=width**-0.5, out=logits)
            weights = logits.softmax(-1).to(qkv.dtype).flatten(0, 2)
            out[:, :, group] = _by_window(torch.bmm(weights, v), group)
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.bias_shape, ctx.bias_dtype = groups, bias.shape, bias.dtype
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        grad = rearrange(grad, "n area (h d) -> n h area d", h=ctx.bias_shape[1])
        n, num_heads, area, width = grad.shape
        grad_qkv = grad.new_empty(n, area, 3, num_heads, width)
        grad_bias = grad.new_empty(ctx.bias_shape, dtype=ctx.bias_dtype)
        for index, group in enumerate(ctx.groups):
            q, k, v, weights = ctx.saved_tensors[4 * index : 4 * index + 4]
            grad_out = grad[:, group].flatten(0, 1)
            grad_weights = torch.bmm(grad_out, v.mT)
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            per_map = grad_logits.view(-1, *grad_bias[:, group].shape)
            # Adds up in float32; asked for its result in float32, it would copy all of its input.
            grad_bias[:, group] = per_map.sum(0)
            grad_logits.mul_(width**-0.5)
            grad_qkv[:, :, 0, group] = _by_window(torch.bmm(grad_logits, k), group)
            grad_qkv[:, :, 1, group] = _by_window(torch.bmm(grad_logits.mT, q), group)
            grad_qkv[:, :, 2, group] = _by_window(torch.bmm(weights.mT, grad_out), group)
        return grad_qkv.flatten(2), grad_bias


def _by_window(heads: Tensor, group: slice) -> Tensor:
    """Turn a group's [n_windows * heads, area, d] into [n_windows, area, heads, d]."""
    return heads.unflatten(0, (-1, group.stop - group.start)).transpose(1, 2)


def _head_groups(n_windows: int, num_heads: int) -> list[slice]:
    """Group the heads whose products are taken at once.

    Of few windows all of them, for each call costs something; of many windows one after another,
    so that a head's logits stay nearer to the cache.
    """
    size = max(1, _WINDOWS_AT_ONCE // max(1, n_windows))
    starts = range(0, num_heads, size)
    return [slice(start, min(start + size, num_heads)) for start in starts]
