import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosswin.windows import fit_window, merge, partition, window_layout


@st.composite
def cases(draw):
    """Draw a map size, a window and a shift of two or three dimensions."""
    dims = draw(st.sampled_from([2, 3]))
    most = 9 if dims == 2 else 5
    sizes, sides, steps = [], [], []
    for _ in range(dims):
        sizes.append(draw(st.integers(1, most)))
        sides.append(draw(st.integers(1, 5)))
        steps.append(draw(st.integers(0, sides[-1] - 1)))
    return tuple(sizes), tuple(sides), tuple(steps)


def _coordinates(size):
    """Return a map whose channels are each token's own coordinates, counted from one."""
    axes = [torch.arange(1.0, side + 1) for side in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 3), st.integers(0, 2**31))
def test_merge_undoes_partition(case, n, seed):
    size, window, shift = case
    x = torch.randn(n, *size, 2, generator=torch.Generator().manual_seed(seed))
    layout = window_layout(x, window, shift)
    windows = partition(x, layout)
    assert windows.shape == (n * layout.num_windows, math.prod(layout.window), 2)
    assert torch.equal(merge(windows, layout), x)
    assert windows.sum().item() == pytest.approx(x.sum().item(), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_mask_allows_what_the_definition_allows(case):
    """Two tokens see each other iff the shifted grid puts them into one cell; none sees padding."""
    size, window, shift = case
    x = _coordinates(size)[None]
    layout = window_layout(x, window, shift)
    sides, steps = fit_window(size, window, shift)
    windows = partition(x, layout)
    real = (windows > 0).all(-1)
    assert real.sum() == math.prod(size)

    cell = torch.floor((windows - 1 - torch.tensor(steps)) / torch.tensor(sides))
    same = (cell[:, :, None] == cell[:, None]).all(-1) & real[:, :, None] & real[:, None]
    if layout.mask is None:
        assert same.all()
        return
    both_real = real[:, :, None] & real[:, None]
    assert torch.equal(layout.mask & both_real, same)
    assert not (layout.mask & (real[:, :, None] != real[:, None])).any()
    assert layout.mask.any(-1).all(), "a query that sees nothing has no softmax"


@settings(max_examples=60, deadline=None)
@given(cases())
def test_bias_rows_follow_the_full_window(case):
    """A clamped window uses the rows that the same offsets have in the full window."""
    size, window, shift = case
    x = _coordinates(size)[None]
    layout = window_layout(x, window, shift)
    inside = _coordinates(layout.window).flatten(0, -2)
    offsets = (inside[:, None] - inside).long() + torch.tensor(window) - 1
    expected = torch.zeros(offsets.shape[:-1], dtype=torch.long)
    for axis, side in enumerate(window):
        expected = expected * (2 * side - 1) + offsets[..., axis]
    assert torch.equal(layout.pairs.view_as(expected), expected)
    assert layout.pairs.max() < math.prod(2 * side - 1 for side in window)


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_gradients_are_the_inverse_copies(case, seed):
    size, window, shift = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *size, 1, generator=generator, dtype=torch.double, requires_grad=True)
    layout = window_layout(x, window, shift)
    windows = partition(x, layout)
    weight = torch.randn(windows.shape, generator=generator, dtype=torch.double)
    (grad,) = torch.autograd.grad((windows * weight).sum(), x)
    assert torch.equal(grad, merge(weight, layout))

    slots = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad((merge(slots, layout) * x.detach()).sum(), slots)
    assert torch.equal(grad, partition(x.detach(), layout))


def test_double_backward():
    x = torch.randn(1, 5, 4, 2, dtype=torch.double, requires_grad=True)
    layout = window_layout(x, (3, 2), (1, 1))
    assert torch.autograd.gradgradcheck(lambda x: merge(partition(x, layout) ** 2, layout), x)


def test_layout_is_built_once():
    x = torch.randn(1, 10, 6, 2)
    assert window_layout(x, (4, 4), (2, 2)) is window_layout(x * 2, (4, 4), (2, 2))
    assert window_layout(x, (4, 4), (2, 2)) is not window_layout(x, (4, 4), (0, 0))


def test_fit_window_clamps_axis_by_axis():
    assert fit_window((8, 4, 3), (4, 4, 4), (2, 2, 2)) == ((4, 4, 3), (2, 0, 0))


def test_wrong_dimensions_and_wrong_map_are_named():
    x = torch.randn(1, 8, 8, 2)
    with pytest.raises(ValueError, match="differ in dimensions"):
        window_layout(x, (4, 4, 4), (0, 0, 0))
    with pytest.raises(ValueError, match=r"a map \(8, 8\), got \(4, 8\)"):
        partition(x[:, :4], window_layout(x, (4, 4), (0, 0)))
