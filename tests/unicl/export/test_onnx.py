"""Exported graphs, run by onnxruntime."""

import json
import re
import shutil
import sys

import onnx
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.unicl.export.towers import TEXTS, random_pixels, small_model
from unicl import exporting
from unicl.data.augment import EvalTransform
from unicl.errors import UniclError, UsageError
from unicl.export import onnx as export
from unicl.export.card import Card
from unicl.export.onnx import export_onnx
from unicl.models import load
from unicl.towers.text import tokenize


@pytest.mark.parametrize(
    ("image", "size", "text"),
    [("coswin_nano", 50, {"activation": "quick_gelu"}), ("test_resnet", 32, {"causal": False})],
)
def test_onnxruntime_gives_equal_embeddings(image, size, text, tmp_path, caplog, capfd):
    model = small_model(image, image_size=size, text=text)
    card = Card(name="Mine", metrics={"zero_shot/top1": 0.5})
    folder = export_onnx(model, tmp_path / "mine", image_size=size, context_length=20, card=card)
    assert model.training
    assert {path.name for path in folder.iterdir()} == {"image.onnx", "text.onnx", "README.md"}
    assert not capfd.readouterr().out
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    model.eval()
    inputs = {"image": ("pixels", random_pixels(size, 5)), "text": ("tokens", tokenize(TEXTS, 20))}
    for tower, (name, batch) in inputs.items():
        onnx.checker.check_model(folder / f"{tower}.onnx", full_check=True)
        session = onnxruntime.InferenceSession(folder / f"{tower}.onnx")
        encode = {"image": model.encode_image, "text": model.encode_text}[tower]
        for rows in (batch, batch[:1], batch[:2]):
            (theirs,) = session.run(["embeddings"], {name: rows.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(
                    torch.from_numpy(theirs), encode(rows), rtol=0, atol=1e-5
                )
    model.image.projection.weight.data.neg_()
    with pytest.raises(UniclError, match=r"the image tower differ by .*; nothing was exported"):
        export._compare(  # what looks before an export is called done
            export._Tower(model, "image"), inputs["image"][1], folder / "image.onnx", name="pixels"
        )
    text = (folder / "README.md").read_text()
    assert f"logits = {model.scale().item():.6g} * images @ texts.T" in text
    assert "| zero_shot/top1 | 0.5 |" in text


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    model = small_model("test_resnet", image_size=32).eval()
    folder = export_onnx(model, tmp_path / "mine", image_size=32, context_length=20, crop=0.875)
    photo = Image.fromarray(random_pixels(70, 1)[0, :, :50].permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    photo.save(folder / "photo.jpg", exif=exif)
    made = run_code_of(folder, monkeypatch)
    pixels = EvalTransform(32, crop=0.875)(Image.open("photo.jpg"))[None]
    with torch.no_grad():
        images = model.encode_image(pixels)
        texts = model.encode_text(tokenize(["a cat", "a dog"], 20))
    for ours, name in ((images, "images"), (texts, "texts")):
        torch.testing.assert_close(torch.from_numpy(made[name]), ours, rtol=0, atol=1e-4)


PLAIN = {"width": 64, "heads": 2, "layers": 1, "context_length": 20}
SIGLIP = {**PLAIN, "no_causal_mask": True, "pool_type": "last"}


@pytest.mark.parametrize(
    ("text", "own_tokens", "preprocess"),
    [
        (SIGLIP, True, {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3}),
        (PLAIN, True, {"resize_mode": "longest", "fill_color": 99}),
        (SIGLIP, False, {"resize_mode": "shortest"}),
    ],
)
def test_the_card_reads_as_open_clip_does(text, own_tokens, preprocess, tmp_path, monkeypatch):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": text | ({"tokenizer_kwargs": {"clean": "lower"}} if own_tokens else {}),
        "custom_text": True,
    }
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (theirs / "open_clip_config.json").write_text(json.dumps(content))
    weights = open_clip.create_model(f"local-dir:{theirs}", load_weights=False).state_dict()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        theirs / "open_clip_model.safetensors",
    )
    folder = exporting.export(theirs, tmp_path / "mine", to="onnx")
    card = (folder / "README.md").read_text()
    assert ('get_tokenizer("local-dir:theirs")' in card) == own_tokens
    assert ("the folder `theirs`, in open_clip's format" in card) == own_tokens
    assert str(tmp_path) not in card
    shutil.copytree(theirs, folder / "theirs")
    Image.fromarray(random_pixels(70, 1)[0, :, :51].permute(1, 2, 0).numpy()).save(
        folder / "photo.jpg"
    )
    made = run_code_of(folder, monkeypatch)
    own = load(theirs)
    with torch.no_grad():
        images = own.model.encode_image(own.transform(Image.open("photo.jpg"), 0)[None])
        texts = own.model.encode_text(own.tokenize(["a cat", "a dog"]))
    for ours, name in ((images, "images"), (texts, "texts")):
        torch.testing.assert_close(torch.from_numpy(made[name]), ours, rtol=0, atol=1e-4)


def run_code_of(folder, monkeypatch):
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    made = {}
    exec(code, made)
    return made


def test_a_tower_that_cannot_be_exported_is_one_line(tmp_path):
    model = small_model("test_resnet")
    model.image.forward = lambda images: torch.rand(int(images.sum()), 24)
    with pytest.raises(UniclError, match="torch cannot export the image tower: ") as error:
        export_onnx(model, tmp_path / "mine", image_size=32, context_length=20)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript: pip install 'unicl\[export\]'"):
        export_onnx(small_model(), tmp_path / "mine", image_size=48, context_length=20)


@pytest.mark.parametrize("error", [ValueError("no such\noperator"), OSError(28, "No space left")])
def test_a_graph_that_is_refused_is_one_line(tmp_path, monkeypatch, error):
    class Program:
        def save(self, path):
            raise error

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    expected = "cannot write .*: No space" if isinstance(error, OSError) else "tower: no such$"
    with pytest.raises(UniclError, match=expected):
        export_onnx(small_model(), tmp_path / "mine", image_size=48, context_length=20)
    assert list(tmp_path.iterdir()) == []
