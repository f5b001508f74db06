"""A model by its name, wherever it is from."""

import json

import numpy as np
import open_clip
import pytest
import torch

from tests.unicl.towers.test_release import released_weights, theirs, write
from unicl import exporting, models
from unicl.config import Recipe, recipe_to_toml
from unicl.errors import UsageError
from unicl.exporting import export
from unicl.models import build_model, lasting_name, load, recipe_of
from unicl.towers import release
from unicl.towers.open_clip import load_open_clip

__all__ = ["theirs"]  # a fixture


def test_a_released_checkpoint_becomes_a_model_of_ours(theirs, tmp_path, monkeypatch):
    path = write(tmp_path / "unicl.pth", released_weights(theirs), monkeypatch)
    recipe = recipe_of(path)
    assert recipe.image_tower.model == "swin_tiny_patch4_window7_224"
    assert (recipe.text_tower.activation, recipe.text_tower.norm_eps) == ("quick_gelu", 1e-12)
    read = []
    load_once = release.load_release
    monkeypatch.setattr(release, "load_release", lambda p: read.append(p) or load_once(p))
    export(path, tmp_path / "ours", to="safetensors")
    assert read == [path]
    released, ours = load(path), load(tmp_path / "ours")
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    for model in (released, ours):
        assert not model.model.training
    images = [m.model.encode_image(pixels).detach().numpy() for m in (released, ours)]
    np.testing.assert_array_equal(*images)
    texts = [m.model.encode_text(m.tokenize(["a cat"])).detach().numpy() for m in (released, ours)]
    np.testing.assert_array_equal(*texts)
    assert released.fingerprint != ours.fingerprint  # they cut the same image differently


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small model of open_clip in a folder, without weights, from where paths are relative."""
    monkeypatch.chdir(tmp_path)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 64, "heads": 2, "layers": 1, "context_length": 20},
    }
    path = tmp_path / "theirs"
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return path


@pytest.mark.parametrize(
    ("name", "lasting"),
    [
        ("run", "{here}/run"),
        ("theirs", "{here}/theirs"),
        ("open_clip:theirs", "open_clip:local-dir:{here}/theirs"),
        ("open_clip:local-dir:theirs", "open_clip:local-dir:{here}/theirs"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32"),
        ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32/model.pt", "open_clip:ViT-B-32/{here}/model.pt"),
        ("open_clip:hf-hub:org/name", "open_clip:hf-hub:org/name"),
    ],
)
def test_a_name_that_lasts_holds_in_any_working_directory(name, lasting, folder):
    here = folder.parent
    for architecture in ("ViT-B-32", "openai"):  # folders beside, which no name means
        (here / architecture).mkdir()
    assert lasting_name(name) == lasting.format(here=here)
    assert lasting_name(lasting_name(name)) == lasting_name(name)


def test_towers_from_a_folder_are_found_again_from_elsewhere(folder, monkeypatch, tmp_path):
    recipe = recipe_of("theirs")
    monkeypatch.chdir("/")
    assert models.complete(recipe) == recipe
    assert build_model(recipe, start=False).image.name == f"open_clip:local-dir:{folder}"


def test_a_loaded_model_is_not_built_again_for_its_recipe(folder, monkeypatch):
    loaded = load_open_clip("theirs", weights=False)
    monkeypatch.setattr(models, "load_open_clip", None)
    recipe = recipe_of("open_clip:theirs", loaded)
    sizes = (recipe.embed_dim, recipe.image_tower.image_size, recipe.text_tower.context_length)
    assert sizes == (24, 32, 20)


@pytest.mark.parametrize(
    ("name", "found"),
    [("ViT-B-32", ""), ("ViT-B-32/openai", ""), ("theirs", "{}"), ("local-dir:theirs", "{}")],
)
def test_an_architecture_is_no_folder_of_its_name(name, found, folder, tmp_path):
    (tmp_path / "ViT-B-32" / "openai").mkdir(parents=True)
    recipe = Recipe(model=lasting_name(f"open_clip:{name}"))
    assert exporting._folder_of_open_clip(recipe) == found.format(folder)


def test_an_export_names_no_file_of_this_machine(folder, tmp_path):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-exported.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-exported.json")
    weights = open_clip.create_model("tiny-exported").state_dict()
    torch.save(weights, "weights.pt")
    export("open_clip:tiny-exported/weights.pt", tmp_path / "ours", to="safetensors")
    assert str(tmp_path) not in (tmp_path / "ours" / "recipe.toml").read_text()
    scale = load(tmp_path / "ours").model.logit_scale
    torch.testing.assert_close(scale[0], weights["logit_scale"])


def test_weights_are_no_folder_of_open_clip(tmp_path):
    (tmp_path / "open_clip_config.json").touch()
    with pytest.raises(UsageError, match=f"; set model to open_clip:{tmp_path}, and no weights"):
        build_model(Recipe(weights=str(tmp_path)))
    with pytest.raises(UsageError, match=f"or open_clip:FOLDER, got {tmp_path}; a run or a file"):
        Recipe(model=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no model nowhere: no such file or folder; other models are named"),
        ("ViT-B-32/openai", "there is no model ViT-B-32/openai: .* named open_clip:NAME"),
        ("laion/CLIP-ViT-B", "there is no model laion/CLIP-ViT-B: .* open_clip:hf-hub:ORG/NAME$"),
        ("./nowhere", "there is no model ./nowhere: no such file or folder$"),
        ("/nowhere/run", "there is no model /nowhere/run: no such file or folder$"),
        ("~/nowhere", "there is no model ~/nowhere: no such file or folder$"),
        ("photos", "photos is not a run: cannot read photos/recipe.toml: .*; name a run, a folder"),
        ("a.txt", "a.txt is not a run"),
        ("run/checkpoints/step-9", "there is no model run/checkpoints/step-9: .* folder$"),
        ("run/checkpoints/notes.txt", "no checkpoint run/checkpoints/notes.txt; there is none yet"),
        ("open_clip:ViT-B-33", "ViT-B-32"),
        ("open_clip:photos", "there is no photos/open_clip_config.json"),
        ("nowhere.pth", "there is no model nowhere.pth"),
    ],
)
def test_what_is_no_model_is_said(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "run" / "recipe.toml").write_text(recipe_to_toml(Recipe()))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "notes.txt").touch()
    with pytest.raises(UsageError, match=message):
        load(name)
