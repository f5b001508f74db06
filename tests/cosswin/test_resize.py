import pytest
import torch
from timm.models import adapt_input_conv

from cosswin import CoSwin, carry_weights
from cosswin.resize import adapt_channels, inflate_kernel, resize_bias_table
from tests.cosswin.test_model import TINY, VIDEO


def _model(**settings):
    model = CoSwin(**{"num_classes": 5, **TINY, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def _load(model, weights, **settings):
    model.load_state_dict(carry_weights(weights, model, **settings))
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_equal_models_exchange_weights_unchanged():
    source, model = _model(), _model()
    x = torch.randn(1, 3, 50, 40)
    assert torch.equal(_load(model, source.state_dict())(x), source(x))


def test_table_keeps_its_shape_under_resizing():
    """A table that rises with the offsets, to 66, rises as evenly over more of them."""
    offsets = torch.arange(-6.0, 7)
    table = (offsets[:, None] + 10 * offsets).reshape(-1, 1)
    grid = resize_bias_table(table, source=(7, 7), target=(12, 12)).view(23, 23)
    assert grid[11, 11].abs() < 1e-4
    torch.testing.assert_close(grid, -grid.flip(0, 1), rtol=1e-4, atol=1e-4)
    inner = torch.arange(-8.0, 9) * 13 / 23
    expected = inner[:, None] + 10 * inner
    torch.testing.assert_close(grid[3:20, 3:20], expected, rtol=0, atol=0.6)


def test_table_is_copied_along_time():
    table = torch.randn(25, 2)
    video = resize_bias_table(table, source=(3, 3), target=(4, 3, 3))
    assert torch.equal(video.view(7, 25, 2), table.expand(7, 25, 2))


def test_table_of_video_changes_its_extent_of_time():
    table = torch.arange(-3.0, 4).repeat_interleave(25)[:, None]
    shorter = resize_bias_table(table, source=(4, 3, 3), target=(2, 3, 3)).view(3, 25)
    torch.testing.assert_close(shorter[1], torch.zeros(25))
    torch.testing.assert_close(shorter[0], -shorter[2])


def test_kernel_is_divided_by_its_extent_of_time():
    kernel = torch.randn(4, 3, 5, 5)
    inflated = inflate_kernel(kernel, kernel=(2, 5, 5))
    torch.testing.assert_close(inflated.sum(2), kernel)
    assert torch.equal(inflated[:, :, 0], inflated[:, :, 1])
    with pytest.raises(ValueError, match=r"kernel \(5, 5\) cannot be carried to \(2, 7, 7\)"):
        inflate_kernel(kernel, kernel=(2, 7, 7))


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_channels_follow_timms_rule(in_chans):
    kernel = torch.randn(4, 3, 7, 7)
    expected = adapt_input_conv(in_chans, kernel)
    torch.testing.assert_close(adapt_channels(kernel, in_chans=in_chans), expected)


def test_channels_at_zero_change_nothing():
    source = _model()
    image, other = torch.randn(2, 3, 40, 40), torch.randn(2, 2, 40, 40)
    for settings in ({}, VIDEO):
        model = _load(_model(in_chans=5, **settings), source.state_dict(), more_channels="zero")
        seen = torch.cat([image, other], dim=1)
        seen = seen[:, :, None].expand(-1, -1, 4, -1, -1) if settings else seen
        torch.testing.assert_close(model(seen), source(image), rtol=1e-4, atol=1e-4)


def test_grey_images_give_the_features_of_grey_rgb():
    source = _model()
    grey = torch.randn(1, 1, 40, 40)
    model = _load(_model(in_chans=1), source.state_dict())
    rgb = source(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model(grey), rgb, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(48, 48), (40, 56), (24, 68)])
def test_a_still_clip_gives_the_image_at_every_time(size):
    """Right only if stem, merges, clamped and padded windows, bias and mask all are inflated."""
    source = _model(window_size=4)
    model = _load(_model(**{**VIDEO, "window_size": (2, 4, 4)}), source.state_dict())
    image = torch.randn(2, 3, *size)
    clip = image[:, :, None].expand(-1, -1, 10, -1, -1)
    for still, moving in zip(source.pyramid(image), model.pyramid(clip), strict=True):
        expected = still[:, :, None].expand_as(moving)
        torch.testing.assert_close(moving, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(clip), source(image), rtol=1e-4, atol=1e-4)


def test_windows_may_grow_with_the_stages():
    source = _model(window_size=4)
    windows = ((2, 2, 2), (2, 4, 4), (4, 4, 4), (4, 4, 4))
    model = _model(**{**VIDEO, "window_size": windows})
    weights = carry_weights(source.state_dict(), model)
    assert weights["layers.0.blocks.0.attn.relative_position_bias_table"].shape == (27, 1)
    assert weights["layers.2.blocks.1.attn.relative_position_bias_table"].shape == (343, 2)


def test_public_layout_is_read():
    """Prefix, derived buffers, per-output norms and a head of other classes."""
    source = _model(num_classes=7)
    weights = {f"image_encoder.{key}": value for key, value in source.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"image_encoder.norm3.{part}"] = weights.pop(f"image_encoder.norm.{part}")
        weights[f"image_encoder.norm0.{part}"] = torch.randn(8)
    buffers = {
        "image_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(81),
        "image_encoder.layers.1.blocks.1.attn_mask": torch.zeros(4, 9, 9),
        "text_encoder.ln_final.weight": torch.ones(8),
    }
    model = _model()
    head = model.head.weight.clone()
    _load(model, {**weights, **buffers})
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model.forward_features(x), source.forward_features(x))
    assert torch.equal(model.head.weight, head)


