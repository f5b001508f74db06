"""`unicl eval`, `embed`, `index`, `search` and `export` as a person types them, on real digits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unicl.corpus import small_recipe, write_corpus
from unicl.build import train
from unicl.cli import main
from unicl.config import parse_recipe
from unicl.data.augment import open_image
from unicl.data.image_sets import open_image_set
from unicl.errors import UsageError
from unicl.evaluation.answers import load_answers
from unicl.evaluation.linear_probe import LinearProbe
from unicl.evaluation.results import read_results
from unicl.evaluator import evaluate, warn_of_classes
from unicl.fine_tuning import fine_tuning_recipe
from unicl.models import load
from unicl.predictor import Predictor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder / "train", num_samples=40)
    write_corpus(folder / "held_out", num_samples=18, seed=1)
    train(parse_recipe("", small_recipe(folder / "train")), folder / "run")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("UNICL_CACHE", str(place / "cache"))


def run(*words: str) -> None:
    assert main([*words, "--device", "cpu"]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) in (1, 2)
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("unicl: error: ")
    return error.splitlines()[-1].removeprefix("unicl: error: ")


def test_every_protocol_leaves_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", "run", "zero-shot", "digits", "held_out", "--workers", "0", "--csv", "all.csv")
    run("eval", "run", "linear-probe", "digits", "--workers", "0")
    run("eval", "run", "few-shot", "digits", "--shots", "1,5", "--episodes", "3", "--workers", "0")
    run("eval", "run", "retrieval", "held_out", "--workers", "0")
    results = {(r.task, r.dataset): r for r in read_results(Path("run/evaluation"))}
    assert set(results) == {
        ("zero_shot", "digits"), ("zero_shot", "held_out"), ("linear_probe", "digits"),
        ("few_shot", "digits"), ("retrieval", "held_out"),
    }  # fmt: skip
    assert results["zero_shot", "digits"].num_images == 500
    shown = capsys.readouterr().out
    assert f"{results['linear_probe', 'digits'].metrics['top1']:.1%}" in shown
    ranks = results["retrieval", "held_out"].metrics
    (line,) = (line for line in shown.splitlines() if "t2i_mean_rank" in line)
    assert line.split("\u2502")[4].strip() == f"{ranks['t2i_mean_rank']:.1f}"
    assert 1 <= ranks["t2i_median_rank"] <= 18
    answers = load_answers(Path("run/evaluation/zero_shot_held_out"))
    assert answers is not None
    assert answers.confusion is not None
    assert answers.confusion.sum() == 18
    path = "run/evaluation/linear_probe_digits.safetensors"
    probe = LinearProbe.load(Path(path))
    assert probe.names is not None
    assert probe.names[3] == "three"
    run("eval", "run", "linear-probe", "digits", "--probe", path, "--out", "again")
    (again,) = read_results(Path("again"))
    assert again.metrics == results["linear_probe", "digits"].metrics
    opened = open_image_set("digits", split="test", root=Path())
    images = [np.asarray(open_image(opened.read(row).image)) for row in range(50)]
    features = Predictor.load("run", device="cpu").image_features(images)
    named = probe.predict(torch.from_numpy(features)) == torch.from_numpy(opened.targets[:50])
    assert named.float().mean() > 0.5
    assert Path("all.csv").read_text().startswith("dataset,model,pretrained,task,")


def test_what_is_wrong_with_a_folder_of_images_is_told(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """Without a test part, with an empty class, a broken link and a file that is no image."""
    for part, count in (("train", 40), ("val", 20)):
        opened = open_image_set("digits", split=part, root=place)
        for row in range(count):
            name = opened.class_names[opened.targets[row]]
            path = place / "[b]faulty" / part / name / f"{row}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(opened.read(row).image)
    path.write_bytes(b"no image")
    (path.parent / "link.png").symlink_to("nowhere.png")
    (place / "[b]faulty/train/ten").mkdir()
    for words in (("zero-shot",), ("zero-shot", "--split", "val"), ("linear-probe",)):
        run("eval", "run", words[0], "[b]faulty", *words[1:], "--workers", "0", "--out", "of_val")
        shown = capsys.readouterr()
        assert ("has no test part, its val is taken" in shown.err) == ("--split" not in words)
        assert shown.err.count("[b]faulty has no image of 1 of its 11 classes (ten); their") == 1
        assert "[b]faulty (val)" in shown.out
        assert "(val): images left out: 2 (broken link: 1, undecodable image: 1)\n" in shown.out
        results = read_results(Path("of_val"))
        assert all(result.num_images == 19 for result in results)
        assert all(result.protocol["split"] == "val" for result in results)
        assert all(sum(result.skipped.values()) == 2 for result in results)
    assert [result.task for result in results] == ["linear_probe", "zero_shot"]
    assert len(list(Path("of_val").glob("*@val.json"))) == 2
    assert results[0].protocol["chosen_on"] == "a fifth of train"
    assert results[1].protocol["num_classes"] == 11


def test_equal_names_are_told_where_names_decide(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    opened = open_image_set("digits", split="test", root=place)
    for row in range(24):
        name = ("Red Square", "red_square")[row // 2 % 2]
        path = place / "twins" / ("train", "test")[row % 2] / name / f"{row}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(opened.read(row).image)
    warning = "twins names 1 of its 2 classes like one before (red square); their images can never"
    for task, count in (("zero-shot", 1), ("linear-probe", 0)):
        run("eval", "run", task, "twins", "--workers", "0", "--out", "of_twins")
        assert capsys.readouterr().err.count(warning) == count


def test_equal_names_of_a_public_set_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "unicl.evaluator.logger.warning", lambda text, *words: said.append(text % words)
    )
    names = (*"aabbccddeeff",)
    digits = replace(open_image_set("digits", root=Path()), class_names=names)
    several = replace(digits, name="x", targets=np.zeros((500, len(names)), bool))
    warn_of_classes(digits, by_name=True)
    warn_of_classes(several, by_name=True)  # each class has a score of its own, and a precision
    assert not said
    warn_of_classes(replace(digits, name="./digits"), by_name=True)
    (warning,) = said
    assert warning.startswith("./digits names 6 of its 12 classes like one before (a, b, c, d, e, ")
    assert "give each class a name of its own" in warning


def test_what_cannot_be_written_or_read_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").touch()
    words = ("eval", "run", "zero-shot", "digits", "--workers", "0", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("unicl.evaluator._run", None)
        assert "cannot write file/x: Not a dir" in refused(capsys, *words, "--out", "file/x")
        patch.setattr("unicl.evaluator.load_for", None)
        words_of_probe = ("eval", "run", "linear-probe", "digits", "--probe", "none.safetensors")
        assert "cannot read the probe none.safetensors" in refused(capsys, *words_of_probe)
    assert main([*words, "--csv", "run"]) == 1
    shown = capsys.readouterr()
    assert "cannot write run" in shown.err
    assert "95% interval" in shown.out, "the figures are shown all the same"


def test_one_set_is_a_list_of_one() -> None:
    with pytest.raises(UsageError, match="put 'digits' in brackets"):
        evaluate("run", "zero-shot", "digits")


def test_the_paper_stands_beside(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    from tests.unicl.data.image_sets import layouts

    layouts.dtd(place / "sets")
    run("eval", "run", "zero-shot", "all", "--root", "sets", "--workers", "0", "--out", "papers")
    shown = capsys.readouterr()
    assert "66.4%" in shown.out  # Florence's
    assert "55.7%" in shown.out  # CLIP's
    (line,) = (line for line in shown.err.splitlines() if line.startswith("left out: "))
    assert line.startswith("left out: sets lacks food101, cifar10, cifar100, sun397, cars, ")
    assert "dtd" not in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "run", "zero-shot", "digit"), "did you mean d"),
        (("eval", "run", "zero-shot", "cifar10"), "cifar10 needs cifar-10-batches-py"),
        (("eval", "run", "retrieval", "digits"), "digits has classes, but captions are needed"),
        (("eval", "run", "linear-probe", "held_out"), "a linear probe is fitted on a train split"),
        (("eval", "run", "zero-shot", "digits", "--templates", "all"), "there are no templates"),
        (("eval", "run", "zero-shot", "digits", "--a.b", "1"), "--a.b is a key of fine-tune's"),
        (("eval", "run", "fine-tune", "digits"), "name a folder with --out"),
        (("eval", "run", "zero-shot", "all"), "is there: data lacks food101, cifar10, "),
        (("eval", "run", "retrieval", "all"), "name another --root, try --download, or ask"),
        (("eval", "run", "retrieval", "all", "--download"), "name another --root, or ask for one"),
        (("eval", "open_clip:ViT-B-33", "zero-shot", "digits"), "ViT-B-32"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *words)


def test_from_a_folder_to_a_page_of_pictures(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    pictures = place / "pictures" / "below"
    pictures.mkdir(parents=True)
    opened = open_image_set("digits", split="test", root=Path())
    for row in range(20):
        (pictures / f"{row}.bmp").write_bytes(opened.read(row).image)
    run("embed", "run", "pictures", "--out", "loose", "--workers", "0")
    run("embed", "run", "held_out", "--out", "shards", "--workers", "0")
    loose = np.load("loose/embeddings.npy", mmap_mode="r")
    assert loose.shape == (20, 16)
    predictor = Predictor.load("run", device="cpu")
    rows = [json.loads(line) for line in Path("loose/items.jsonl").read_text().splitlines()]
    own = predictor.embed_images([row["where"] for row in rows])
    np.testing.assert_allclose(loose, own, rtol=1e-4, atol=1e-5)
    assert main(["index", "loose", "--out", "found"]) == 0
    assert main(["index", "shards", "--out", "found", "--add"]) == 0
    capsys.readouterr()
    image = str(pictures / "7.bmp")
    run("search", "found", "red square", "--image", image, "--k", "3", "--json", "--html", "p.html")
    by_text, by_image = json.loads(capsys.readouterr().out)
    assert by_image["found"][0]["where"] == image
    assert by_image["found"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert len(by_text["found"]) == 3
    page = Path("p.html").read_text()
    assert page.count("data:image/jpeg") == 7
    run("search", "found", "red square")
    assert "red square" in capsys.readouterr().out


def test_an_index_knows_its_model(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    recipe = parse_recipe("", {**small_recipe(place / "train"), "embed_dim": "24"})
    train(recipe, place / "wider")
    for name in ("run", "wider"):
        run("embed", name, "digits", "--out", f"of_{name}", "--workers", "0")
    error = refused(capsys, "index", "of_run", "of_wider", "--out", "both")
    assert f"embedded by {place / 'run'} (width 16)" in error
    assert f"by {place / 'wider'} (width 24)" in error
    assert main(["index", "of_run", "--out", "own"]) == 0
    error = refused(capsys, "search", "own", "cat", "--model", "wider", "--device", "cpu")
    assert "run" in error
    assert "wider" in error
    refused(capsys, "index", "of_wider", "--out", "own", "--add")
    assert "is not empty" in refused(capsys, "embed", "run", "digits", "--out", "of_run")


def test_an_exported_model_is_a_model(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    theirs = 'open_clip.create_model_and_transforms("local-dir:{}")'
    for model, name, out, use in (
        ("run", "safetensors", "as_safetensors", "name it as_safetensors wherever"),
        ("run", "open_clip", "as_open_clip", f"import cosswin; {theirs.format('as_open_clip')}"),
        ("as_open_clip", "open_clip", "once_more", f"import cosswin; {theirs.format('once_more')}"),
    ):
        assert main(["export", model, "--format", name, "--out", out]) == 0
        assert use in capsys.readouterr().err.splitlines()[-1]
    assert "import cosswin" in Path("once_more/README.md").read_text()
    image = [np.full((24, 24, 3), 90, np.uint8)]
    own = Predictor.load("run", device="cpu")
    folder = f"open_clip:{place / 'as_open_clip'}"
    for name in ("as_safetensors", "as_open_clip", "open_clip:once_more", folder):
        other = Predictor.load(name, device="cpu")
        np.testing.assert_allclose(
            other.embed_images(image), own.embed_images(image), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            other.embed_texts(["a cat"]), own.embed_texts(["a cat"]), rtol=1e-4, atol=1e-5
        )
    run("eval", "as_safetensors", "zero-shot", "digits", "--workers", "0")
    assert Path("as_safetensors/evaluation/zero_shot_digits.json").exists()
    assert load("as_open_clip").name == "as_open_clip"
    digits = open_image_set("digits", split="train", root=Path())
    recipe = fine_tuning_recipe("as_open_clip", digits, Path("tuned"), {})
    assert (recipe.model, recipe.weights) == (f"open_clip:local-dir:{place / 'as_open_clip'}", None)
    error = refused(capsys, "export", "as_open_clip", "--format", "safetensors", "--out", "x")
    assert f"as_open_clip is built from the folder {place / 'as_open_clip'}, which a safe" in error


@pytest.mark.slow
def test_a_model_of_open_clip_goes_on_training(place: Path) -> None:
    """Export, train it as a model of open_clip, fine-tune it further: its weights change."""
    assert main(["export", "run", "--format", "open_clip", "--out", "theirs"]) == 0
    name = "open_clip:local-dir:theirs"
    keys = {
        "model": name,
        "data.train": "train",
        "data.num_workers": "0",
        "trainer.batch_size": "12",
        "trainer.precision": "fp32",
        "schedule.warmup_steps": "0",
    }
    tuned = train(parse_recipe("", {**keys, "trainer.steps": "2"}), place / "tuned")
    before, after = Predictor.load(name, device="cpu"), Predictor.load(tuned.path, device="cpu")
    image = [np.full((24, 24, 3), 90, np.uint8)]
    similarity = (before.embed_images(image) * after.embed_images(image)).sum()
    assert 0.5 < similarity < 1 - 1e-6
    torch.testing.assert_close(before.tokenize(["a cat"]), after.tokenize(["a cat"]))
    run(
        *("eval", "tuned", "fine-tune", "digits", "--out", "again", "--workers", "0"),
        *("--trainer.steps", "2", "--trainer.batch_size", "20", "--data.num_workers", "0"),
    )
    (result,) = read_results(place / "again" / "run" / "evaluation")
    assert result.task == "fine_tune"
    assert result.protocol["from"] == "tuned"
