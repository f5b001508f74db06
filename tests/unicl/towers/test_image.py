from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from adapters.video.coswin3d import coswin3d
from unicl.errors import UniclError, UsageError
from unicl.towers.image import ImageTower, check_image_size, lock_tokenless

MODELS = ("coswin_nano", "test_vit", "test_resnet", "test_mambaout")


def small_tower(model="coswin_nano", **options):
    torch.manual_seed(0)
    return ImageTower(model, **{"embed_dim": 8, "image_size": 32} | options)


@pytest.mark.parametrize("model", [*MODELS, "resnet10t"])
def test_any_timm_model_gives_projected_features(model):
    tower = small_tower(model).eval()
    images = torch.randn(2, 3, 32, 32)
    features = tower(images)
    assert features.shape == (2, 8)
    assert torch.equal(features, tower.backbone(images) @ tower.projection.weight.T)
    assert tower.projection.bias is None


def test_bytes_are_normalised_and_floats_are_not():
    tower = small_tower("test_resnet").eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = normalize(pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(tower(pixels), tower(images))
    assert not {"mean", "std"} & tower.state_dict().keys()


def test_settings_reach_the_model():
    tower = small_tower(window_size=4, drop_path_rate=0.2, layer_scale=0.3)
    backbone = timm.create_model(
        "coswin_nano", num_classes=0, window_size=4, drop_path_rate=0.2, layer_scale=0.3
    )
    shapes = {name: weight.shape for name, weight in backbone.state_dict().items()}
    assert {k: w.shape for k, w in tower.backbone.state_dict().items()} == shapes
    gammas = [w for k, w in tower.backbone.named_parameters() if k.endswith("gamma")]
    assert len(gammas) > 0
    assert all(torch.equal(w, torch.full_like(w, 0.3)) for w in gammas)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(tower(images), tower(images))  # stochastic depth


def test_layer_scale_is_called_otherwise_elsewhere():
    tower = small_tower("test_vit", layer_scale=0.3)
    gammas = [w for k, w in tower.backbone.named_parameters() if k.endswith("gamma")]
    assert len(gammas) > 0
    assert all(torch.equal(w, torch.full_like(w, 0.3)) for w in gammas)
    gammas = [
        w
        for k, w in small_tower("test_convnext", layer_scale=0.3).backbone.named_parameters()
        if k.endswith("gamma")
    ]
    assert all(torch.equal(w, torch.full_like(w, 0.3)) for w in gammas)


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("resnet10t", {"window_size": 7}),
        ("resnet10t", {"layer_scale": 0.1}),
        ("test_vit", {"window_size": 7}),
        ("test_mambaout", {"window_size": 4}),
    ],
)
def test_setting_without_effect_is_refused(model, setting):
    (name,) = setting
    with pytest.raises(UsageError, match=f"image_tower.{name} has no effect on {model}"):
        small_tower(model, **setting)


def test_checkpointing_without_effect_is_refused(monkeypatch):
    def refuse(self, enable=True):
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr(timm.models.ResNet, "set_grad_checkpointing", refuse)
    with pytest.raises(UsageError, match=r"image_tower.checkpointing has no effect on resnet10t"):
        small_tower("resnet10t", checkpointing=True)


@pytest.mark.parametrize("model", ["coswin_nano", "test_vit"])
def test_checkpointing_keeps_the_gradients(model):
    images = torch.randn(2, 3, 32, 32)
    plain, checkpointed = small_tower(model), small_tower(model, checkpointing=True)
    for tower in (plain, checkpointed):
        tower(images).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UsageError, match=r"no timm model: coswin_tinny; did you mean coswin_tiny"):
        small_tower("coswin_tinny")
    with pytest.raises(UsageError, match=r"see timm.list_models\(\)"):
        small_tower("0/0/0/0")


