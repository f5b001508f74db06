import subprocess
import sys

import pytest

from adapters.detection.plugin import plugin
from unicl.config import Skill, evaluation_names, find_plugin, load_recipe, recipe_names
from unicl.evaluator import Options, evaluate


def test_it_is_installed():
    assert find_plugin("detection") is plugin
    assert isinstance(plugin, Skill)
    assert {"detection", "detection_fine_tune", "detection_proposals"} <= set(recipe_names())
    assert {f"detection-{name}" for name in plugin.evaluations} <= set(evaluation_names())


@pytest.mark.parametrize("name", ["detection", "detection_fine_tune", "detection_proposals"])
def test_its_recipes_are_whole(name):
    recipe = load_recipe(name, {"data.train": "somewhere"})
    assert type(recipe) is plugin.recipe
    assert recipe.task == "detection"
    assert (recipe.detection.classes == "none") == (name == "detection_proposals")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_imports_no_torch(words):
    code = (
        "import sys; from unicl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'pycocotools'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr


def test_evaluations_are_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(type(plugin), "evaluate", lambda self, *given: asked.append(given) or [])
    options = Options()
    assert evaluate("model", "detection-map", ["data"], options, {"a": "b"}) == []
    assert asked == [("map", "model", ["data"], options, {"a": "b"})]
