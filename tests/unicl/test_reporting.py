"""`unicl report`: folders in, a page and a table out."""

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicl.cli import main
from unicl.config import load_recipe, recipe_to_toml
from unicl.data.image_sets import open_image_set
from unicl.errors import UniclError, UsageError
from unicl.evaluation.answers import save_answers
from unicl.evaluation.protocols import Answers, Example
from unicl.evaluation.results import Result, save_result
from unicl.reporting import report

RESULT = Result(
    task="zero_shot",
    dataset="photos",
    model="open_clip:ViT-B-32/openai",
    metrics={"top1": 0.7251, "top5": 0.9},
    headline="top1",
    interval=(0.71, 0.74),
    num_images=2646,
    protocol={"split": "test", "image_size": 48, "num_classes": 2, "num_templates": 1},
)
PROBE = replace(RESULT, task="linear_probe", metrics={"top1": 0.5432}, interval=None)


def make_run(folder: Path, *results: Result, steps: str = "7") -> Path:
    folder.mkdir(parents=True)
    recipe = load_recipe("demo", {"trainer.steps": steps})
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    rows = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for result in results:
        save_result(folder / "evaluation", result)
    return folder


def test_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", RESULT, PROBE)
    report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("Report of first", "72.5%", "71.0% to 74.0%", "54.3%", "3 steps", ">Loss<"):
        assert words in html
    assert not re.search(r'(?:src|href)="(?!data:image/|#)', html)
    assert not re.search(r"url\((?!#)|@import", html)


def test_runs_that_are_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", RESULT)
    second = make_run(tmp_path / "b" / "run", replace(RESULT, metrics={"top1": 0.4}), steps="9")
    report([first, second], tmp_path / "report.html", csv=tmp_path / "all.csv")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a/run and b/run compared" in html
    differing = html.split("Settings that differ")[1].split("<details>")[0]
    assert "trainer.steps" in differing
    assert "trainer.batch_size" not in differing
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dataset"], row["task"], row["acc1"]) for row in rows] == [
        ("photos", "zeroshot_classification", "0.7251"),
        ("photos", "zeroshot_classification", "0.4"),
    ]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["toy/first"], ["first"]),
        (["toy/run"], ["toy/run"]),
        (["toy/run", "other"], ["toy/run", "other"]),
        (["toy/first", "other/first"], ["toy/first", "other/first"]),
        (["a/toy/run", "b/toy/run"], ["a/toy/run", "b/toy/run"]),
        (["toy/first/checkpoints/step-1"], ["first/step-1"]),
        (["toy/run/checkpoints/step-1", "toy/run"], ["toy/run/step-1", "toy/run"]),
    ],
)
def test_a_name_says_which_run_it_is(tmp_path: Path, folders: list[str], names: list[str]) -> None:
    for folder in sorted(folders):
        if "checkpoints" in folder:
            run, step = folder.split("/checkpoints/")
            save_result(tmp_path / run / f"evaluation-{step}", RESULT)
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
        else:
            save_result(tmp_path / folder / "evaluation", RESULT)
    report([tmp_path / folder for folder in folders], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    title = f"{' and '.join(names)} compared" if len(names) > 1 else f"Report of {names[0]}"
    assert f"<h1>{title}</h1>" in html
    assert re.findall(r"<th[^>]*>.*?</i>([^<]*)</th>", html.split("<details>")[0]) == names


@pytest.mark.parametrize("where", ["evaluation", "."])
def test_results_without_a_run(tmp_path: Path, where: str) -> None:
    save_result(tmp_path / "model" / where, RESULT)
    report([tmp_path / "model"], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Report of model" in html
    assert "72.5%" in html
    assert "How it learned" not in html


def test_the_evaluation_of_a_run_is_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", RESULT)
    pages = [tmp_path / "1.html", tmp_path / "2.html"]
    for folder, page in zip((run, run / "evaluation"), pages, strict=True):
        report([folder], page)
    assert pages[0].read_text() == pages[1].read_text()


def test_a_checkpoint_has_results_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", RESULT)
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    save_result(run / "evaluation-step-00000003", replace(RESULT, metrics={"top1": 0.1234}))
    report([run / "checkpoints" / "step-00000003"], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "12.3%" in html
    assert "72.5%" not in html
    assert ">Loss<" in html


def test_a_model_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_result(tmp_path / "runs" / "open_clip_ViT-B-32_openai" / "evaluation", RESULT)
    report(["open_clip:ViT-B-32/openai"], tmp_path / "report.html")
    assert "Report of open_clip:ViT-B-32/openai" in (tmp_path / "report.html").read_text()


def test_answers_are_shown(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "test" / name / "1.png")
    images = open_image_set(str(tmp_path / "photos"), split="test", root=tmp_path)
    examples = (
        Example(0, "cat", (("cat", 0.75), ("dog", 0.25)), right=True),
        Example(1, "dog", (("cat", 0.66), ("dog", 0.34)), right=False),
    )
    run = make_run(tmp_path / "run")
    path = save_result(run / "evaluation", RESULT)
    counts = np.array([[1, 0], [1, 0]])
    save_answers(Answers(("cat", "dog"), counts, examples), images, path.with_suffix(""))
    report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("Named right", "Named wrong", "dog, taken for cat: 1 of 1", "66%"):
        assert words in html
    assert html.count('src="data:image/jpeg;base64,') == 2
    answers = path.with_suffix(".answers")
    torn = answers.read_text().replace("[[1, 0], ", "[")
    for damage in ("{", "[]", torn):
        answers.write_text(damage)
        report([run], tmp_path / "report.html")
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "answers is damaged" in html
        assert "72.5%" in html


def test_test_and_val_of_a_set_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    images = open_image_set(str(tmp_path / "photos"), root=tmp_path)
    val = replace(
        RESULT, metrics={"top1": 0.3333}, num_images=9999, protocol={"split": "val"}, interval=None
    )
    run = make_run(tmp_path / "run")
    for result, counts in ((RESULT, [[41, 0], [0, 0]]), (val, [[0, 0], [0, 43]])):
        path = save_result(run / "evaluation", result)
        saved = Answers(("cat", "dog"), np.array(counts), ())
        save_answers(saved, images, path.with_suffix(""))
    report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    cards, table = html.split("<h2>")[:2]
    assert "72.5%" in cards  # of the test part, though the other is larger
    assert re.findall(r'<tr><td class="words">(photos[^<]*)<.*?>(\d+\.\d%)', table) == [
        ("photos", "50.0%"),
        ("photos (val)", "33.3%"),
    ]
    test, validation = html.split("What it sees")[1].split("<summary>")[1:3]
    assert test.startswith("photos</")
    assert "41 of 41" in test
    assert validation.startswith("photos (val)</")
    assert "43 of 43" in validation


DAMAGE = {
    "evaluation/zero_shot_photos.json": "is no result of `unicl eval`",
    "metrics.jsonl": "is damaged: ",
    "recipe.toml": "",
}


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]\n",
        "3\n",
        '{"dataset": "photos"}\n',
        '{"unicl": 3}\n{"step": "1"}\n',
        '"\n{"step": 1}\n',
    ],
)
@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    run, other = (make_run(tmp_path / name, RESULT, PROBE) for name in ("run", "other"))
    (run / name).write_text(damage)
    report([run, other], tmp_path / "report.html", csv=tmp_path / "all.csv")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "54.3%" in html
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 5 - name.endswith("json")
    # A kill may tear the last line of the metrics: nothing is lost that was whole.
    lost = [] if (name, damage) == ("metrics.jsonl", "{") else [f"{run / name} {DAMAGE[name]}"]
    assert len(caplog.messages) == html.count("Left out:") == len(lost)
    for line in lost:
        assert line.strip() in caplog.text
        assert line.strip() in html


