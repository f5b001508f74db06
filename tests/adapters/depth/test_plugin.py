"""A run on RGB goes on as a run on RGB and depth, and is evaluated as one."""

from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from adapters.depth.plugin import plugin
from adapters.depth.rgbd import join, part
from tests.adapters.depth.test_learning import write_shapes
from tests.unicl.corpus import small_recipe, write_corpus
from unicl.build import train
from unicl.config import Plugin, load_recipe, parse_recipe, plugins
from unicl.data.augment import open_image
from unicl.distributed import ALONE
from unicl.errors import UsageError
from unicl.evaluation.cache import Setting, decoder_of
from unicl.evaluation.protocols import zero_shot
from unicl.fine_tuning import fine_tuning_recipe
from unicl.models import load

QUICK = {"trainer.steps": "3", "trainer.device": "cpu", "data.num_workers": "0"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("depth", "adapters.depth.plugin:plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "_entries", lambda: {"depth": entry})


def test_fine_tuning_starts_as_the_rgb_model(tmp_path: Path) -> None:
    write_corpus(tmp_path / "pairs", num_samples=24)
    train(parse_recipe("", small_recipe(tmp_path / "pairs")), tmp_path / "rgb")
    write_shapes(tmp_path / "shapes")
    assert isinstance(plugin, Plugin)
    assert plugin.holds(str(tmp_path / "shapes"))
    training = plugin.open_set(str(tmp_path / "shapes"), split="train", root=tmp_path, kind=None)
    recipe = fine_tuning_recipe(tmp_path / "rgb", training, tmp_path / "shapes", QUICK, plugin)
    rgb = plugin.adapt(load(tmp_path / "rgb", device="cpu"), {})
    start = plugin.build(recipe, ALONE, start=True).task.model.eval()
    sample = training.read(0).image
    seen = torch.randint(0, 256, (1, 4, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        expected = rgb.model.encode_image(seen[:, :3])
        torch.testing.assert_close(start.encode_image(seen), expected)
    assert decoder_of(rgb)(sample, 0).shape == (3, 24, 24)
    run = train(recipe, tmp_path / "rgbd")
    tuned = load(run.path, device="cpu")
    assert decoder_of(tuned)(sample, 0).shape == (4, 24, 24)
    image = part(sample)[0]
    alone = tuned.transform(open_image(image), 0)
    assert torch.equal(decoder_of(tuned)(image, 0), alone)
    assert alone[3].max() == 0
    stem = tuned.model.image.backbone.patch_embed.proj.weight
    assert stem[:, 3].abs().max() > 0
    test = plugin.open_set(str(tmp_path / "shapes"), split="test", root=tmp_path, kind=None)
    result, _ = zero_shot(tuned, test, Setting(batch_size=16, num_workers=0))
    assert result.num_images == 48
    # Fine-tuned once more, it reads depth as it did.
    other = replace(recipe, depth=replace(recipe.depth, unit=0.0002))
    assert plugin.follow(load_recipe("depth_classes"), other).depth == other.depth
    far = plugin.adapt(tuned, {"depth.nearest": "5"})
    means = [decoder_of(model)(sample, 0)[3].float().mean() for model in (tuned, far)]
    assert means[1] > means[0]
    with pytest.raises(UsageError, match=r"depth\.unit has no effect: .* sees no depth"):
        plugin.adapt(rgb, {"depth.unit": "1"})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"depth\.unit must be positive"):
        load_recipe("depth_classes", {"depth.unit": "0"})
    with pytest.raises(UsageError, match="needs an image tower of four channels"):
        load_recipe("depth_classes", {"model": "open_clip:ViT-B-32"})
    with pytest.raises(UsageError, match="has classes, but captions are needed"):
        plugin.open_set("x", split="test", root=tmp_path, kind="captions")
    with pytest.raises(UsageError, match=r"trained on as they lie: unicl train depth_classes --d"):
        plugin.open_source("rooms")


def test_pictures() -> None:
    assert plugin.picture(join(b"image", b"depth")) == b"image"
    assert plugin.picture(b"image") is None