def test_weights_of_another_architecture_are_refused():
    source = _model().state_dict()
    with pytest.raises(ValueError, match="expected the weights of one CoSwin, found 0"):
        carry_weights({"visual.conv1.weight": torch.zeros(1)}, _model())
    with pytest.raises(ValueError, match=r"have the unknown layers.2.blocks.1"):
        carry_weights(source, _model(depths=(1, 2, 1, 1)))
    with pytest.raises(ValueError, match=r"lack layers.2.blocks.2"):
        carry_weights(source, _model(depths=(1, 2, 3, 1)))
    with pytest.raises(ValueError, match=r"shape \[8, 3, 7, 7\], the model needs \[16, 3, 7, 7\]"):
        carry_weights(source, _model(embed_dim=16))


def test_an_oblong_window_must_be_told():
    source = _model(window_size=(2, 5))
    with pytest.raises(ValueError, match="pass window_size"):
        carry_weights(source.state_dict(), _model(window_size=6))
    weights = carry_weights(source.state_dict(), _model(window_size=6), window_size=(2, 5))
    assert weights["layers.0.blocks.0.attn.relative_position_bias_table"].shape == (121, 1)


@pytest.mark.parametrize("time", [1, 5, 13])
def test_a_table_is_read_in_the_dimensions_of_its_weights(time):
    """Of 9 or 25 offsets in time, a table of video is as long as one of a larger square."""
    source = _model(**{**VIDEO, "window_size": (time, 3, 3)})
    model = _model(**{**VIDEO, "window_size": (4, 3, 3)})
    weights = carry_weights(source.state_dict(), model)
    key = "layers.1.blocks.0.attn.relative_position_bias_table"
    table = source.state_dict()[key]
    expected = resize_bias_table(table, source=(time, 3, 3), target=(4, 3, 3))
    assert torch.equal(weights[key], expected)
    images = _model(window_size=time)
    model = _model(**{**VIDEO, "window_size": (5, 2, 2)})
    weights = carry_weights(images.state_dict(), model)
    table = images.state_dict()[key]
    expected = resize_bias_table(table, source=(time, time), target=(5, 2, 2))
    assert torch.equal(weights[key], expected)


def test_windows_of_video_grow_in_time_and_keep_the_middle():
    """Offset 0 of time keeps its biases, whatever the extents; so a clip of one step does, too."""
    windows = ((2, 3, 3), (4, 3, 3), (4, 3, 3), (8, 3, 3))
    source = _model(**{**VIDEO, "window_size": windows})
    longer = ((4, 3, 3), (8, 3, 3), (8, 3, 3), (16, 3, 3))
    model = _model(**{**VIDEO, "window_size": longer})
    _load(model, source.state_dict())
    clip = torch.randn(1, 3, 2, 40, 40)
    torch.testing.assert_close(model(clip), source(clip), rtol=1e-5, atol=1e-5)
    back = _model(**{**VIDEO, "window_size": windows})
    _load(back, model.state_dict())
    torch.testing.assert_close(back(clip), source(clip), rtol=1e-5, atol=1e-5)


def test_a_window_that_changes_in_space_and_time_must_be_told():
    windows = ((2, 4, 4), (4, 4, 4), (4, 4, 4), (4, 4, 4))
    source = _model(**{**VIDEO, "window_size": windows}).state_dict()
    model = _model(**{**VIDEO, "window_size": (3, 3, 3)})
    with pytest.raises(ValueError, match=r"cannot tell the window .* 147 rows: pass window_size"):
        carry_weights(source, model)
    with pytest.raises(ValueError, match="given for 2 stages, not for 3"):
        carry_weights(source, model, window_size=windows[:2])
    with pytest.raises(ValueError, match=r"window \(4, 4, 4\) has 343 rows, got 147"):
        carry_weights(source, model, window_size=(4, 4, 4))
    assert carry_weights(source, model, window_size=windows).keys() == source.keys()


def test_weights_of_video_do_not_become_those_of_images():
    with pytest.raises(ValueError, match="3 dimensions cannot be carried to a model of 2"):
        carry_weights(_model(**VIDEO).state_dict(), _model())
