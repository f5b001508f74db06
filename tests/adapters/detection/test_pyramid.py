import pytest
import timm
import torch
from torch.nn import functional as F

import cosswin  # noqa: F401 - registers its models
from adapters.detection.pyramid import FeaturePyramid, level_sizes
from unicl.errors import UsageError

IN_CHANNELS = (16, 24, 40)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _maps(height, width):
    """Channels first, but last in memory."""
    sizes = level_sizes(height, width, 3)
    return [
        torch.randn(2, *size, count).movedim(-1, 1)
        for size, count in zip(sizes, IN_CHANNELS, strict=True)
    ]


def _conv(pyramid, name, x, **settings):
    state = pyramid.state_dict()
    return F.conv2d(x, state[f"fpn.{name}.weight"], state[f"fpn.{name}.bias"], **settings)


def _reference(pyramid, maps, num_levels):
    state = pyramid.state_dict()
    normed = [
        F.layer_norm(
            each.permute(0, 2, 3, 1),
            each.shape[1:2],
            state[f"norms.{k}.weight"],
            state[f"norms.{k}.bias"],
        ).permute(0, 3, 1, 2)
        for k, each in enumerate(maps)
    ]
    merged = [_conv(pyramid, f"inner_blocks.{k}.0", each) for k, each in enumerate(normed)]
    for k in (1, 0):
        merged[k] = merged[k] + F.interpolate(merged[k + 1], size=merged[k].shape[2:])
    levels = [
        _conv(pyramid, f"layer_blocks.{k}.0", each, padding=1) for k, each in enumerate(merged)
    ]
    if num_levels > 3:
        levels.append(_conv(pyramid, "extra_blocks.p6", levels[-1], stride=2, padding=1))
    if num_levels > 4:
        levels.append(_conv(pyramid, "extra_blocks.p7", levels[-1].relu(), stride=2, padding=1))
    return levels


@pytest.mark.parametrize("num_levels", [3, 4, 5])
@pytest.mark.parametrize("size", [(64, 96), (57, 97)])
def test_levels_are_those_written_out(num_levels, size):
    pyramid = FeaturePyramid(IN_CHANNELS, 32, num_levels=num_levels)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.normal_(std=0.2)
        maps = _maps(*size)
        levels = pyramid(maps)
        expected = _reference(pyramid, maps, num_levels)
    assert [tuple(level.shape[2:]) for level in levels] == level_sizes(*size, num_levels)
    for ours, theirs in zip(levels, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_levels", [3, 4, 5])
def test_gradients_reach_every_parameter_and_map(num_levels):
    pyramid = FeaturePyramid(IN_CHANNELS, 32, num_levels=num_levels)
    maps = [each.requires_grad_() for each in _maps(70, 50)]
    sum(level.square().sum() for level in pyramid(maps)).backward()
    for tensor in [*pyramid.parameters(), *maps]:
        assert tensor.grad is not None
        assert tensor.grad.any()


def test_on_a_tower_under_autocast():
    tower = timm.create_model("coswin_nano", num_classes=0)
    channels = [info["num_chs"] for info in tower.feature_info[-3:]]
    pyramid = FeaturePyramid(channels, 32)
    images = torch.randn(1, 3, 64, 96)
    expected = pyramid(tower.pyramid(images)[-3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = pyramid(tower.pyramid(images)[-3:])
    assert [tuple(level.shape[2:]) for level in levels] == level_sizes(64, 96, 5)
    for rounded, exact in zip(levels, expected, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_sizes_are_rounded_up_at_every_stride():
    assert level_sizes(640, 640, 5) == [(80, 80), (40, 40), (20, 20), (10, 10), (5, 5)]
    assert level_sizes(96, 97, 5) == [(12, 13), (6, 7), (3, 4), (2, 2), (1, 1)]
    for (height, width), (next_height, next_width) in zip(
        level_sizes(801, 1333, 5), level_sizes(801, 1333, 5)[1:], strict=False
    ):
        assert (next_height, next_width) == ((height + 1) // 2, (width + 1) // 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="3 maps of strides 8, 16 and 32, got 4"):
        FeaturePyramid([1, 2, 3, 4])
    for num_levels in (2, 6):
        with pytest.raises(UsageError, match=f"3 to 5 levels, got {num_levels}"):
            FeaturePyramid(IN_CHANNELS, num_levels=num_levels)
