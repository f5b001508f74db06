import subprocess
import sys

import pytest

from adapters.vqa.plugin import plugin
from unicl.config import Skill, evaluation_names, find_plugin, load_recipe, recipe_names
from unicl.evaluator import Options, evaluate


def test_it_is_installed():
    assert find_plugin("vqa") is plugin
    assert isinstance(plugin, Skill)
    assert {"vqa_pretraining", "vqa", "captioning"} <= set(recipe_names())
    names = {"vqa-accuracy", "vqa-captions", "vqa-rerank"}
    assert names == {name for name in evaluation_names() if name.startswith("vqa-")}


@pytest.mark.parametrize("name", ["vqa_pretraining", "vqa", "captioning"])
def test_its_recipes_are_whole(name):
    recipe = load_recipe(name, {"data.train": "somewhere", "weights": "run"})
    assert type(recipe) is plugin.recipe
    assert recipe.task == "vqa"
    assert recipe.name == name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "answer questions about an image"),
        (["answer", "--help"], "--top-k"),
        (["caption", "--help"], "--vqa.num_beams"),
        (["train", "--help"], "vqa_pretraining"),
        (["eval", "--help"], "vqa-rerank"),
    ],
)
def test_help_imports_no_torch(words, said):
    code = (
        "import sys; from unicl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    assert said in " ".join(done.stdout.split())


def test_evaluations_are_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(type(plugin), "evaluate", lambda self, *given: asked.append(given) or [])
    options = Options()
    assert evaluate("model", "vqa-rerank", ["data"], options, {"a": "b"}) == []
    assert asked == [("rerank", "model", ["data"], options, {"a": "b"})]
