import pytest
import timm
import torch

from adapters.video.coswin3d import coswin3d, load_image_weights, load_video_weights
from unicl.errors import UsageError

NANO = "coswin_nano"
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _drawn(model):
    """Draw weights large enough for bias, mask and every tap of a kernel to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def _image_model(space_windows=None, **settings):
    """The nano variant, whose own window is 6."""
    windows = {} if space_windows is None else {"window_size": [(w, w) for w in space_windows]}
    return _drawn(timm.create_model(NANO, num_classes=4, **windows, **settings))


def _inflated(image_model, **settings):
    model = coswin3d(NANO, num_classes=4, **settings).eval()
    load_image_weights(model, image_model.state_dict())
    return model


def _assert_still(image_model, model, size, frames, in_chans=3, tolerance=1e-5):
    """Every map at every time step is that of the image, on the scale of its entries."""
    image = torch.randn(2, in_chans, *size, dtype=next(model.parameters()).dtype)
    clip = image[:, :, None].expand(-1, -1, frames, -1, -1)
    with torch.no_grad():
        stages = zip(image_model.pyramid(image), model.pyramid(clip), strict=True)
        for still, moving in stages:
            assert moving.shape[2] == -(-frames // 2)
            expected = still[:, :, None].expand_as(moving)
            atol = tolerance * still.abs().max().item()
            torch.testing.assert_close(moving, expected, rtol=tolerance, atol=atol)
        rounded = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(model(clip), image_model(image), **rounded)


# Maps of the first stage, in units of 4 pixels, against its window of 6: as large, larger and
# padded, smaller on one axis, on the other, on both, and a single token.
@pytest.mark.parametrize(
    "size", [(48, 48), (68, 52), (20, 80), (80, 20), (33, 97), (16, 12), (7, 4)]
)
@pytest.mark.parametrize("frames", [1, 7, 32])
def test_a_still_clip_gives_the_image_at_every_step(size, frames):
    """From one step, less than every window, to 16, more than all but the last."""
    image_model = _image_model()
    _assert_still(image_model, _inflated(image_model), size, frames)


@pytest.mark.parametrize("size", [(48, 48), (33, 97), (16, 12)])
def test_in_double_precision_a_still_clip_is_the_image(size):
    image_model = _image_model().double()
    model = coswin3d(NANO, num_classes=4).eval().double()
    load_image_weights(model, image_model.state_dict())
    _assert_still(image_model, model, size, 9, tolerance=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_steps": 1},
        {"merge_steps": 2},
        {"merge_steps": 5},
        {"tube_frames": 1},
        {"tube_frames": 3},
        {"tube_frames": 5},
        {"time_windows": (1, 1, 1, 1)},
        {"time_windows": (3, 3, 3, 3)},
        {"time_windows": (16, 8, 5, 2)},
    ],
)
@pytest.mark.parametrize("frames", [1, 9])
def test_whatever_the_extents_in_time(settings, frames):
    image_model = _image_model()
    _assert_still(image_model, _inflated(image_model, **settings), (40, 60), frames)


def test_windows_per_stage_on_the_map():
    windows = (2, 3, 5, 4)
    image_model = _image_model(space_windows=windows)
    model = _inflated(image_model, space_windows=windows)
    for size in ((48, 48), (20, 80)):
        _assert_still(image_model, model, size, 5)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_another_number_of_channels_follows_the_image_model(in_chans):
    image_model = _image_model()
    other = _drawn(timm.create_model(NANO, num_classes=4, in_chans=in_chans))
    from_image = _inflated(image_model, in_chans=in_chans)
    other.load_state_dict(
        {
            **image_model.state_dict(),
            "patch_embed.proj.weight": from_image.state_dict()["patch_embed.proj.weight"].sum(2),
        }
    )
    _assert_still(other, from_image, (48, 40), 5, in_chans=in_chans)


@pytest.mark.parametrize(
    ("variant", "side"), [("coswin_tiny", 7), ("coswin_huge_window12_384", 12)]
)
def test_every_variant_has_one(variant, side):
    with torch.device("meta"):
        model = coswin3d(variant)
    windows = [stage.blocks[-1].attn.window_size for stage in model.layers]
    assert windows == [(time, side, side) for time in (2, 4, 8, 16)]
    assert [stage.blocks[1].attn.shift for stage in model.layers] == [
        (time // 2, side // 2, side // 2) for time in (2, 4, 8, 16)
    ]


def test_settings_reach_the_model():
    model = coswin3d(
        NANO,
        num_classes=7,
        in_chans=4,
        img_size=64,
        drop_path_rate=0.5,
        layer_scale=0.1,
        checkpointing=True,
        space_windows=(1, 2, 3, 4),
    )
    assert (model.img_size, model.num_classes, model.in_chans) == (64, 7, 4)
    assert model.layers[-1].blocks[-1].drop_path.drop_prob == 0.5
    assert model.layers[0].blocks[0].gamma is not None
    assert all(stage.grad_checkpointing for stage in model.layers)
    assert [stage.blocks[0].attn.window_size[1:] for stage in model.layers] == [
        (side, side) for side in (1, 2, 3, 4)
    ]
    model(torch.randn(2, 4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("extents", [{"merge_steps": 1}, {"time_windows": (1, 1, 1, 1)}])
def test_the_first_step_sees_the_last(extents):
    """Else still clips would be those of the image for a poor reason; windows or merges will do."""
    model = _inflated(_image_model(), **extents).double()
    clip = torch.randn(1, 3, 8, 48, 48, dtype=torch.double)
    other = torch.cat([clip[:, :, :-1], torch.randn_like(clip[:, :, -1:])], 2)
    before, after = model.forward_features(clip), model.forward_features(other)
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4 * before.abs().max()


def test_weights_of_video_are_carried_to_other_windows():
    """Of a still clip the features stay, whatever the windows in time, there and back."""
    image_model = _image_model()
    source = _inflated(image_model)
    model = coswin3d(NANO, num_classes=4, time_windows=(4, 8, 16, 16)).eval()
    load_video_weights(model, source.state_dict())
    _assert_still(image_model, model, (40, 60), 9)
    clip = torch.randn(1, 3, 9, 40, 60)
    back = coswin3d(NANO, num_classes=4).eval()
    load_video_weights(back, source.state_dict())
    assert torch.equal(back(clip), source(clip))


def test_a_head_of_other_classes_and_a_prefix():
    weights = {f"image.backbone.{k}": w for k, w in _image_model().state_dict().items()}
    model = coswin3d(NANO, num_classes=9)
    head = model.head.weight.clone()
    load_image_weights(model, {**weights, "text.positions": torch.zeros(1), "step": 3})
    assert torch.equal(model.head.weight, head)
    table = weights[f"image.backbone.{TABLE}"]
    assert torch.equal(model.state_dict()[TABLE].view(3, *table.shape), table.expand(3, -1, -1))


def test_a_window_that_is_no_square_must_be_told():
    weights = _drawn(timm.create_model(NANO, window_size=(2, 5))).state_dict()
    with pytest.raises(UsageError, match="bias table with 27 rows: pass window_size"):
        load_image_weights(coswin3d(NANO), weights)
    load_image_weights(coswin3d(NANO), weights, window_size=(2, 5))


def test_the_kind_of_weights_is_said():
    images, video = _image_model(), coswin3d(NANO)
    with pytest.raises(UsageError, match=r"^x.pt has the weights of a 3D-CoSwin.* with load_video"):
        load_image_weights(coswin3d(NANO), video.state_dict(), source="x.pt")
    with pytest.raises(UsageError, match="weights of an image CoSwin: inflate them with load_im"):
        load_video_weights(video, images.state_dict())
    with pytest.raises(UsageError, match="the model is a CoSwin of images"):
        load_image_weights(images, images.state_dict())
    with pytest.raises(UsageError, match="pass what lies under 'model'"):
        load_image_weights(video, {"epoch": 3, "model": images.state_dict()})


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"conv1.weight": torch.zeros(1)}, "one CoSwin, found 0 keys"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 4, 4)}, r"kernel \(4, 4\) cannot be"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 7, 7)}, "lack layers.0.blocks.0.attn"),
        (coswin3d("coswin_nano", merge_steps=1).state_dict(), "3D-CoSwin"),
    ],
)
def test_weights_of_another_architecture_are_refused(weights, error):
    model = coswin3d(NANO)
    before = model.state_dict()
    with pytest.raises(UsageError, match=error):
        load_image_weights(model, weights)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"variant": "coswin_tinny"}, "there is no CoSwin 'coswin_tinny'; there is coswin_tiny"),
        ({"variant": "resnet18"}, "there is no CoSwin 'resnet18'"),
        ({"tube_frames": 0}, "tube_frames must be at least 1, got 0"),
        ({"tube_stride": -1}, "tube_stride must be at least 1, got -1"),
        ({"merge_steps": 0}, "merge_steps must be at least 1"),
        ({"time_windows": (2, 4)}, r"time_windows must be 4 positive numbers.* got \[2, 4\]"),
        ({"space_windows": (7, 7, 0, 7)}, "space_windows must be 4 positive numbers"),
    ],
)
def test_errors_name_the_setting(settings, error):
    with pytest.raises(UsageError, match=error):
        coswin3d(**{"variant": NANO, **settings})
