"""The command line on videos, from tiny runs to pages; what it says of mistakes; without PyAV."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters.video.sets import open_video_set
from tests.adapters.video.layouts import msr_vtt
from unicl.cli import main
from unicl.config import find_plugin
from unicl.errors import UniclError, UsageError
from unicl.evaluation.page import thumbnail
from unicl.evaluation.results import read_results
from unicl.fine_tuning import fine_tuning_recipe
from unicl.predictor import Predictor

QUIET = ("--device", "cpu", "--workers", "0", "--cache", "none")


@pytest.fixture(autouse=True)
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)


@pytest.fixture
def no_av(monkeypatch):
    """As if PyAV were not installed."""
    monkeypatch.setitem(sys.modules, "av", None)
    for name in [*sys.modules]:
        if name.startswith("adapters.video.") and name.split(".")[-1] not in ("plugin", "config"):
            monkeypatch.delitem(sys.modules, name)


def evaluated(model, task, data, out, *options):
    words = ["eval", model, task, data, "--out", str(out), *QUIET, *options]
    assert main(words) == 0
    (result,) = read_results(out)
    assert all(value >= 0 for value in result.metrics.values())
    return result


def refused(capsys, *words):
    assert main([*words]) in (1, 2)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return said.partition("error: ")[2]


@pytest.mark.parametrize("model", ["image", "texts", "frames"])
def test_zero_shot(model, tmp_path):
    result = evaluated(model, "video-zero-shot", "classes", tmp_path, "--video.num_clips", "2")
    assert set(result.metrics) >= {"top1", "top5"}
    assert result.num_images == 12
    assert result.protocol["num_clips"] == 2
    assert result.protocol["num_frames"] == (12 if model == "image" else 4)


def test_retrieval(tmp_path):
    result = evaluated("texts", "video-retrieval", "clips", tmp_path)
    assert 1 <= result.metrics["t2i_median_rank"] <= result.num_images == 12


def test_recognition(tmp_path):
    result = evaluated("head", "video-recognition", "classes", tmp_path)
    assert result.protocol["num_classes"] == 6
    assert 0 <= result.metrics["top1"] <= result.metrics["top5"] <= 1


def test_other_views_are_another_result(tmp_path):
    evaluated("image", "video-zero-shot", "classes", tmp_path)
    for words in (("--video.num_clips", "2"), ("--video.tower", "3d")):
        main(
            ["eval", "image", "video-zero-shot", "classes", "--out", str(tmp_path), *QUIET, *words]
        )
    marks = {result.protocol.get("mark") for result in read_results(tmp_path)}
    assert marks == {None, "video.num_clips=2", "video.tower=3d"}


def test_a_head_names_videos_by_its_own_classes(capsys, tmp_path):
    clips = sorted(Path("classes/test").glob("*/*.mp4"))[:2]
    head = Predictor.load("head", device="cpu")
    for guesses in head.classify(clips, top_k=6):
        assert {name for name, _ in guesses} == set(head.classes)
        assert sum(share for _, share in guesses) == pytest.approx(1, abs=1e-5)
        assert guesses == sorted(guesses, key=lambda guess: -guess[1])
    with pytest.raises(UsageError, match="names of its own; give none"):
        head.classify(clips, ["growing"])
    with pytest.raises(UsageError, match="probabilities and no embeddings"):
        head.embed_images(clips)
    assert "no embeddings" in refused(capsys, "embed", "head", "classes", "--out", str(tmp_path))


def test_a_model_inflated_on_the_spot_is_not_indexed(capsys, tmp_path):
    words = ["embed", "image", "classes", "--out", str(tmp_path), "--video.tower", "3d"]
    assert "video.tower=3d makes another model of image" in refused(capsys, *words)


def test_training_takes_the_recipe_s_drop_path():
    training = open_video_set("classes", split="train", root=Path())
    for model, rate in (("image", 0.5), ("texts", 0.5)):
        recipe = fine_tuning_recipe(model, training, Path("classes"), {}, find_plugin("video"))
        assert recipe.image_tower.drop_path_rate == rate


@pytest.mark.parametrize("model", ["image", "head"])
def test_linear_probe(model, tmp_path):
    assert "top1" in evaluated(model, "video-linear-probe", "classes", tmp_path).metrics


def test_few_shot(tmp_path):
    few = tmp_path / "few"
    for number in range(5):
        (few / f"class{number}").mkdir(parents=True)
        videos = [*Path("classes").glob("*/*/*.mp4")]
        for turn in range(16):
            (few / f"class{number}/{turn}.mp4").symlink_to(videos[turn].resolve())
    given = ("--shots", "1", "--episodes", "2")
    result = evaluated("frames", "video-few-shot", str(few), tmp_path / "out", *given)
    assert result.num_images == 80
    assert 0 <= result.metrics["1_shot"] <= 1


def fine_tuned(model, data, out, *options):
    few = ("--trainer.steps", "1", "--trainer.batch_size", "2", "--data.num_workers", "0")
    words = ["eval", model, "video-fine-tune", str(data), "--out", str(out), *QUIET, *few]
    assert main([*words, *options]) == 0
    (result,) = read_results(out / "run/evaluation")
    return result


def test_fine_tuning_on_classes_gives_a_head(tmp_path):
    given = ("--video.num_frames", "4", "--image_tower.drop_path_rate", "0")
    result = fine_tuned("image", "classes", tmp_path, *given)
    assert {"top1", "top5"} <= result.metrics.keys()
    assert result.protocol["from"] == "image"
    assert result.protocol["num_frames"] == 4


def test_fine_tuning_on_captions(tmp_path):
    texts = {f"video{n}": [f"caption {n}", f"words {n}"] for n in range(6)}
    msr_vtt(tmp_path / "msr", texts, {"video0": "one", "video1": "two"}, train_9k="video2 video3")
    for number, path in zip(range(6), Path("classes/train").glob("*/*.mp4"), strict=False):
        (tmp_path / f"msr/video{number}.mp4").write_bytes(path.read_bytes())
    result = fine_tuned("texts", tmp_path / "msr", tmp_path / "out")
    assert result.num_images == 2
    assert result.protocol["num_frames"] == 4  # as the run had, whatever the recipe has


def test_videos_are_embedded_found_and_shown(tmp_path, capsys):
    index, page = str(tmp_path / "index"), tmp_path / "page.html"
    assert main(["embed", "image", "classes", "--out", str(tmp_path / "e"), *QUIET]) == 0
    assert main(["index", str(tmp_path / "e"), "--out", index]) == 0
    clip = next(Path("classes/test").glob("*/*.mp4"))
    capsys.readouterr()
    words = ["search", index, "a red circle", "--image", str(clip), "--device", "cpu", "--k", "3"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    by_text, by_clip = json.loads(capsys.readouterr().out)
    assert len(by_text["found"]) == 3
    best = by_clip["found"][0]
    assert best["where"] == str(clip.resolve())
    assert best["similarity"] == pytest.approx(1, abs=1e-4)
    shown = page.read_text()
    assert shown.count("data:image/jpeg;base64") == 7  # the clip that was asked for, and 3 + 3
    assert "image missing" not in shown


def test_a_report_shows_pictures_of_videos(tmp_path):
    for model in ("head", "texts"):
        task = "video-recognition" if model == "head" else "video-zero-shot"
        assert main(["eval", model, task, "classes", *QUIET]) == 0
    assert main(["report", "head", "texts", "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text().count("data:image/jpeg;base64") >= 6


def test_videos_and_pictures_are_embedded_alike(tmp_path):
    clips = [str(path) for path in sorted(Path("classes/test").glob("*/*.mp4"))[:2]]
    picture = thumbnail(Path(clips[0]).read_bytes(), side=64)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(picture)
    for name, medium in (("image", "video"), ("texts", None), ("frames", "video")):
        predictor = Predictor.load(name, medium=medium, device="cpu", batch_size=5)
        found = predictor.embed_images([*clips, photo, Image.open(photo)])
        assert found.shape == (4, 16)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(found[2], found[3], atol=1e-5)
        whole = Predictor.load(name, medium="video", device="cpu").embed_images(clips)
        np.testing.assert_allclose(found[:2], whole, atol=1e-5)
        (guesses, _) = predictor.classify(clips, ["growing", "shrinking"])
        assert sum(share for _, share in guesses) == pytest.approx(1)
        assert predictor.image_features(clips).shape[0] == 2
    alone = Predictor.load("image", device="cpu").embed_images([photo])
    np.testing.assert_allclose(
        Predictor.load("image", medium="video", device="cpu").embed_images([photo]),
        alone,
        atol=1e-5,
    )


def test_what_a_predictor_cannot_read(tmp_path):
    predictor = Predictor.load("texts", device="cpu")
    (tmp_path / "bad.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64)
    with pytest.raises(UniclError, match=r"cannot read .*bad.mp4: undecodable video"):
        predictor.embed_images([tmp_path / "bad.mp4"])
    with pytest.raises(UsageError, match=r"missing\.mp4"):
        predictor.embed_images(["missing.mp4"])
    with pytest.raises(UsageError, match=r"no medium 'vidio' besides images.*video"):
        Predictor.load("texts", medium="vidio", device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("texts video-zero-shot nowhere", "no set of videos and no folder 'nowhere'"),
        ("texts video-zero-shot msrvtt", "msrvtt needs its annotations and videos in data/msrvtt"),
        ("texts video-zero-shot clips/none", "no such file or folder"),
        ("texts video-retrieval classes", "classes has classes, but captions are needed"),
        ("texts video-zero-shot all", "give folders"),
        ("texts video-recognition classes", "texts has no classification head"),
        ("head video-zero-shot classes", "no text tower; evaluate it by video-recognition"),
        ("head video-retrieval clips", "no text tower"),
        ("head video-recognition clips", "does not know 12 of the 12 classes of clips"),
        ("head zero-shot images", "no text tower"),
        ("texts zero-shot classes", "holds no images"),
        ("image zero-shot clips", "no sample that can be read"),
        ("texts video-zero-shot classes --video.tower 3d", "video.tower has no effect here"),
        ("texts video-zero-shot classes --video.num_clip 3", "did you mean video.num_clips"),
        ("texts zero-shot images --video.num_clips 3", "key of fine-tune's recipe only"),
        ("texts video-zero-shot classes --split val", "val"),
        ("texts fine-tune images", "texts was trained on video, not on images"),
    ],
)
def test_mistakes_are_named(words, message, capsys, tmp_path):
    assert message in refused(capsys, "eval", *words.split(), *QUIET, "--out", str(tmp_path / "o"))


@pytest.mark.parametrize("form", ["onnx", "open_clip"])
def test_what_another_format_cannot_express(form, capsys, tmp_path):
    out = str(tmp_path / "out")
    said = refused(capsys, "export", "texts", "--format", form, "--out", out)
    assert f"which {form} cannot express; export it with --format safetensors" in said


@pytest.mark.parametrize("run", ["texts", "head", "frames"])
def test_what_is_exported_embeds_alike(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", run, "--format", "safetensors", "--out", str(out)]) == 0
    clip = [next(Path("classes/test").glob("*/*.mp4"))]
    found = [Predictor.load(name, device="cpu").image_features(clip) for name in (run, out)]
    np.testing.assert_array_equal(*found)


def test_images_need_no_pyav(no_av, tmp_path):
    Path(tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 9, 9)).save(tmp_path / f"photos/{number}.png")
    words = ["embed", "image", str(tmp_path / "photos"), "--out", str(tmp_path / "e"), *QUIET]
    assert main(words) == 0
    assert main(["index", str(tmp_path / "e"), "--out", str(tmp_path / "i")]) == 0
    page = str(tmp_path / "page.html")
    assert main(["search", str(tmp_path / "i"), "red", "--html", page, "--device", "cpu"]) == 0
    assert Path(page).read_text().count("data:image/jpeg") == 3
    evaluated("image", "zero-shot", "images", tmp_path / "out")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "image", "video-zero-shot", "classes", *QUIET),
        ("eval", "texts", "zero-shot", "images", *QUIET),
        ("eval", "image", "video-fine-tune", "classes", *QUIET),
        ("embed", "image", "classes", *QUIET),
        ("train", "video_captions", "--data.train", "clips/train"),
        ("train", "video_classes", "--data.train", "classes"),
    ],
)
def test_videos_say_what_they_need(words, no_av, capsys, tmp_path):
    said = refused(capsys, *words, "--out", str(tmp_path / "out"))
    assert said.startswith('videos need PyAV: pip install "unicl[video]"')
