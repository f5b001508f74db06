"""The demo's adaptations: which plug-ins show theirs, and what the page says of them."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.depth.plugin import plugin as depth
from adapters.vqa.plugin import VqaPlugin
from unicl import demo
from unicl.adapting import PRETRAINED, RANDOM, last
from unicl.config import Demonstrated, Recipe, TrainerConfig, working_plugins
from unicl.errors import UsageError
from unicl.evaluation.report import Comparison, Report, Run, Shown, render

ROWS = {
    PRETRAINED: [{"step": 5, "vqa/accuracy": 0.25}, {"step": 9, "vqa/accuracy": 0.75}],
    RANDOM: [{"step": 5, "vqa/accuracy": 0.125}, {"step": 9}],
}
COMPARISON = Comparison(
    title="Question answering",
    words="Some words.",
    metric="vqa/accuracy",
    called="VQA's accuracy",
    curves=ROWS,
    shown=[Shown(text="what is <b>?", found=[(None, "a key", True), (None, "a bus", False)])],
)


class Shows(VqaPlugin):
    """Shows what it is given."""

    def demonstrate(self, towers, folder, *, steps):
        self.asked = (towers, folder, steps)
        return COMPARISON


class Lacks(VqaPlugin):
    """Lacks a library."""

    name = "lacks"

    def demonstrate(self, towers, folder, *, steps):
        raise UsageError("videos need PyAV")


def test_the_adapters_show_what_towers_are_worth():
    names = [each.name for each in working_plugins() if isinstance(each, Demonstrated)]
    assert names == ["detection", "video", "vqa"]


def test_each_plugin_gets_a_third_of_the_steps(monkeypatch, caplog):
    shows = Shows()
    monkeypatch.setattr(demo, "working_plugins", lambda: [depth, Lacks(), shows])
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    recipe = Recipe(trainer=TrainerConfig(steps=1290))
    found = demo._adapt(Path("run"), Path("adapted"), recipe)
    assert found == [COMPARISON]
    assert shows.asked == (Path("run"), Path("adapted/vqa"), 430)
    assert "left out: lacks: videos need PyAV" in caplog.text
    demo._adapt(Path("run"), Path("adapted"), replace(recipe, trainer=TrainerConfig(steps=1)))
    assert shows.asked[2] == 1


def test_the_page_shows_both_starts():
    page = render(Report(title="t", runs=[Run(name="r")], comparisons=[COMPARISON]))
    assert "One pair of towers" in page
    row = page[page.index("<td") : page.index("</tr>", page.index("<td"))]
    assert "75.0%" in row
    assert "12.5%" in row
    assert row.index("75.0%") < row.index("12.5%")
    assert "what is &lt;b&gt;?" in page
    assert "a key &#10003;" in page
    assert "a bus &#10003;" not in page
    assert "One pair of towers" not in render(Report(title="t", runs=[Run(name="r")]))


def test_the_last_value_is_the_last_that_is_there():
    assert last(ROWS[PRETRAINED], "vqa/accuracy") == 0.75
    assert last(ROWS[RANDOM], "vqa/accuracy") == 0.125


@pytest.mark.parametrize("rows", [[], [{"step": 3}]])
def test_a_start_without_figures_is_a_dash(rows):
    bare = replace(COMPARISON, curves={PRETRAINED: ROWS[PRETRAINED], RANDOM: rows}, shown=())
    page = render(Report(title="t", runs=[Run(name="r")], comparisons=[bare]))
    assert "<td>75.0%</td><td>-</td>" in page
