"""An exported folder, loaded by open_clip itself."""

import json

import open_clip
import pytest
import torch
from torch.nn import functional as F

from tests.unicl.export.towers import TEXTS, random_pixels, small_model
from unicl.errors import UniclError, UsageError
from unicl.export import open_clip as export
from unicl.export.card import Card
from unicl.export.open_clip import export_open_clip
from unicl.towers.open_clip import load_open_clip
from unicl.towers.text import tokenize


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        kept = getattr(open_clip.factory, name)
        monkeypatch.setattr(open_clip.factory, name, type(kept)(kept))


def assert_equal(ours, theirs, mean, std, *, size):
    ours, theirs = ours.eval(), theirs.eval()
    pixels, tokens = random_pixels(size), tokenize(TEXTS, 20)
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        images = F.normalize(theirs.encode_image((pixels / 255 - mean) / std), dim=-1)
        torch.testing.assert_close(ours.encode_image(pixels), images, rtol=0, atol=1e-5)
        texts = F.normalize(theirs.encode_text(tokens), dim=-1)
        torch.testing.assert_close(ours.encode_text(tokens), texts, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.scale(), theirs.logit_scale.exp())


@pytest.mark.parametrize(
    ("image", "size", "text", "options"),
    [
        ("coswin_nano", 48, {}, {}),
        ("coswin_nano", 64, {"activation": "quick_gelu"}, {"layer_scale": 0.5}),
        ("test_vit", 160, {"norm_eps": 0.1, "mlp_width": 100}, {}),
    ],
)
def test_open_clip_gives_equal_embeddings(image, size, text, options, tmp_path):
    model = small_model(image, image_size=size, text=text, **options)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = export_open_clip(model, tmp_path / "mine", image_size=size)
    assert model.training
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())

    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    normalise = preprocess.transforms[-1]
    assert_equal(model, theirs, normalise.mean, normalise.std, size=size)
    torch.testing.assert_close(torch.tensor(normalise.mean), torch.tensor([0.485, 0.456, 0.406]))
    assert theirs.visual.preprocess_cfg["size"] == (size, size)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.equal(tokenizer(TEXTS), tokenize(TEXTS, 20))

    open_clip.add_model_config(folder / "mine.json")
    theirs = open_clip.create_model("mine", pretrained=str(folder / "open_clip_model.safetensors"))
    assert_equal(model, theirs, normalise.mean, normalise.std, size=size)
    assert torch.equal(open_clip.get_tokenizer("mine")(TEXTS), tokenize(TEXTS, 20))

    ours = load_open_clip(f"local-dir:{folder}")
    assert_equal(ours.model, theirs, normalise.mean, normalise.std, size=size)


def test_a_run_at_384_pixels_fits():
    with torch.device("meta"):
        model = small_model("coswin_tiny", image_size=384, window_size=12, layer_scale=1e-4)
    config = export._own_config(model, 384)
    assert config["vision_cfg"]["timm_model_name"] == "coswin_tiny_window12_384"
    export._check_shapes(config, export._their_weights(model))


@pytest.mark.parametrize(("width", "mlp_width"), [(1152, 4864), (64, 100), (49, 48), (93, 94)])
def test_any_width_of_the_mlps_survives(width, mlp_width):
    text = {"width": width, "mlp_width": mlp_width, "num_heads": 1, "num_layers": 1}
    with torch.device("meta"):
        model = small_model(text=text)
    export._check_shapes(export._own_config(model, 48), export._their_weights(model))


def test_the_card_says_what_else_is_needed(tmp_path):
    card = Card(name="Mine", license="apache-2.0", trained_on="nothing")
    folder = export_open_clip(small_model(), tmp_path / "mine", image_size=48, card=card)
    text = (folder / "README.md").read_text()
    for line in ('license: "apache-2.0"', "library_name: open_clip", "# Mine", "import cosswin"):
        assert line in text.splitlines() or line in text
    assert not list(tmp_path.glob(".*"))
    vit = export_open_clip(
        small_model("test_vit", image_size=160), tmp_path / "vit", image_size=160
    )
    assert "cosswin" not in (vit / "README.md").read_text()


TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 64, "heads": 2, "layers": 1, "context_length": 20},
    "quick_gelu": True,
}
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


@pytest.mark.parametrize("text", [{}, SIGLIP], ids=["plain", "siglip"])
def test_a_model_from_open_clip_goes_back(text, tmp_path):
    config = {**TINY, "text_cfg": TINY["text_cfg"] | text, "init_logit_bias": -10}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny.json")
    model = load_open_clip("tiny", weights=False).model
    folder = export_open_clip(model, tmp_path / "mine", image_size=32)
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert theirs.logit_bias is None
    mean, std = theirs.visual.preprocess_cfg["mean"], theirs.visual.preprocess_cfg["std"]
    assert_equal(model, theirs, mean, std, size=32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"text": {"causal": False}}, "cannot express a bidirectional text tower: its config"),
        (
            {"window_size": 4},
            r"builds coswin_nano by its name alone, .* of shape \(121, 1\); these",
        ),
        ({"image": "test_vit", "image_size": 32}, "builds test_vit by its name alone"),
        ({"image": "test_vit", "image_size": 160, "layer_scale": 0.1}, "ls1.gamma|by its name"),
    ],
)
def test_what_open_clip_cannot_express_is_said(model, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        export_open_clip(small_model(**model), tmp_path / "mine", image_size=32)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_not_ours_to_copy(tmp_path):
    config = {**TINY, "text_cfg": TINY["text_cfg"] | {"hf_tokenizer_name": "org/other"}}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny.json")
    model = load_open_clip("tiny", weights=False).model
    with pytest.raises(UsageError, match="open_clip:tiny has a tokenizer that"):
        export_open_clip(model, tmp_path / "mine", image_size=32)


def test_a_difference_is_found_before_it_is_called_done(tmp_path, monkeypatch):
    def spoiled(tower):
        weights = original(tower)
        return weights | {"text_projection": -weights["text_projection"]}

    original = export.to_open_clip
    monkeypatch.setattr(export, "to_open_clip", spoiled)
    with pytest.raises(UniclError, match=r"embeddings of texts differ by .*; nothing was exported"):
        export_open_clip(small_model(), tmp_path / "mine", image_size=48)
    assert list(tmp_path.iterdir()) == []