@pytest.mark.parametrize("model", MODELS)
def test_weights_of_a_classifier_start_the_backbone(model, tmp_path):
    torch.manual_seed(5)
    size = {} if model in ("test_resnet", "test_mambaout") else {"img_size": 32}
    classifier = timm.create_model(model, num_classes=10, **size).eval()
    path = tmp_path / "weights.safetensors"
    save_file(classifier.state_dict(), path)
    tower = small_tower(model, weights=path).eval()
    images = torch.randn(2, 3, 32, 32)
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(tower.backbone(images), pooled)


def test_weights_are_carried_to_another_window(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("coswin_nano").state_dict(), path)
    tower = small_tower(window_size=4, weights=path)
    tables = [w for k, w in tower.backbone.named_parameters() if k.endswith("bias_table")]
    assert {len(table) for table in tables} == {49}


def test_weights_of_a_whole_model_give_its_image_tower(tmp_path):
    source = small_tower("test_resnet")
    path = tmp_path / "model.safetensors"
    save_file({f"image.{name}": weight for name, weight in source.state_dict().items()}, path)
    tower = ImageTower("test_resnet", embed_dim=4, weights=path)
    for name, weight in tower.backbone.state_dict().items():
        assert torch.equal(weight, source.backbone.state_dict()[name])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("whole", [False, True])
def test_rgb_weights_start_a_tower_of_more_channels(model, whole, tmp_path):
    rgb = small_tower(model).eval()
    path = tmp_path / "weights.safetensors"
    weights = {f"image.{k}": w for k, w in rgb.state_dict().items()} if whole else None
    save_file(weights or rgb.backbone.state_dict(), path)
    tower = small_tower(model, in_chans=4, weights=path).eval()
    assert tower.in_chans == 4
    pixels = torch.randint(0, 256, (2, 4, 32, 32), dtype=torch.uint8)
    assert torch.equal(tower.pool(pixels), rgb.pool(pixels[:, :3]))
    # What starts at zero learns at once.
    tower(pixels).square().sum().backward()
    stem = tower.backbone.get_submodule(tower.backbone.pretrained_cfg["first_conv"])
    assert stem.weight.grad[:, 3].abs().max() > 0
    # Where nothing was measured, the fourth channel stays without effect.
    with torch.no_grad():
        stem.weight[:, 3] = 0.1
    assert not torch.equal(tower.pool(pixels), rgb.pool(pixels[:, :3]))
    pixels[:, 3] = 0
    torch.testing.assert_close(tower.pool(pixels), rgb.pool(pixels[:, :3]))


def test_a_tower_of_clips_follows_the_same_rule_for_more_channels(tmp_path):
    rgb = small_tower().eval()
    save_file(rgb.backbone.state_dict(), tmp_path / "weights.safetensors")
    backbone = coswin3d("coswin_nano", in_chans=4, img_size=32)
    tower = small_tower(in_chans=4, backbone=backbone, weights=tmp_path / "weights.safetensors")
    pixels = torch.randint(0, 256, (2, 4, 32, 32), dtype=torch.uint8)
    clip = pixels[:, :, None].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(tower.eval().pool(clip), rgb.pool(pixels[:, :3]))


def test_a_tower_of_more_channels_is_tried_with_as_many():
    tower = small_tower(in_chans=5)
    check_image_size(tower, 32)
    with pytest.raises(UsageError, match="image_size 2 does not suit"):
        check_image_size(tower, 2)
    with pytest.raises(UsageError, match="takes RGB and more, got 1 channels"):
        small_tower(in_chans=1)


