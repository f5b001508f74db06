import itertools
import subprocess
import sys

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from cosswin import ConvShape, CoSwin
from cosswin.model import stage_windows

TINY = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 3}
VIDEO = {
    "stem": ConvShape((3, 7, 7), (2, 4, 4), (1, 2, 2)),
    "merge": ConvShape((3, 3, 3), (1, 2, 2), (1, 1, 1)),
    "window_size": (2, 3, 3),
}


def _model(**settings):
    torch.manual_seed(0)
    return CoSwin(**{"num_classes": 5, **TINY, **settings})


def test_keys_are_those_of_the_public_code():
    keys = _model(layer_scale=0.1).state_dict().keys()
    stems = {key.removesuffix(".weight").removesuffix(".bias") for key in keys}
    block = [
        "norm1",
        "norm2",
        "gamma",
        "attn.qkv",
        "attn.proj",
        "attn.relative_position_bias_table",
        "mlp.fc1",
        "mlp.fc2",
    ]
    expected = {"patch_embed.proj", "patch_embed.norm", "norm", "head"}
    for stage, depth in enumerate(TINY["depths"]):
        expected |= {f"layers.{stage}.blocks.{b}.{name}" for b in range(depth) for name in block}
        if stage < 3:
            expected |= {f"layers.{stage}.downsample.{name}" for name in ("proj", "norm")}
    assert stems == expected


@pytest.mark.parametrize("size", [(96, 96), (64, 40), (33, 97), (7, 9)])
def test_any_input_size(size):
    model = _model()
    maps = model.pyramid(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == [8, 16, 32, 64]
    for fine, coarse in itertools.pairwise(maps):
        halves = [-(-side // 2) for side in fine.shape[2:]]
        assert list(coarse.shape[2:]) == halves
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_pyramid_strides():
    maps = _model().pyramid(torch.randn(1, 3, 64, 128))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 32), (8, 16), (4, 8), (2, 4)]


def test_pyramid_ends_in_the_features():
    model = _model()
    x = torch.randn(2, 3, 40, 40)
    features = model.forward_features(x)
    torch.testing.assert_close(model.pyramid(x)[-1], features.movedim(-1, 1))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    torch.testing.assert_close(model(x), model.head(pooled))


def test_images_of_a_batch_do_not_see_each_other():
    model = _model()
    x = torch.randn(3, 3, 50, 70)
    single = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), single, rtol=1e-5, atol=1e-5)


def test_forward_intermediates():
    model = _model()
    x = torch.randn(1, 3, 48, 48)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert len(maps) == 4
    (chosen,) = model.forward_intermediates(
        x, indices=[1], stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    torch.testing.assert_close(chosen, maps[1].movedim(1, -1))
    both = model.forward_intermediates(x, indices=2, norm=True, intermediates_only=True)
    torch.testing.assert_close(both[0], maps[2])
    torch.testing.assert_close(both[1], last.movedim(-1, 1))
    with pytest.raises(ValueError, match="no such stages"):
        model.forward_intermediates(x, indices=[4])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_only():
    extractor = timm.create_model("coswin_nano", features_only=True, out_indices=(0, 2))
    maps = extractor(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels() == [32, 128]
    assert extractor.feature_info.reduction() == [4, 16]
    assert [m.shape[-1] for m in maps] == [16, 4]
    sum(m.sum() for m in maps).backward()
    unused = [name for name, p in extractor.named_parameters() if p.grad is None]
    assert not unused


def test_reset_classifier():
    model = _model()
    x = torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1, 1, 64)
    model.reset_classifier(9, "max")
    assert model(x).shape == (2, 9)
    assert model.get_classifier().out_features == model.num_classes == 9
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(9, "median")


def test_layer_decay_groups_fall_towards_the_stem():
    model = _model()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == set(names.values())
    order = [
        "patch_embed.proj.weight",
        "layers.0.blocks.0.mlp.fc1.weight",
        "layers.0.downsample.proj.weight",
        "layers.1.blocks.0.mlp.fc1.weight",
        "layers.1.blocks.1.mlp.fc1.weight",
        "layers.3.blocks.0.mlp.fc1.weight",
        "head.weight",
    ]
    scales = [scale[name] for name in order]
    assert scales == sorted(set(scales))
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert {name for name, value in decay.items() if value == 0} == {
        name for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("bias_table")
    }


def test_coarse_groups_are_the_stages():
    groups = group_parameters(_model(), _model().group_matcher(coarse=True))
    assert len(groups) == 6


def test_open_clip_takes_it_as_image_tower():
    tower = TimmModel("coswin_tiny", embed_dim=64, image_size=224, pool="", proj="linear")
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    result = tower.forward_intermediates(torch.randn(1, 3, 64, 64))
    assert result["image_features"].shape == (1, 64)
    assert len(result["image_intermediates"]) == 4
    tower.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in tower.trunk.layers)


def test_window_can_change_in_place():
    model = _model()
    names = model.state_dict().keys()
    model.set_input_size(img_size=80, window_size=5)
    assert model.img_size == 80
    assert model.state_dict().keys() == names
    attention = model.layers[1].blocks[1].attn
    assert (attention.window_size, attention.shift) == ((5, 5), (2, 2))
    assert attention.relative_position_bias_table.shape == (81, 1)
    assert model(torch.randn(1, 3, 80, 80)).shape == (1, 5)


def test_a_clip_model_is_a_configuration():
    model = _model(**VIDEO)
    maps = model.pyramid(torch.randn(1, 3, 8, 32, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (8, 4, 8, 12),
        (16, 4, 4, 6),
        (32, 4, 2, 3),
        (64, 4, 1, 2),
    ]
    assert model(torch.randn(2, 3, 5, 32, 32)).shape == (2, 5)


def test_stage_windows():
    assert stage_windows(7, dims=2, num_stages=2) == ((7, 7), (7, 7))
    assert stage_windows((8, 7, 7), dims=3, num_stages=1) == ((8, 7, 7),)
    assert stage_windows([(2, 7), (4, 7)], dims=2, num_stages=2) == ((2, 7), (4, 7))
    for wrong in ((7, 7, 7), [(7, 7)], 0):
        with pytest.raises(ValueError, match="window_size"):
            stage_windows(wrong, dims=2, num_stages=2)


def test_export_equals_eager():
    model = _model().eval()
    x = torch.randn(2, 3, 48, 40)
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_fake_tensors_leave_no_trace_in_the_layouts():
    """Planning a run traces a model of fake tensors; real ones run before and after it."""
    with torch._subclasses.FakeTensorMode():
        _model()(torch.randn(1, 3, 44, 60)).sum().backward()
    model = _model()
    model(torch.randn(1, 3, 44, 60)).sum().backward()
    with torch._subclasses.FakeTensorMode():
        _model()(torch.randn(1, 3, 44, 60)).sum().backward()


def test_compiles_in_one_graph():
    """In a process of its own: the compiler cannot trace the tests' shape checks."""
    code = (
        "import torch, cosswin; torch.manual_seed(0);"
        "model = cosswin.coswin_nano(num_classes=3, depths=(1, 2), num_heads=(1, 2));"
        "x = torch.randn(2, 3, 48, 52);"
        "compiled = torch.compile(model, backend='eager', fullgraph=True);"
        "torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
