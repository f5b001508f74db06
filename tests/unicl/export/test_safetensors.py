"""Our own format, its card, and the folder that it goes into."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.unicl.export.towers import random_pixels, small_model
from unicl.data.tensors import write_tensors
from unicl.errors import UniclError, UsageError
from unicl.export import safetensors as export
from unicl.export.card import Card, render
from unicl.export.folder import new_folder
from unicl.export.safetensors import export_safetensors


def test_the_folder_holds_the_whole_model(tmp_path):
    model, recipe = small_model().eval(), 'name = "mine"\n'
    folder = export_safetensors(model, tmp_path / "mine", recipe=recipe)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "model.safetensors", "recipe.toml",
    }  # fmt: skip
    assert (folder / "recipe.toml").read_text() == recipe
    again = small_model(text={"activation": "gelu"}).eval()
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = random_pixels(48)
    assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))


def test_hubs_read_the_card(tmp_path):
    card = Card(
        name="Mine: the 1st",
        license="cc-by-4.0",
        description="A small one.",
        trained_on="Twelve pictures.",
        tags=["no", 'a "quoted" one: yes', "clip"],
        metrics={"zero_shot/top1": 0.123456, "steps": 100},
    )
    folder = export_safetensors(small_model(), tmp_path / "mine", recipe="", card=card)
    read = ModelCard.load(folder / "README.md")
    assert read.data.license == "cc-by-4.0"
    assert read.data.library_name == "unicl"
    assert read.data.pipeline_tag == "zero-shot-image-classification"
    assert read.data.tags == ["clip", "unicl", "no", 'a "quoted" one: yes']
    for line in ("# Mine: the 1st", "A small one.", "Twelve pictures.", "| steps | 100 |"):
        assert line in read.text
    assert "| zero_shot/top1 | 0.1235 |" in read.text
    bare = render(Card(name="x"), library="unicl", usage="pass")
    assert "Not stated." in bare
    assert "Metrics" not in bare
    assert json.dumps(ModelCard(bare).data.license) == '"other"'


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    export_safetensors(small_model(), tmp_path / "mine", recipe="")  # empty: may be used
    before = (tmp_path / "mine/README.md").read_bytes()
    with pytest.raises(UsageError, match="mine is there already; remove it, or choose another"):
        export_safetensors(small_model(), tmp_path / "mine", recipe="", card=Card(name="other"))
    assert (tmp_path / "mine/README.md").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is there already"):
        export_safetensors(small_model(), tmp_path / "file", recipe="")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing(tmp_path, error):
    expected = UniclError if isinstance(error, OSError) else KeyboardInterrupt

    def fail():
        with new_folder(tmp_path / "in" / "mine") as partial:
            (partial / "half").write_text("half")
            assert not (tmp_path / "in" / "mine").exists()
            raise error

    with pytest.raises(expected):
        fail()
    assert list((tmp_path / "in").iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UniclError, match=r"cannot write .*mine: Not a directory") as error:
        export_safetensors(small_model(), tmp_path / "file" / "mine", recipe="")
    assert "\n" not in str(error.value)


def test_the_present_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"cannot write \.: .*; choose another place"):
        export_safetensors(small_model(), Path("."), recipe="")


@pytest.mark.parametrize("damage", ["a bit", "a name"])
def test_what_comes_back_is_compared(tmp_path, monkeypatch, damage):
    def save_otherwise(path, weights, **options):
        weights = {name: weight.clone() for name, weight in weights.items()}
        if damage == "a bit":
            weights["logit_scale"].view(torch.int32).bitwise_xor_(1)
        else:
            del weights["logit_scale"]
        write_tensors(path, weights, **options)

    model = small_model()
    model.text.projection.weight.data[0, 0] = torch.nan  # equals itself here
    export_safetensors(model, tmp_path / "mine", recipe="")
    monkeypatch.setattr(export, "write_tensors", save_otherwise)
    with pytest.raises(UniclError, match="logit_scale comes back otherwise than it was"):
        export_safetensors(model, tmp_path / "other", recipe="")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
