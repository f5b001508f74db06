"""Plug-ins of the entry-point group, through one that is installed and one that is broken."""

import logging
import re
import subprocess
import sys
from copy import copy
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from unicl.cli import main
from unicl.config import (
    Plugin,
    evaluation_names,
    find_holder,
    find_picture,
    find_plugin,
    load_recipe,
    override_section,
    parse_recipe,
    plugin_names,
    plugins,
    recipe_names,
    recipe_to_toml,
    split_evaluation,
)
from unicl.errors import UniclError, UsageError


def test_the_installed_one_keeps_the_contract() -> None:
    assert "video" in plugin_names()
    assert isinstance(find_plugin("video"), Plugin)
    assert find_plugin("video").name == "video"


def test_its_recipes_stand_beside_the_others() -> None:
    assert {"demo", "video_classes", "video_captions"} <= set(recipe_names())
    recipe = load_recipe("video_classes", {"video.num_frames": "8"})
    assert type(recipe) is find_plugin("video").recipe
    assert recipe.video.num_frames == 8  # type: ignore[attr-defined]
    assert recipe.trainer.batch_size == 64


def test_a_recipe_with_a_section_of_a_plugin_comes_back_unchanged() -> None:
    overrides = {"video.time_windows": "2,4,4,8", "video.class_names": "[a dog, a cat]"}
    recipe = load_recipe("video_classes", overrides)
    assert recipe.video.class_names == ("a dog", "a cat")  # type: ignore[attr-defined]
    assert recipe.video.time_windows == (2, 4, 4, 8)  # type: ignore[attr-defined]
    assert parse_recipe(recipe_to_toml(recipe)) == recipe


@pytest.mark.parametrize("nothing", ["", "[]", "( )"])
def test_values_of_any_number_may_be_none(nothing: str) -> None:
    text = 'task = "video"\n[video]\ntime_windows = [2, 4]\n'
    keys = ("video.time_windows", "video.class_names")
    video = parse_recipe(text, dict.fromkeys(keys, nothing)).video  # type: ignore[attr-defined]
    assert (video.time_windows, video.class_names) == ((), ())
    with pytest.raises(UsageError, match="crop_scale must be 2 values"):
        parse_recipe(text, {"data.crop_scale": nothing})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "vidio"}, "no task 'vidio'; installed are pretraining, .*video"),
        ({"video.num_frames": "8"}, "unknown key video"),
        ({"task": "video", "video.num_frame": "8"}, "did you mean video.num_frames"),
        ({"task": "video", "video.num_crops": "2"}, "video.num_crops must be 1 or 3, got 2"),
        ({"task": "video", "video.time_windows": "2,x"}, "video.time_windows must be a whole"),
    ],
)
def test_a_mistake_is_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe("", overrides)


def test_a_task_is_a_text() -> None:
    with pytest.raises(UsageError, match="task must be a text, got 3"):
        parse_recipe("task = 3")


def test_evaluations_are_called_by_the_plugin_and_their_own_name() -> None:
    assert "video-retrieval" in evaluation_names()
    assert split_evaluation("video-zero-shot") == (find_plugin("video"), "zero-shot")
    assert split_evaluation("zero-shot") == (None, "zero-shot")
    assert split_evaluation("video") == (None, "video")


def test_one_section_is_overridden_strictly() -> None:
    video = load_recipe("video_captions").video  # type: ignore[attr-defined]
    changed = override_section(video, {"video.num_clips": "4"}, prefix="video")
    assert (changed.num_clips, changed.num_frames) == (4, video.num_frames)
    for overrides, message in (
        ({"video.num_clip": "4"}, "unknown key video.num_clip .did you mean video.num_clips"),
        ({"trainer.steps": "4"}, "unknown key trainer.steps"),
        ({"video": "4"}, "video is a section"),
    ):
        with pytest.raises(UsageError, match=message):
            override_section(video, overrides, prefix="video")


