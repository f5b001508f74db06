"""Models of open_clip as our towers, beside open_clip's own embeddings and pixels."""

import json
import logging
import pickle
import struct
import threading
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import cosswin  # noqa: F401 - registers coswin_nano with timm, for open_clip too
from unicl.errors import UniclError, UsageError
from unicl.towers.open_clip import (
    OpenClipTextTower,
    OpenClipTokenizer,
    load_open_clip,
    quiet,
)
from unicl.towers.text import TextTower

TEXT = {"width": 64, "heads": 2, "layers": 2, "context_length": 20, "vocab_size": 49408}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2}
SIGLIP_TEXT = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
CONFIGS = {
    "tiny": {"vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-quickgelu": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "tiny-coswin": {
        "vision_cfg": {"timm_model_name": "coswin_nano", "timm_pool": "", "image_size": 48},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": TEXT,
    },
    "tiny-coca": {
        "vision_cfg": {**VIT, **POOLER, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "tiny-siglip": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160},
        "text_cfg": {**TEXT, **SIGLIP_TEXT},
        "init_logit_bias": -10,
        "custom_text": True,
    },
}  # fmt: skip
PROJECTIONS = (
    *("projection.weight", "projection.proj.weight"),
    *("text.text_projection", "text.text_projection.bias"),
)
OURS = {"tiny", "tiny-quickgelu", "tiny-coswin", "tiny-resnet"}
TEXTS = ["a photo of a cat", "!", "a cat", "two dogs that chase a red ball", "a cat"]


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    for registry in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        kept = getattr(open_clip.factory, registry)
        monkeypatch.setattr(open_clip.factory, registry, type(kept)(kept))
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 24, **config}))
    open_clip.add_model_config(tmp_path)


def their_model(name, seed=0):
    torch.manual_seed(seed)
    model = open_clip.create_model(name).eval()
    for parameter in model.parameters():  # norms, biases and the scale are not random by themselves
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def saved(model, path):
    save_file({k: w.contiguous() for k, w in model.state_dict().items()}, path)
    return path


