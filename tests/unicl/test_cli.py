"""Every mistake is one line and an exit code; `unicl --help` does not wait for torch."""

import subprocess
import sys

import pytest

from tests.unicl.corpus import small_recipe, write_corpus
from unicl import evaluator
from unicl.cli import main, using
from unicl.errors import UsageError
from unicl.evaluation.embeddings import autocast_of

# What `eval`, `embed`, `index`, `search` and `export` refuse before they import torch.
WITHOUT_TORCH = [
    (["eval", ".", "zero-shot", "x", "--probe", "y"], "--probe is an option of linear-probe only"),
    (["eval", ".", "retrieval", "x", "--shots", "5"], "--shots is an option of few-shot only"),
    (["eval", ".", "zero-shot", "x", "--csv", "nowhere/x.csv"], "there is no folder nowhere"),
    (["eval", "nowhere", "zero-shot", "digits"], "there is no model nowhere: no such file"),
    (["eval", "ViT-B-32/openai", "zero-shot", "digits"], "are named open_clip:NAME[/WEIGHTS]"),
    (["eval", ".", "zeroshot", "digits"], "invalid choice: 'zeroshot'"),
    (["eval", ".", "zero-shot", "./nowhere"], "there is no set ./nowhere: no such file"),
    (["eval", ".", "few-shot", "digits", "--shots", "5,x"], "positive whole number, got 'x'"),
    (["eval", ".", "few-shot", "digits", "--episodes", "0"], "positive whole number, got '0'"),
    (["eval", ".", "zero-shot", "digits", "--workers", "-1"], "0 or more, got '-1'"),
    (["embed", ".", "digits", "--out", "x", "--precision", "int8"], "invalid choice: 'int8'"),
    (["embed", "nowhere", "digits", "--out", "x"], "there is no model nowhere: no such file"),
    (["index", ".", "--out", "x", "--kind", "fast"], "invalid choice: 'fast'"),
    (["index", ".", "--out", "x", "--add", "--kind", "exact"], "or remove x and build it anew"),
    (["index", "nowhere", "--out", "x"], "nowhere holds no embeddings; `unicl embed"),
    (["search", "nowhere", "cat"], "nowhere holds no index"),
    (["search", ".", "cat", "--k", "0"], "positive whole number, got '0'"),
    (["search", ".", "cat", "--model", "nowhere"], "there is no model nowhere: no such file"),
    (["search", "."], "search needs a text or an --image"),
    (["export", ".", "--format", "tf", "--out", "x"], "invalid choice: 'tf'"),
]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trian"], 2, "invalid choice: 'trian'"),
        ([], 2, "required: COMMAND"),
        (["train"], 2, "required: RECIPE"),
        (["train", "dmo"], 2, "did you mean demo?"),
        (["train", "nowhere.toml"], 2, "cannot read recipe nowhere.toml"),
        (["train", "demo", "--trainer.step", "3"], 2, "did you mean trainer.steps?"),
        (["train", "demo", "--trainer.steps", "x"], 2, "must be a whole number"),
        (["train", "demo", "--trainer.steps"], 2, "--trainer.steps needs a value"),
        (["train", "demo", "--data.train", "nowhere"], 2, "nowhere"),
        (["prepare", "nowhere", "--out", "x"], 2, "nowhere"),
        (["prepare", "x", "--a.b", "3"], 2, "--a.b is no option here"),
        (["demo", "--trainer.step", "3"], 2, "did you mean trainer.steps?"),
        (["train", "demo", "--description", "\udcff"], 2, "description must be UTF-8 text"),
        (["prepare", "x", "--samples-per-shard", "many"], 2, "invalid int value"),
        *((words, 2, message) for words, message in WITHOUT_TORCH),
    ],
)
def test_mistakes_are_one_line(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("unicl: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["prepare", "x", "--out", "y"],
        ["index", "x", "--out", "y"],
        ["search", "x", "a cat"],
        ["export", ".", "--format", "onnx", "--out", "y"],
        ["report", "x", "--out", "y"],
    ],
)
def test_what_is_for_one_process_refuses_ranks(words, variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "2")
    assert main(words) == 2
    assert f"unicl {words[0]} is for one process, not 2" in capsys.readouterr().err


def test_help_and_mistakes_need_no_torch():
    code = (
        "import sys\nfrom unicl.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"for words in {[words for words, _ in WITHOUT_TORCH]}: main(words)\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "the whole job on the embedded corpus" in done.stdout


def test_names_that_are_known_without_torch_are_all():
    assert (*evaluator.TASKS, "fine-tune") == using._TASKS
    with pytest.raises(UsageError, match=f"one of {', '.join(using._PRECISIONS)}, got"):
        autocast_of("int8")


def test_trains_from_the_command_line(tmp_path, capsys):
    keys = small_recipe(write_corpus(tmp_path / "train"))
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert (
        main(
            [
                "train",
                "demo",
                "--out",
                str(tmp_path / "run"),
                *words,
                "--trainer.keep_best",
                "none",
                "--trainer.eval_every",
                "none",
                "--evaluation.data",
                "none",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().err
    assert "step 2/6  loss" in lines
    assert "finished at step 6" in lines


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    keys = small_recipe(write_corpus(tmp_path / "train"))
    (tmp_path / "small.toml").write_text("")

    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere/events")

    monkeypatch.setattr("unicl.engine.trainer.MetricsLog", full)
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert (
        main(["train", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run"), *words]) == 1
    )
    assert capsys.readouterr().err.splitlines()[-1] == (
        "unicl: error: somewhere/events: No space left on device"
    )
