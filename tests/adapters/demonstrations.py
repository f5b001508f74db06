"""What holds of every adapter that shows what a pair of towers is worth to it."""

import math

from unicl.adapting import PRETRAINED, RANDOM
from unicl.data.augment import open_image
from unicl.evaluation.report import Report, Run, render
from unicl.models import read_recipe


def check_starts(comparison, folder, towers):
    """The same adapter, data and steps; one gets the towers."""
    recipes = [read_recipe(folder / name) for name in ("pretrained", "random")]
    assert [own.weights for own in recipes] == [str(towers), None]
    for own in recipes:
        assert own.image_tower.model == "coswin_nano"
        assert own.text_tower.width == 16
        assert own.trainer.steps == 2
    assert list(comparison.curves) == [PRETRAINED, RANDOM]


def check_shown(comparison, metric, count):
    """Figures of both, and pictures that a page can show."""
    assert comparison.metric == metric
    for rows in comparison.curves.values():
        values = [row[metric] for row in rows if metric in row]
        assert len(values) == 2
        assert all(math.isfinite(value) for value in values)
    assert len(comparison.shown) == count
    for each in comparison.shown:
        assert len(each.found) == 2
        for image in filter(None, (each.image, *(found[0] for found in each.found))):
            open_image(image).load()
    page = render(Report(title="t", runs=[Run(name="r")], comparisons=[comparison]))
    assert comparison.title in page
    assert comparison.shown[0].text in page