def picture(width=90, height=70, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_and_scale_are_open_clips(name, tmp_path):
    theirs = their_model(name)
    ours = load_open_clip(f"{name}/{saved(theirs, tmp_path / 'weights.safetensors')}")
    assert isinstance(ours.model.text, TextTower) == (name in OURS)
    assert not ours.model.training

    images = torch.randint(0, 256, (3, 3, ours.image_size, ours.image_size), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (theirs.visual.image_mean, theirs.visual.image_std)
    )
    floats = (images / 255 - mean) / std
    tokens = ours.tokenize(TEXTS)
    assert tokens.shape == (5, ours.context_length) == (5, 20)
    with torch.no_grad():
        expected = F.normalize(theirs.encode_image(floats), dim=-1)
        torch.testing.assert_close(ours.model.encode_image(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.model.encode_image(floats), expected, rtol=0, atol=1e-5)
        expected = F.normalize(theirs.encode_text(tokens), dim=-1)
        torch.testing.assert_close(ours.model.encode_text(tokens), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.model.scale(), theirs.logit_scale.exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_into_a_freshly_made_model(name, tmp_path):
    file = saved(their_model(name), tmp_path / "weights.safetensors")
    trained, fresh = (
        load_open_clip(f"{name}/{file}"),
        load_open_clip(f"{name}/{file}", weights=False),
    )
    assert fresh.identity == trained.identity
    images, tokens = torch.rand(2, 3, fresh.image_size, fresh.image_size), fresh.tokenize(TEXTS)
    with torch.no_grad():
        before, expected = fresh.model(images, tokens), trained.model(images, tokens)
        assert (before[0] - expected[0]).abs().max() > 1e-3
        fresh.model.load_state_dict(trained.model.state_dict())
        for ours, theirs in zip(fresh.model(images, tokens), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_probe_sees_the_features_before_the_projection(name, tmp_path):
    theirs = their_model(name)
    ours = load_open_clip(f"{name}/{saved(theirs, tmp_path / 'weights.safetensors')}")
    if hasattr(theirs.visual, "head"):
        theirs.visual.head = torch.nn.Identity()
    elif name != "tiny-resnet":  # whose projection is part of the pooling
        theirs.visual.proj = None
    images = torch.rand(2, 3, ours.image_size, ours.image_size)
    with torch.no_grad():
        expected = theirs.visual(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        embeddings, pooled = ours.model.encode_image_twice(images)
        torch.testing.assert_close(pooled, expected)
        assert torch.equal(embeddings, ours.model.encode_image(images))


def test_a_scale_above_the_usual_bound_is_kept(tmp_path):
    theirs = their_model("tiny-siglip")
    theirs.logit_scale.data.fill_(5.0)
    name = f"tiny-siglip/{saved(theirs, tmp_path / 'weights.safetensors')}"
    fresh = load_open_clip(name, weights=False).model
    fresh.load_state_dict(load_open_clip(name).model.state_dict())
    torch.testing.assert_close(fresh.scale().item(), np.exp(5.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_are_open_clips(resize_mode, mode, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 24, **CONFIGS["tiny"]}}
    config["preprocess_cfg"] = {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
        "resize_mode": resize_mode, "interpolation": "bilinear", "fill_color": 7,
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    saved(their_model("tiny"), folder / "open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ours = load_open_clip(f"local-dir:{folder}")
    image = picture(mode=mode)
    pixels = ours.transform(image, 3)
    assert pixels.dtype == torch.uint8
    normalised = (pixels[None] - ours.model.image.mean) / ours.model.image.std
    torch.testing.assert_close(normalised, preprocess(image)[None], rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = F.normalize(model.eval().encode_image(preprocess(image)[None]), dim=-1)
        ours_ = ours.model.encode_image(pixels[None])
    torch.testing.assert_close(ours_, expected, rtol=0, atol=1e-5)


def test_an_image_that_cannot_be_decoded_is_an_os_error(monkeypatch):
    def load(self):
        raise struct.error("unpack requires")

    ours, image = load_open_clip("tiny", weights=False), picture()
    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(OSError, match="unpack requires"):
        ours.transform(image, 0)


def test_pieces_can_be_sent_to_other_processes():
    ours = load_open_clip("tiny", weights=False)
    transform, tokenize = pickle.loads(pickle.dumps((ours.transform, ours.tokenize)))
    assert torch.equal(transform(picture(), 0), ours.transform(picture(), 0))
    assert torch.equal(tokenize(TEXTS), ours.tokenize(TEXTS))


def test_another_tokenizer_is_loaded_once_in_each_process(monkeypatch):
    loaded = []

    def get_tokenizer(name):
        loaded.append(name)
        return lambda texts: torch.tensor([[len(text)] for text in texts])

    monkeypatch.setattr("open_clip.get_tokenizer", get_tokenizer)
    tokenize = OpenClipTokenizer("siglip")
    for each in (tokenize, pickle.loads(pickle.dumps(tokenize))):
        for _ in range(2):
            assert each(("a cat", "!")).tolist() == [[5], [1]]
    assert loaded == ["siglip", "siglip"]


def test_published_weights_decide_activation_and_pixels(tmp_path, monkeypatch):
    theirs = their_model("tiny-quickgelu")
    file = saved(theirs, tmp_path / "published.safetensors")
    tag = {"file": str(file), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"some_tag": tag})
    for name, weights in (("tiny/some_tag", True), ("tiny/Some-Tag", False)):
        ours = load_open_clip(name, weights=weights)
        assert ours.model.text.activation == "quick_gelu"
        torch.testing.assert_close(ours.model.image.mean.flatten(), torch.tensor([25.5, 51, 76.5]))
        if weights:
            images = torch.rand(2, 3, 32, 32)
            expected = F.normalize(theirs.encode_image(images), dim=-1)
            torch.testing.assert_close(ours.model.encode_image(images), expected, rtol=0, atol=1e-5)
    assert load_open_clip("tiny", weights=False).identity != ours.identity


def test_a_checkpoint_of_open_clips_trainer_loads(tmp_path):
    theirs = their_model("tiny")
    state = {f"module.{name}": weight for name, weight in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    ours = load_open_clip(f"tiny/{tmp_path}/epoch_3.pt")
    images = torch.rand(2, 3, 32, 32)
    expected = F.normalize(theirs.encode_image(images), dim=-1)
    torch.testing.assert_close(ours.model.encode_image(images), expected, rtol=0, atol=1e-5)


def test_random_weights_are_called_so_in_one_line(caplog, capsys):
    handlers = list(logging.getLogger().handlers)
    load_open_clip("tiny")
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("unicl", "open_clip:tiny has random weights; open_clip:tiny/TAG has trained ones")
    ]
    load_open_clip("tiny", weights=False)
    assert len(caplog.records) == 1
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23", r"no architecture 'ViT-B-23'; did you mean ViT-B-32"),
        ("ViT-B-32/opneai", r"no weights 'opneai' of ViT-B-32; did you mean openai"),
        ("tiny/laion2b", r"no weights 'laion2b' of tiny; it has none"),
        ("ViT-B-32/some/file.pt", r"there is no file some/file.pt; give one, or a tag"),
        ("local-dir:nowhere", r"there is no nowhere/open_clip_config.json"),
        ("hf-hub:alone", r"must be open_clip:hf-hub:ORG/NAME"),
        ("", r"open_clip has no architecture ''; see open_clip.list_models"),
    ],
)
def test_what_is_not_there_is_said(name, message):
    with pytest.raises(UsageError, match=message) as error:
        load_open_clip(name)
    assert "\n" not in str(error.value)


def test_a_run_that_goes_on_needs_no_file():
    assert load_open_clip("tiny//gone/weights.pt", weights=False).image_size == 32
    with pytest.raises(UsageError, match=r"no file /gone/weights.pt"):
        load_open_clip("tiny//gone/weights.pt")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_do_not_fit_or_are_damaged(tmp_path, capsys):
    file = saved(their_model("tiny-resnet"), tmp_path / "resnet.safetensors")
    with pytest.raises(
        UsageError, match="weights are of another architecture: Missing key"
    ) as error:
        load_open_clip(f"tiny/{file}")
    assert "\n" not in str(error.value)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="holds more than weights, and is not executed"):
        load_open_clip(f"tiny/{tmp_path}/evil.pt")
    assert "executed" not in capsys.readouterr().out.split()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UniclError, match="the weights are damaged"):
        load_open_clip(f"tiny-resnet/{file}")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UniclError, match=r"open_clip_config.json is damaged"):
        load_open_clip(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UsageError, match="lacks model_cfg"):
        load_open_clip(f"local-dir:{tmp_path}")


def test_a_folder_without_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 24, **CONFIGS["tiny"]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the folder has no weights"):
        load_open_clip(f"local-dir:{folder}")
    assert load_open_clip(f"local-dir:{folder}", weights=False).image_size == 32


def test_threads_that_load_leave_the_log_as_it_was():
    level, inside, leave = logging.getLogger().level, threading.Event(), threading.Event()

    def load():
        with quiet():
            inside.set()
            leave.wait()

    other = threading.Thread(target=load)
    with quiet():
        other.start()
        inside.wait(timeout=0.2)
    leave.set()
    other.join()
    assert logging.getLogger().level == level


@pytest.mark.parametrize("answers", [False, True])
def test_without_a_network_the_line_says_from_where_and_to_where(
    answers, monkeypatch, tmp_path, caplog
):
    def offline(*args, **options):
        raise OSError("no network\nin here")

    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    head = (lambda url, timeout: None) if answers else offline
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))  # open_clip makes a folder for what it downloads
    tags = {"tag": {"hf_hub": "org/tiny/", "url": "x"}, "old": {"url": "file:///nowhere/old.pt"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    place = r"from https://\S+/org/tiny to \S+: .*; fetch it"
    with pytest.raises(UniclError, match=f"cannot download open_clip:tiny/tag {place}") as error:
        load_open_clip("tiny/tag")
    assert "\n" not in str(error.value)
    assert caplog.messages[0].startswith("fetching open_clip:tiny/tag from https://")
    with pytest.raises(UniclError, match=f"cannot download open_clip:hf-hub:org/tiny {place}"):
        load_open_clip("hf-hub:org/tiny")
    place = "from file:///nowhere/old.pt to ~/.cache/clip"
    with pytest.raises(UniclError, match=f"cannot download open_clip:tiny/old {place}"):
        load_open_clip("tiny/old")
    load_open_clip("tiny/tag", weights=False)  # needs none
    monkeypatch.setattr("open_clip.get_tokenizer", offline)
    with pytest.raises(UniclError, match="cannot load the tokenizer of siglip: no network; it "):
        OpenClipTokenizer("siglip")(["a cat"])


def test_a_model_on_a_hub_gives_its_configuration_without_its_weights(monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    config = {
        "model_cfg": {"embed_dim": 24, **CONFIGS["tiny"]},
        "preprocess_cfg": {"mean": [0.5] * 3},
    }
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(config))
    theirs = their_model("tiny")
    saved(theirs, tmp_path / "hub" / "open_clip_model.safetensors")
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / "hub" / filename)

    session = SimpleNamespace(head=lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fresh = load_open_clip("hf-hub:org/tiny", weights=False)
    assert set(asked) == {("org/tiny", "open_clip_config.json")}
    trained = load_open_clip("hf-hub:org/tiny")
    assert ("org/tiny", "open_clip_model.safetensors") in asked
    assert trained.identity == fresh.identity
    assert trained.model.image.mean.flatten().tolist() == [127.5] * 3
    images = torch.rand(2, 3, 32, 32)
    expected = F.normalize(theirs.encode_image(images), dim=-1)
    torch.testing.assert_close(trained.model.encode_image(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny-resnet"])
def test_checkpointing_keeps_the_gradients(name):
    model = load_open_clip(name, weights=False).model
    images = torch.rand(2, 3, *[CONFIGS[name]["vision_cfg"]["image_size"]] * 2)
    tokens = open_clip.tokenize(TEXTS, context_length=20)

    def gradients():
        i, t, scale = model(images, tokens)
        return torch.autograd.grad((i[:1] @ t.T).sum() * scale, list(model.parameters()))

    plain = gradients()
    model.image.set_grad_checkpointing()
    model.text.set_grad_checkpointing()
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_numbered(name):
    model = load_open_clip(name, weights=False).model
    if name == "tiny-resnet":
        for call in (model.image.layer_depths, model.image.set_grad_checkpointing):
            with pytest.raises(UsageError, match="has no effect on open_clip:tiny-resnet"):
                call()
        return
    for tower in (model.image, model.text):
        depths = tower.layer_depths()
        assert depths.keys() == dict(tower.named_parameters()).keys()
        assert set(depths.values()) == set(range(max(depths.values()) + 1))
        assert any(depths.get(name) == max(depths.values()) for name in PROJECTIONS)
    if name == "tiny":
        depths = model.image.layer_depths()
        block = "visual.transformer.resblocks.1.attn.in_proj_weight"
        assert [
            depths[n]
            for n in ("visual.conv1.weight", block, "visual.ln_post.bias", "projection.weight")
        ] == [0, 2, 2, 3]


def test_wrapped_text_towers_see_their_padding():
    tower = load_open_clip("tiny-siglip", weights=False).model.text
    assert isinstance(tower, OpenClipTextTower)
    assert tower.trims is False