def _foreign(path: Path) -> None:
    save_file({"other.weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("name", "write", "model", "error", "message"),
    [
        ("w.pth", Path.touch, "test_vit", UsageError, "must be a .safetensors file"),
        ("w.safetensors", lambda path: None, "test_vit", UsageError, "cannot read"),
        ("w.safetensors", Path.mkdir, "test_vit", UsageError, "cannot read"),
        ("w.safetensors", Path.touch, "test_vit", UniclError, "is damaged"),
        ("w.safetensors", _foreign, "test_vit", UsageError, "does not fit image_tower.model"),
        ("w.safetensors", _foreign, "test_resnet", UsageError, "does not fit image_tower.model"),
        ("w.safetensors", _foreign, "coswin_nano", UsageError, "does not fit image_tower.model"),
    ],
)
def test_bad_weights_are_one_line(name, write, model, error, message, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(error, match=message) as caught:
        small_tower(model, weights=path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "size"), [("vit_tiny_patch16_224", 8), ("convnext_atto", 16)])
def test_a_size_that_a_model_cannot_take_is_named(model, size):
    image_tower = small_tower(model, image_size=size)
    with pytest.raises(UsageError, match=f"image_size {size} does not suit ") as caught:
        check_image_size(image_tower, size)
    assert "\n" not in str(caught.value)


def test_only_the_size_is_judged():
    class Sorting(torch.nn.Linear):
        def forward(self, images):
            return images.new_zeros(int(images.sum()))

    check_image_size(Sorting(1, 1), 8)

    class Bare(torch.nn.Linear):
        def forward(self, images):
            raise AssertionError

    with pytest.raises(UsageError, match="AssertionError"):
        check_image_size(Bare(1, 1), 8)


@pytest.mark.parametrize("model", ["coswin_nano", "resnet10t"])
def test_checking_a_size_changes_nothing(model):
    image_tower = small_tower(model).train()
    before = {name: value.clone() for name, value in image_tower.state_dict().items()}
    check_image_size(image_tower, 32)
    assert image_tower.training
    for name, value in image_tower.state_dict().items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model", ["coswin_nano", "test_resnet", "convnextv2_atto"])
def test_maps_of_several_strides(model):
    tower = small_tower(model).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        maps = tower.maps(pixels, (8, 16, 32))
        floats = tower.maps(
            normalize(pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (32,)
        )
    widths = tower.map_widths((8, 16, 32))
    assert [each.shape for each in maps] == [
        (2, width, 64 // stride, 96 // stride)
        for width, stride in zip(widths, (8, 16, 32), strict=True)
    ]
    torch.testing.assert_close(floats[0], maps[2], rtol=1e-3, atol=1e-4)


def test_a_tower_of_tokens_has_no_maps():
    with pytest.raises(
        UsageError, match=r"test_vit has no maps of strides 8, 16, 32; take a model"
    ):
        small_tower("test_vit").map_widths((8, 16, 32))


@pytest.mark.parametrize("model", [*MODELS, "test_convnext", "swin_tiny_patch4_window7_224"])
def test_tokens_are_the_last_map_row_by_row(model):
    size = 224 if model.startswith("swin") else 64
    tower = small_tower(model, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    tokens = tower.tokens(images)
    assert tokens.shape[2] == tower.token_width
    last = tower.backbone.forward_features(images)
    if last.ndim == 4:  # of timm's models some put the channels last
        last = last if last.shape[1] == tower.token_width else last.movedim(-1, 1)
        last = last.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, last[:, -tokens.shape[1] :])


def test_a_model_without_maps_has_no_tokens(monkeypatch):
    tower = small_tower("test_resnet")
    monkeypatch.setattr(tower.backbone, "feature_info", [])
    for ask in (lambda: tower.tokens(torch.zeros(1, 3, 32, 32)), lambda: tower.token_width):
        with pytest.raises(UsageError, match="test_resnet gives no map of its image"):
            ask()


@pytest.mark.parametrize("model", [*MODELS, "test_convnext", "mobilenetv3_small_050"])
def test_what_tokens_do_not_depend_on_is_locked(model):
    tower = small_tower(model, image_size=64)
    lock_tokenless(tower, 64)
    tower.tokens(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in tower.backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    locked = {n for n, p in tower.backbone.named_parameters() if not p.requires_grad}
    assert bool(locked) == (model in ("test_mambaout", "test_convnext", "mobilenetv3_small_050"))
