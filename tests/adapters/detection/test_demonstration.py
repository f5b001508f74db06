"""Both starts get the same adapter, data and steps; only one gets the towers."""

import math

import pytest

from adapters.detection import demonstration
from unicl.adapting import PRETRAINED, RANDOM
from unicl.data.augment import open_image
from unicl.evaluation.report import Report, Run, render
from unicl.models import read_recipe


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_NUM_TRAIN", 8), ("_NUM_VALID", 4), ("_SHOWN", 2)):
            patch.setattr(demonstration, name, value)
        folder = tmp_path_factory.mktemp("shown")
        return demonstration.demonstrate(runs / "towers", folder, steps=2), folder


def test_the_starts_differ_in_the_towers_alone(compared, runs):
    comparison, folder = compared
    recipes = [read_recipe(folder / name) for name in ("pretrained", "random")]
    assert recipes[0].weights == str(runs / "towers")
    assert recipes[1].weights is None
    for own in recipes:
        assert own.image_tower.model == "coswin_nano"
        assert own.text_tower.width == 16
        assert own.trainer.steps == 2
    assert list(comparison.curves) == [PRETRAINED, RANDOM]


def test_the_comparison_is_shown(compared):
    comparison, _ = compared
    assert comparison.metric == "detection/ap50"
    for rows in comparison.curves.values():
        values = [row[comparison.metric] for row in rows if comparison.metric in row]
        assert len(values) == 2
        assert all(math.isfinite(value) for value in values)
    assert len(comparison.shown) == 2
    for each in comparison.shown:
        assert len(each.found) == 2
        for image in filter(None, (each.image, *(found[0] for found in each.found))):
            open_image(image).load()
    page = render(Report(title="t", runs=[Run(name="r")], comparisons=[comparison]))
    assert comparison.title in page
    assert comparison.shown[0].text in page