@pytest.mark.parametrize(
    ("field", "value"), [("headline", "top3"), ("metrics", {"top1": "x"}), ("metrics", [1])]
)
def test_nothing_but_a_damaged_result(tmp_path: Path, field: str, value: object) -> None:
    path = save_result(tmp_path / "run", RESULT)
    fields = json.loads(path.read_text())
    fields["unicl"][field] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(UniclError, match=f"{path.name} is no result of `unicl eval`"):
        report([tmp_path / "run"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    run = make_run(tmp_path / "run", RESULT)
    (run / "checkpoints").mkdir()
    out = tmp_path / "report.html"
    for folder in ("empty", "run/checkpoints"):
        with pytest.raises(UsageError, match=f"{folder} has neither metrics .* nor results"):
            report([tmp_path / folder], out)
    with pytest.raises(UsageError, match="absent is not there"):
        report([tmp_path / "absent"], out)
    with pytest.raises(UsageError, match="file is no folder"):
        report([tmp_path / "file"], out)
    with pytest.raises(UsageError, match="openai is not there"):
        report(["open_clip:never/openai"], out)
    with pytest.raises(UsageError, match="evaluation is named twice"):
        report([run, tmp_path / "run" / "." / "evaluation"], out)
    assert not out.exists()


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", RESULT)
    out, absent = str(tmp_path / "report.html"), str(tmp_path / "absent" / "file")
    for words in (["--out", absent], ["--out", out, "--csv", absent]):
        assert main(["report", str(run), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"unicl: error: cannot write {absent}: there is no folder {tmp_path}/absent"
    assert not Path(out).exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", RESULT)
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert "report.html in a browser" in capsys.readouterr().err
    assert "72.5%" in out.read_text()


def test_curves_need_matplotlib_and_tables_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run(tmp_path / "run", RESULT)
    with pytest.raises(UniclError, match=r"pip install 'unicl\[demo\]'"):
        report([run], tmp_path / "report.html")
    (run / "metrics.jsonl").unlink()
    report([run], tmp_path / "report.html")
