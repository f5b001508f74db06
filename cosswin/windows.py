"""Windows over a map of any number of dimensions: partition, merge, attention mask, relative index.

Shifted windows of Swin (arXiv:2103.14030, section 3.2); Florence 2.6 uses them in three dimensions.
Maps are channels-last, `[n, *map, c]`, and a window, a shift, a map size is one integer per axis.
"""

import functools
import math
import operator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """How the tokens of one map are laid out in windows.

    A slot is a place in a window; the slots of all windows, in order, are numbered 0, 1, ...
    """

    map_size: tuple[int, ...]
    window: tuple[int, ...]
    """The window, shrunk to the map where it was larger."""
    num_windows: int
    tokens: Int[Tensor, " slots"]
    """The token in each slot; slots that hold padding name token 0."""
    slots: Int[Tensor, " tokens"]
    """The slot of each token."""
    padding: Bool[Tensor, "slots 1"] | None
    """Which slots hold no token; unset if none."""
    mask: Bool[Tensor, "windows area area"] | None
    """Which query (first) may see which key; unset if all may."""
    pairs: Int[Tensor, " pairs"]
    """The row of the bias table for each (query, key) pair of a window."""

    @property
    def area(self) -> int:
        """Slots in one window."""
        return math.prod(self.window)


def fit_window(
    map_size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shrink the window to the map, and drop the shift, on each axis where the map is no larger."""
    if not len(map_size) == len(window) == len(shift):
        raise ValueError(f"map {map_size}, window {window} and shift {shift} differ in dimensions")
    fits = [size <= side for size, side in zip(map_size, window, strict=True)]
    return (
        tuple(min(size, side) for size, side in zip(map_size, window, strict=True)),
        tuple(0 if fit else step for fit, step in zip(fits, shift, strict=True)),
    )


def window_layout(
    x: Float[Tensor, "n *map c"], window: tuple[int, ...], shift: tuple[int, ...]
) -> WindowLayout:
    """Lay the maps `x` out in windows; computed once per map size, window, shift and device.

    The map is padded at its end to whole windows, then rolled back by the shift. A token sees the
    tokens of its window that lie on its own side of the roll; padding sees only padding, and no
    token sees padding, so that a map's result does not depend on it.
    """
    map_size = tuple(x.shape[1:-1])
    # What is made while tracing, or of fake tensors, must not outlive its trace.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return _build_layout(map_size, window, shift, x.device)
    return _cached_layout(map_size, window, shift, x.device)


def partition(
    x: Float[Tensor, "n *map c"], layout: WindowLayout
) -> Float[Tensor, "n_windows area c"]:
    """Cut maps into windows, image by image; slots of padding are zero."""
    if x.shape[1:-1] != layout.map_size:
        raise ValueError(f"the layout is of a map {layout.map_size}, got {tuple(x.shape[1:-1])}")
    n, c = x.shape[0], x.shape[-1]
    rows = _Reorder.apply(
        x.reshape(-1, c),
        _batched(layout.tokens, n, layout.slots.numel()),
        _batched(layout.slots, n, layout.tokens.numel()),
        None if layout.padding is None else layout.padding.repeat(n, 1),
        None,
    )
    return rows.view(n * layout.num_windows, layout.area, c)


def merge(
    windows: Float[Tensor, "n_windows area c"], layout: WindowLayout
) -> Float[Tensor, "n *map c"]:
    """Put windows back into maps: the inverse of `partition`."""
    n, c = windows.shape[0] // layout.num_windows, windows.shape[-1]
    rows = _Reorder.apply(
        windows.reshape(-1, c),
        _batched(layout.slots, n, layout.tokens.numel()),
        _batched(layout.tokens, n, layout.slots.numel()),
        None,
        None if layout.padding is None else layout.padding.repeat(n, 1),
    )
    return rows.view(n, *layout.map_size, c)


class _Reorder(torch.autograd.Function):
    """Roll, pad and cut in one copy of rows; its gradient is one copy too, not a scattered sum."""

    @staticmethod
    def forward(
        rows: Tensor,
        there: Tensor,
        back: Tensor,
        there_holes: Tensor | None,
        back_holes: Tensor | None,
    ) -> Tensor:
        out = rows.index_select(0, there)
        return out if there_holes is None else out.masked_fill_(there_holes, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, *indices = inputs
        ctx.save_for_backward(*indices)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        there, back, there_holes, back_holes = ctx.saved_tensors
        return _Reorder.apply(grad, back, there, back_holes, there_holes), None, None, None, None


def _batched(index: Tensor, n: int | torch.SymInt, stride: int) -> Tensor:
    """Repeat an index over one map for `n` maps that lie `stride` rows apart."""
    starts = torch.arange(0, n * stride, stride, device=index.device)
    return (starts[:, None] + index).flatten()


def _build_layout(
    map_size: tuple[int, ...],
    table_window: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
) -> WindowLayout:
    window, shift = fit_window(map_size, table_window, shift)
    counts = tuple(-(-size // side) for size, side in zip(map_size, window, strict=True))
    padded = tuple(count * side for count, side in zip(counts, window, strict=True))
    area = math.prod(window)

    rolled = [p + step for p, step in zip(_axes(padded, device), shift, strict=True)]
    places = [p % side for p, side in zip(rolled, padded, strict=True)]
    real = functools.reduce(
        operator.and_, (place < size for place, size in zip(places, map_size, strict=True))
    )
    token = torch.where(real, _flat(places, map_size), 0)
    wrapped = [(p >= side).long() for p, side in zip(rolled, padded, strict=True)]
    region = _cut(torch.where(real, _flat(wrapped, (2,) * len(window)), -1), window, counts)

    places = [
        (p - step) % side
        for p, step, side in zip(_axes(map_size, device), shift, padded, strict=True)
    ]
    slots = _flat([p // side for p, side in zip(places, window, strict=True)], counts) * area
    slots = slots + _flat([p % side for p, side in zip(places, window, strict=True)], window)

    sides = tuple(2 * side - 1 for side in table_window)
    inside = [p.expand(window).flatten() for p in _axes(window, device)]
    offsets = [p[:, None] - p + side - 1 for p, side in zip(inside, table_window, strict=True)]
    return WindowLayout(
        map_size=map_size,
        window=window,
        num_windows=math.prod(counts),
        tokens=_cut(token, window, counts).flatten(),
        slots=slots.flatten(),
        padding=None if padded == map_size else ~_cut(real, window, counts).view(-1, 1),
        mask=region[:, :, None] == region[:, None] if any(shift) or padded != map_size else None,
        pairs=_flat(offsets, sides).flatten(),
    )


def _axes(sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Return each axis's coordinates, shaped to broadcast over the grid."""
    dims = len(sizes)
    return [
        torch.arange(size, device=device).view([-1 if axis == own else 1 for axis in range(dims)])
        for own, size in enumerate(sizes)
    ]


def _flat(coordinates: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """Number the cells of a grid of `sizes`, the last axis fastest."""
    number = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        number = number * size + coordinate
    return number


def _cut(grid: Tensor, window: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """Cut a grid of whole windows into rows, one a window."""
    dims = len(window)
    for axis in reversed(range(dims)):
        grid = grid.unflatten(axis, (counts[axis], window[axis]))
    order = [*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)]
    return grid.permute(order).reshape(math.prod(counts), math.prod(window))


@functools.lru_cache(maxsize=64)
def _cached_layout(
    map_size: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
) -> WindowLayout:
    # What a first call under inference_mode made could not be used in training afterwards.
    with torch.inference_mode(False):
        return _build_layout(map_size, window, shift, device)