def _install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Install plug-ins by what their entry points name, beside the videos'."""
    values = {"video": "adapters.video.plugin:plugin", **values}
    entries = {name: EntryPoint(name, value, plugins.GROUP) for name, value in values.items()}
    monkeypatch.setattr(plugins, "_entries", lambda: entries)
    plugins.warn_once.cache_clear()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:plugin", "cannot be imported: No module named 'no_such_package'"),
        ("broken_plugin:plugin", "cannot be imported: division by zero"),
        ("adapters.video.plugin:none", "cannot be imported: module .* has no attribute 'none'"),
        ("adapters.video.plugin:VideoRecipe", "lacks something of unicl.config.Plugin"),
        ("adapters.video.plugin:plugin", "calls itself video"),
    ],
)
def test_one_that_is_broken_is_left_out_until_it_is_named(
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "broken_plugin.py").write_text("plugin = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    _install(monkeypatch, broken=value)
    assert "video_classes" in recipe_names()
    assert load_recipe("demo").name == "demo"
    assert {name.partition("-")[0] for name in evaluation_names()} == {"video"}
    assert find_holder(str(tmp_path)) is None
    assert find_picture(b"no video") is None
    (warning,) = set(caplog.messages)
    assert re.match(f"left out: the plug-in broken {message}", warning)
    for named in (lambda: parse_recipe("", {"task": "broken"}), lambda: find_plugin("broken")):
        with pytest.raises(UniclError, match=f"the plug-in broken {message}"):
            named()
    with pytest.raises(UniclError, match=message):
        split_evaluation("broken-zero-shot")


def test_a_recipe_takes_no_name_that_is_another_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: load_recipe(name) for name in ("demo", "video_classes")}
    for name in (*before, "own"):
        (tmp_path / f"{name}.toml").write_text('name = "of the other plug-in"')
    other = copy(find_plugin("video"))
    other.name, other.recipes = "zzz", tmp_path
    gone = copy(other)
    gone.name, gone.recipes = "gone", tmp_path / "nowhere"
    (tmp_path / "other_plugins.py").write_text("plugin = gone = None")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("other_plugins.plugin", other)
    monkeypatch.setattr("other_plugins.gone", gone)
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    _install(monkeypatch, zzz="other_plugins:plugin", gone="other_plugins:gone")
    for name, recipe in before.items():
        assert load_recipe(name) == recipe
    assert load_recipe("own").name == "of the other plug-in"
    told = [message.partition(";")[0] for message in dict.fromkeys(caplog.messages)]
    assert told[0].startswith("left out: the recipes of plug-in gone cannot be read: ")
    assert told[1:] == [f"left out: the recipe {name} of plug-in zzz" for name in before]


def test_asking_for_recipes_imports_no_torch() -> None:
    code = (
        "import sys; from unicl.config import load_recipe, evaluation_names;"
        "load_recipe('video_classes'); evaluation_names();"
        "assert not {'torch', 'av', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("lacking", ["add_commands", "evaluate"])
def test_one_that_can_do_half_of_its_task_is_left_out(
    lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "from adapters.detection.plugin import DetectionPlugin\n"
        "class Half:\n"
        "    name, recipe, recipes = 'half', DetectionPlugin.recipe, DetectionPlugin.recipes\n"
        "    evaluations, free_on_resume = ('map',), frozenset()\n"
        "    complete, build = DetectionPlugin.complete, DetectionPlugin.build\n"
        "    load, evaluate = DetectionPlugin.load, DetectionPlugin.evaluate\n"
        "    add_commands = DetectionPlugin.add_commands\n"
        f"del Half.{lacking}\n"
        "plugin = Half()\n"
    )
    (tmp_path / f"half_{lacking}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    _install(monkeypatch, half=f"half_{lacking}:plugin")
    assert {name.partition("-")[0] for name in evaluation_names()} == {"video"}
    (warning,) = set(caplog.messages)
    assert "the plug-in half lacks something of unicl.config.Medium or Skill" in warning
    with pytest.raises(UniclError, match=r"unicl\.config\.Medium or Skill"):
        find_plugin("half")


def test_commands_that_are_broken_cost_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(commands: object) -> None:
        raise ImportError("no module of mine")

    monkeypatch.setattr(find_plugin("detection"), "add_commands", fail, raising=False)
    _install(monkeypatch, detection="adapters.detection.plugin:plugin")
    seen: list[str] = []
    monkeypatch.setattr("unicl.cli.warn_once", seen.append)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert seen == ["left out: the commands of plug-in detection: no module of mine"]
