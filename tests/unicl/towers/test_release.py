"""Files in the layout of UniCL's release, beside timm's Swin and open_clip's text transformer."""

import pickle
import re
import sys
import types
from functools import partial

import numpy as np
import pytest
import timm
import torch
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from unicl.errors import UniclError, UsageError
from unicl.towers.release import load_release
from unicl.towers.text import tokenize

TEXTS = ["a photo of a cat", "!", "a cat", "a dog, lying."]


class Node(dict):
    """A configuration as yacs pickles it: a dictionary with attributes."""

    def __init__(self, content=()):
        super().__init__(content)
        self.__dict__["__immutable__"] = False


Node.__module__, Node.__qualname__ = "yacs.config", "CfgNode"


@pytest.fixture(scope="module")
def theirs():
    """The two towers of a release, by others' code, with its activation, eps and head width."""
    torch.manual_seed(0)
    image = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0).eval()
    norm = partial(LayerNorm, eps=1e-12)
    text = TextTransformer(
        width=128, heads=2, layers=2, output_dim=24, act_layer=QuickGELU, norm_layer=norm
    ).eval()
    for parameter in (*image.parameters(), *text.parameters()):
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return image, text, torch.randn(768, 24) / 28, torch.tensor(1.5)


def released_weights(theirs, *, image="image_encoder", text="text_encoder", projection="image"):
    """Name weights as the release does: merging ends a stage there, and begins one in timm."""
    image_tower, text_tower, image_projection, scale = theirs
    weights = {f"{projection}_projection": image_projection, "logit_scale": scale}
    for name, weight in image_tower.state_dict().items():
        earlier = re.sub(
            r"layers\.(\d)\.downsample",
            lambda found: f"layers.{int(found[1]) - 1}.downsample",
            name,
        )
        weights[f"{image}.{earlier}"] = weight
    weights[f"{image}.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    index = torch.zeros(49, 49, dtype=torch.int64)
    weights[f"{image}.layers.0.blocks.0.attn.relative_position_index"] = index
    for name, weight in text_tower.state_dict().items():
        key = f"{text}.{name.removeprefix('transformer.')}"
        weights["text_projection" if name == "text_projection" else key] = weight
    return weights


def write(path, weights, monkeypatch, *, config=None, **more):
    module = types.ModuleType("yacs.config")
    module.CfgNode = Node
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        config = Node(config or {"MODEL": Node({"TEXT_ENCODER": Node({"HEADS": 8})})})
        torch.save({"model": weights, "config": config, "epoch": 3, **more}, path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"image": "module.image_encoder", "text": "module.lang_encoder"},
        {"image": "visual", "text": "text", "projection": "vision"},
    ],
    ids=["release", "ranks", "flat"],
)
def test_embeddings_are_the_releases(theirs, names, tmp_path, monkeypatch):
    path = write(tmp_path / "unicl.pth", released_weights(theirs, **names), monkeypatch)
    ours = load_release(path)
    assert "yacs" not in sys.modules
    assert (ours.image_size, ours.context_length, ours.name) == (224, 77, str(path))
    image_tower, text_tower, image_projection, scale = theirs
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    floats = transforms.functional.normalize(
        pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    with torch.no_grad():
        expected = F.normalize(image_tower(floats) @ image_projection, dim=-1)
        torch.testing.assert_close(ours.model.encode_image(pixels), expected, rtol=0, atol=1e-5)
        tokens = tokenize(TEXTS)
        assert torch.equal(ours.tokenize(TEXTS), tokens)
        expected = F.normalize(text_tower(tokens), dim=-1)
        torch.testing.assert_close(ours.model.encode_text(tokens), expected, rtol=0, atol=1e-5)
        # Under later tokenizers the padding is the end token; nothing comes of it.
        padded = tokens.masked_fill(torch.arange(77) > tokens.argmax(1, keepdim=True), 49407)
        torch.testing.assert_close(text_tower(padded), text_tower(tokens))
        torch.testing.assert_close(ours.model.scale(), scale.exp())


def test_a_tower_that_is_not_causal_says_so_in_the_configuration(theirs, tmp_path, monkeypatch):
    weights = released_weights(theirs)
    tree = {"MODEL": Node({"TEXT_ENCODER": Node({"AUTOGRESSIVE": False})})}
    ours = load_release(write(tmp_path / "both.pth", weights, monkeypatch, config=tree))
    assert not ours.model.text.causal
    causal = load_release(write(tmp_path / "causal.pth", weights, monkeypatch))
    assert causal.model.text.causal
    assert causal.identity != ours.identity


def test_pixels_are_the_releases(theirs, tmp_path, monkeypatch):
    ours = load_release(write(tmp_path / "unicl.pth", released_weights(theirs), monkeypatch))
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose(
        [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    assert torch.equal(ours.transform(image, 0), expected(image))
    assert ours.transform(image.convert("L"), 0).shape == (3, 224, 224)
    assert torch.equal(pickle.loads(pickle.dumps(ours.transform))(image), expected(image))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_of_a_file_is_executed(theirs, tmp_path, monkeypatch, capsys):
    weights = {"logit_scale": torch.tensor(1.0)}
    path = write(tmp_path / "evil.pth", weights, monkeypatch, optimizer=Evil())
    with pytest.raises(
        UsageError, match="more than weights and a configuration: it needs"
    ) as error:
        load_release(path)
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


def test_what_is_no_release_is_said_in_one_line(theirs, tmp_path, monkeypatch):
    def refused(message, change, kind=UsageError):
        weights = change(released_weights(theirs))
        # Of the right shapes, but all of one zero each: a small file.
        weights = {k: torch.zeros(()).expand(w.shape) for k, w in weights.items() if w is not None}
        torch.save({"model": weights}, tmp_path / "odd.pth")
        with pytest.raises(kind, match=message) as error:
            load_release(tmp_path / "odd.pth")
        assert "\n" not in str(error.value)

    bias = "image_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    focal = {"image_encoder.layers.0.blocks.0.modulation.f.weight": torch.zeros(3)}
    patches = {"image_encoder.patch_embed.proj.weight": torch.zeros(96, 3, 7, 7)}
    refused("has a FocalNet as image tower; only Swin", lambda w: w | patches | focal)
    davit = {"image_encoder.main_blocks.0.0.channel_block.x": torch.zeros(3)}
    refused("has a DaViT as image tower", lambda w: w | patches | davit)
    refused(
        "a Swin of width 96, depths 2-2-6-2 and window 8 as",
        lambda w: w | {bias: torch.zeros(225, 3)},
    )
    refused("no checkpoint of UniCL's release: it lacks image_encoder", lambda w: {})
    refused("it lacks image_projection", lambda w: w | {"image_projection": None})
    refused(
        "another tokenizer than CLIP's",
        lambda w: w | {"text_encoder.token_embedding.weight": torch.zeros(30522, 128)},
    )
    refused(
        "image_tower.model: norm.weight is missing",
        lambda w: w | {"image_encoder.norm.weight": None},
    )
    refused(
        "positional_embedding' is missing",
        lambda w: w | {"text_encoder.positional_embedding": None},
    )
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.pth: No such file"):
        load_release(tmp_path / "nowhere.pth")
    (tmp_path / "odd.pth").write_bytes((tmp_path / "odd.pth").read_bytes()[:1000])
    with pytest.raises(UniclError, match=r"odd.pth"):
        load_release(tmp_path / "odd.pth")
