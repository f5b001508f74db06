"""A model by its name, wherever it is from."""

import numpy as np
import pytest
import torch

from tests.unicl.towers.test_release import released_weights, theirs, write
from unicl.errors import UniclError, UsageError
from unicl.exporting import export
from unicl.models import load, recipe_of

__all__ = ["theirs"]  # a fixture


def test_a_released_checkpoint_becomes_a_model_of_ours(theirs, tmp_path, monkeypatch):
    path = write(tmp_path / "unicl.pth", released_weights(theirs), monkeypatch)
    recipe = recipe_of(path)
    assert recipe.image_tower.model == "swin_tiny_patch4_window7_224"
    assert (recipe.text_tower.activation, recipe.text_tower.norm_eps) == ("quick_gelu", 1e-12)
    export(path, tmp_path / "ours", to="safetensors")
    released, ours = load(path), load(tmp_path / "ours")
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    for model in (released, ours):
        assert not model.model.training
    images = [m.model.encode_image(pixels).detach().numpy() for m in (released, ours)]
    np.testing.assert_array_equal(*images)
    texts = [m.model.encode_text(m.tokenize(["a cat"])).detach().numpy() for m in (released, ours)]
    np.testing.assert_array_equal(*texts)
    assert released.fingerprint != ours.fingerprint  # they cut the same image differently


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", UniclError, "nowhere is not a run"),
        ("open_clip:ViT-B-33", UsageError, "ViT-B-32"),
        ("nowhere.pth", UniclError, "nowhere.pth"),
    ],
)
def test_what_is_no_model_is_said(name, error, message):
    with pytest.raises(error, match=message):
        load(name)
