"""`unicl detect`: tables, JSON lines, pictures, and mistakes in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicl import Predictor
from unicl.cli import main

LOW = ("--threshold", "0.001", "--device", "cpu")


@pytest.fixture
def images(runs, tmp_path) -> Path:
    """A folder of two images, one of them in a folder of its own."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    shutil.copy(runs / "scenes/test/000000.png", folder / "a.png")
    with Image.open(runs / "scenes/test/000001.png") as image:
        image.save(folder / "more/b.JPG", "JPEG")
    (folder / "notes.txt").write_text("no image")
    return folder


def detect(*words: object) -> int:
    return main(["detect", *map(str, words), *LOW])


def test_lines_of_json_are_what_the_predictor_finds(runs, images, capsys):
    assert detect(runs / "texts", images / "a.png", "--names", "dog, ball", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (found,) = Predictor.load(runs / "texts", device="cpu").detect(
        [images / "a.png"], ["dog", "ball"], threshold=0.001
    )
    assert lines
    assert [line["file"] for line in lines] == [str(images / "a.png")] * len(found)
    assert [line["name"] for line in lines] == [each.name for each in found]
    np.testing.assert_allclose(
        [line["score"] for line in lines], [f.score for f in found], atol=1e-5
    )
    np.testing.assert_allclose([line["box"] for line in lines], [f.box for f in found], atol=0.01)


def test_a_folder_is_looked_at_and_drawn(runs, images, tmp_path, capsys):
    out = tmp_path / "out"
    before = (images / "a.png").read_bytes()
    assert detect(runs / "none", images, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "object" in shown
    drawn = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert drawn == ["a.png", "more/b.JPG"]
    with Image.open(out / "more/b.JPG") as picture:
        assert picture.format == "JPEG"
    with Image.open(out / "a.png") as picture, Image.open(images / "a.png") as original:
        assert picture.size == original.size
        assert (np.asarray(picture) != np.asarray(original)).any()
    assert (images / "a.png").read_bytes() == before


def test_no_input_is_overwritten_and_no_picture_another(runs, images, tmp_path, capsys):
    assert detect(runs / "texts", images, "--out", images) == 2
    assert "would overwrite the image" in capsys.readouterr().err
    link = tmp_path / "link"
    link.symlink_to(images)
    assert detect(runs / "texts", images / "a.png", "--out", link) == 2
    assert detect(runs / "texts", (images / "a.png").as_uri(), "--out", images) == 2
    assert "would overwrite the image" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    shutil.copy(images / "a.png", tmp_path / "other/a.png")
    shutil.copy(images / "a.png", tmp_path / "other/a.gif")
    out, other = tmp_path / "out", tmp_path / "other"
    words = (images / "a.png", other / "a.png", other / "a.gif", (images / "a.png").as_uri())
    assert detect(runs / "texts", *words, "--out", out) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["a-2.png", "a-3.png", "a.gif.png", "a.png"]


def test_a_damaged_image_does_not_keep_the_others(runs, images, capsys):
    (images / "aa.png").write_bytes((images / "a.png").read_bytes()[:400])
    assert detect(runs / "texts", images, "--json") == 1
    shown = capsys.readouterr()
    files = {json.loads(line)["file"] for line in shown.out.splitlines()}
    assert files == {str(images / "a.png"), str(images / "more/b.JPG")}
    assert f"left out: cannot read {images / 'aa.png'}" in shown.err
    assert "1 of 3 images could not be read" in shown.err
    assert detect(runs / "texts", images / "aa.png") == 1
    assert "found nothing" not in capsys.readouterr().err


def test_keys_of_looking_at_images_can_be_set(runs, images, capsys):
    file = images / "a.png"
    few = ("--detection.max_detections", "1")
    assert main(["detect", str(runs / "texts"), str(file), "--json", *few, *LOW]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    pool = ("--names", "dog", "--detection.regions", "pool")
    assert main(["detect", str(runs / "none"), str(file), "--json", *pool, *LOW]) == 0
    assert '"dog"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{runs}/texts", "{images}/missing.png"), "there is no image or folder"),
        (("{runs}/texts", "{images}/empty"), "has no image; expected"),
        (("{runs}/missing", "{images}"), "there is no model"),
        (("{runs}/scenes", "{images}"), "is not a run"),
        (("{runs}/numbers", "{images}", "--names", "dog"), "'dog' is none"),
        (("{runs}/texts", "{images}", "--names", "dog,,cat"), "names with commas between"),
        (("{runs}/texts", "{images}", "--names", "dog, dog"), "has 'dog' twice"),
        (("{runs}/texts", "{images}", "--detection.width", "8"), "has no effect here"),
        (("{runs}/texts", "{images}/a.png", "--threshold", "2"), "must lie in [0, 1], got '2'"),
        (("{runs}/texts", "{images}/a.png", "--threshold", "nan"), "must lie in [0, 1]"),
        (("{runs}/texts", "{images}/a.png", "--detection.regions", "pool"), "has an effect on"),
        (("{runs}/none", "{images}/a.png", "--detection.regions", "pool"), "has an effect on"),
        (("{runs}/texts", "http://localhost:9/a.png"), "1 of 1 images could not be read"),
    ],
)
def test_mistakes_are_told_in_one_line(runs, images, capsys, words, said):
    (images / "empty").mkdir()
    given = [word.format(runs=runs, images=images) for word in words]
    low = [] if "--threshold" in given else LOW[:2]
    assert main(["detect", *given, *low, *LOW[2:]]) in (1, 2)
    shown = capsys.readouterr()
    assert said in shown.err.splitlines()[-1]
    assert not shown.out


def test_help_imports_no_torch():
    code = """
import sys
from unicl.cli import main
try:
    main(["detect", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--names" in done.stdout
