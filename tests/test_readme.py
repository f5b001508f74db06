"""Every command and every piece of code in the README runs, in the order it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import motion, quiz, scenes
from tests.unicl.corpus import COLOURS, png
from unicl.cli import main
from unicl.data import twemoji
from unicl.data.twemoji import read_catalogue

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The demo in seconds: the same path, fewer steps, one emoji of a hundred.
SHORT = "--trainer.steps 3 --trainer.batch_size 32 --schedule.warmup_steps 1"


def blocks():
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def stand_in(command):
    """What a test runs instead of a command that installs or takes minutes."""
    if command.startswith("make "):
        return f"make --dry-run {command.removeprefix('make ')} -C {shlex.quote(str(ROOT))}"
    if match := re.fullmatch(r'pip install -e "\.\[(video|detection|vqa)\]"', command):
        packages = {"video": "av", "detection": "pycocotools, yaml", "vqa": "pycocoevalcap"}
        return f"{shlex.quote(sys.executable)} -c 'import {packages[match[1]]}'"
    return command


def run(words, folder, **kwargs):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(command, folder):
    words = shlex.split(command)
    if words[0] == "unicl":  # in this process, which has imported everything already
        assert main(words[1:]) == 0, command
    else:
        said = run(["bash", "-c", stand_in(command)], folder)
        if command == "make demo":
            assert "/unicl demo\n" in said
            follow(f"unicl demo {SHORT}", folder)


def few_emoji():
    whole = read_catalogue()
    return replace(whole, emoji=whole.emoji[::100])


@pytest.mark.slow
def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNICL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(twemoji, "read_catalogue", few_emoji)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for number, colour in enumerate(COLOURS):
        folder = tmp_path / "photos" / colour
        folder.mkdir(parents=True)
        for copy in range(4):
            (folder / f"{copy}.png").write_bytes(png(colour, 10 * number + copy))
    for part in ("train", "test"):
        motion.write_class_folder(tmp_path / "clips" / part, 12, seed=len(part))
    scenes.write_scenes(tmp_path / "boxes", num_train=8, num_valid=4, num_test=4)
    quiz.write_questions(tmp_path / "questions", num_train=6, num_val=3)
    kinds = []
    for kind, text in blocks():
        kinds.append(kind)
        if kind == "bash":
            for command in filter(None, re.sub(r"\\\n", " ", text).splitlines()):
                follow(command, tmp_path)
        elif kind == "python":
            exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    assert kinds.count("bash") >= 3
    assert kinds.count("python") >= 2
    report = (tmp_path / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert "Twemoji, copyright Twitter" in report


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = (text for kind, text in blocks() if kind == "text" and "cosswin/" in text)
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), name
        else:
            assert (folder / name).exists(), name


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:unicl|cosswin|adapters|benchmarks|tests)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
