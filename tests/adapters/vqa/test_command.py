"""`unicl answer` and `unicl caption`: tables, lines, JSON, and mistakes in one line."""

import json
import shutil
from pathlib import Path

import pytest

from unicl import Predictor
from unicl.cli import main

CPU = ("--device", "cpu")
ASKED = ("what color is the circle?", "is there a red square?")


@pytest.fixture
def images(runs, tmp_path) -> Path:
    """A folder of two images, one of them in a folder of its own."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    one, two, *_ = sorted((runs / "questions/val2014").iterdir())
    shutil.copy(one, folder / "a.png")
    shutil.copy(two, folder / "more/b.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*words: object) -> int:
    return main([*map(str, words), *CPU])


def test_answers_are_a_table(runs, images, capsys):
    assert run("answer", runs / "answers", images / "a.png", *ASKED, "--top-k", "2") == 0
    shown = capsys.readouterr().out
    predictor = Predictor.load(runs / "answers", device="cpu")
    rows = [line.split("│")[1:4] for line in shown.splitlines() if "│" in line]
    found = [[each.strip() for each in row] for row in rows]
    expected = []
    for question in ASKED:
        answers = predictor.answer(images / "a.png", question, top_k=2)
        begins = (question, "")
        expected += [
            [begin, answer, f"{score:.2f}"]
            for begin, (answer, score) in zip(begins, answers, strict=True)
        ]
    assert found == expected


def test_answers_are_lines_of_json(runs, images, capsys):
    assert run("answer", runs / "answers", images / "a.png", *ASKED, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predictor = Predictor.load(runs / "answers", device="cpu")
    assert [line["question"] for line in lines] == list(ASKED)
    for line in lines:
        assert line["file"] == str(images / "a.png")
        expected = predictor.answer(images / "a.png", line["question"], top_k=3)
        found = {each["answer"]: each["score"] for each in line["answers"]}
        assert found == pytest.approx(dict(expected), abs=1e-5)


def test_a_question_is_no_markup(runs, images, capsys):
    asked = "is [red]this[/red] a [bold]?"
    assert run("answer", runs / "answers", images / "a.png", asked) == 0
    assert asked in capsys.readouterr().out


def test_captions_of_files_and_folders(runs, images, capsys):
    predictor = Predictor.load(runs / "captions", device="cpu")
    files = [images / "a.png", images / "more/b.png"]
    captions = [predictor.caption(file) for file in files]
    assert run("caption", runs / "captions", images) == 0
    lines = [f"{file}: {said}" for file, said in zip(files, captions, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines
    assert run("caption", runs / "captions", files[1], files[0].as_uri(), "--json") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        {"file": str(files[1]), "caption": captions[1]},
        {"file": files[0].as_uri(), "caption": captions[0]},
    ]


def test_how_captions_are_searched_can_be_set(runs, images, capsys):
    words = ("caption", runs / "captions", images / "a.png")
    said = []
    for ways in ((), ("--vqa.max_words", "2"), ("--vqa.top_p", "0.95")):
        assert run(*words, *ways) == 0
        said.append(capsys.readouterr().out)
    assert len(said[1].split(": ")[1].split()) <= 2
    assert len(set(said)) == 3


def test_a_damaged_image_does_not_keep_the_others(runs, images, capsys):
    (images / "aa.png").write_bytes((images / "a.png").read_bytes()[:100])
    assert run("caption", runs / "captions", images, "--json") == 1
    shown = capsys.readouterr()
    files = [json.loads(line)["file"] for line in shown.out.splitlines()]
    assert files == [str(images / "a.png"), str(images / "more/b.png")]
    assert f"left out: cannot read {images / 'aa.png'}" in shown.err
    assert "1 of 3 images could not be read" in shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("answer", "{runs}/answers", "{images}/missing.png", "why?"), "there is no image file"),
        (("answer", "{runs}/answers", "{images}/notes.txt", "why?"), "cannot read"),
        (("answer", "{runs}/answers", "{images}", "why?"), "cannot read"),
        (("answer", "{runs}/answers", "{images}/a.png", ""), "the question is empty"),
        (("answer", "{runs}/answers", "{images}/a.png", "why " * 300), "is longer than the 24"),
        (("answer", "{runs}/answers", "{images}/a.png"), "required: QUESTION"),
        (("answer", "{runs}/missing", "{images}/a.png", "why?"), "there is no model"),
        (("answer", "{images}/a.png", "{runs}/answers", "why?"), "a.png"),
        (("answer", "{runs}/pairs", "{images}/a.png", "why?"), "is not a run"),
        (("answer", "{runs}/towers", "{images}/a.png", "why?"), "was not trained for answers"),
        (("answer", "{runs}/captions", "{images}/a.png", "why?"), "was not trained for answers"),
        (("answer", "{runs}/answers", "{images}/a.png", "why?", "--top-k", "0"), "got '0'"),
        (
            ("answer", "{runs}/answers", "{images}/a.png", "why?", "--vqa.num_beams", "2"),
            "--vqa.num_beams",
        ),
        (("caption", "{runs}/answers", "{images}/a.png"), "was not trained for captions"),
        (("caption", "{runs}/captions", "{images}/empty"), "has no image; expected"),
        (("caption", "{runs}/captions", "{images}/none.png"), "1 of 1 images could not be read"),
        (("caption", "{runs}/captions", "http://localhost:9/a.png"), "1 of 1 images could not"),
        (("caption", "{runs}/captions"), "required: IMAGE"),
        (
            ("caption", "{runs}/captions", "{images}/a.png", "--vqa.width", "8"),
            "vqa.width has no effect here",
        ),
        (
            ("caption", "{runs}/captions", "{images}/a.png", "--vqa.num_beam", "8"),
            "did you mean vqa.num_beams",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(runs, images, capsys, words, said):
    (images / "empty").mkdir()
    given = [word.format(runs=runs, images=images) for word in words]
    try:
        code = run(*given)
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code in (1, 2)
    shown = capsys.readouterr()
    assert said in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err
    assert not shown.out
