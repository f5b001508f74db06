import pytest
import timm
import torch

import cosswin

SIZES = {
    "coswin_tiny": (29_462_874, 29_512_554),
    "coswin_small": (50_780_778, 50_882_298),
    "coswin_base": (90_194_744, 90_330_104),
    "coswin_large": (202_753_236, 202_956_276),
    "coswin_xlarge": (360_285_808, 360_556_528),
    "coswin_huge": (637_371_952, 637_803_952),
}


def _count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    """The totals are worked out by hand from the architecture, without projection and head."""
    with torch.device("meta"):
        counts = [_count(timm.create_model(name, num_classes=0, window_size=w)) for w in (7, 12)]
    assert tuple(counts) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_the_window_for_384_pixels_has_a_name(name):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_window12_384", num_classes=0)
        narrow = timm.create_model(f"{name}_window12_384", num_classes=0, window_size=7)
    assert (_count(narrow), _count(model)) == SIZES[name]
    assert model.img_size == 384
    assert model.default_cfg["input_size"] == (3, 384, 384)


def test_layer_scale_adds_one_vector_a_block():
    with torch.device("meta"):
        model = timm.create_model("coswin_huge", num_classes=0, layer_scale=1e-4)
    assert _count(model) == SIZES["coswin_huge"][0] + 38_400


def test_nano_is_small_and_runs_at_48_pixels():
    model = timm.create_model("coswin_nano", num_classes=0)
    assert 1_500_000 < _count(model) < 1_700_000
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 256)


def test_all_are_registered():
    hires = [f"{name}_window12_384" for name in SIZES]
    assert set(timm.list_models("coswin_*")) == {*SIZES, *hires, "coswin_nano"}
    assert not timm.list_models("coswin_*", pretrained=True)


def test_pretrained_weights_are_refused():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("coswin_nano", pretrained=True)


def test_arguments_reach_the_model():
    model = timm.create_model(
        "coswin_nano", num_classes=5, in_chans=4, img_size=64, window_size=4, drop_path_rate=0.3
    )
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 5)
    assert (model.num_classes, model.in_chans, model.img_size) == (5, 4, 64)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.075, 0.15, 0.225, 0.3])
    assert model.default_cfg["classifier"] == "head"
    assert model.default_cfg["first_conv"] == "patch_embed.proj"


def test_timm_loads_weights_of_another_window_and_channels():
    source = timm.create_model("coswin_nano", num_classes=7)
    model = timm.create_model(
        "coswin_nano",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": source.state_dict(), "num_classes": 7},
        num_classes=3,
        in_chans=1,
        window_size=4,
    )
    expected = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert model.head.out_features == 3


def test_public_names_are_sorted_and_there():
    assert cosswin.__all__ == sorted(cosswin.__all__)
    assert all(hasattr(cosswin, name) for name in cosswin.__all__)
