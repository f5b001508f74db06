"""Runs on videos: what they train on and leave out, and that every mode computes the same."""

import shutil

import pytest
import torch
from torch import distributed as dist

from adapters.video.building import build, complete
from adapters.video.sets import open_video_set
from tests.adapters.video.runs import NUM_CLIPS, clip_recipe, head_recipe, write_corpus
from tests.adapters.video.videos import encode_audio
from tests.unicl.ranks import on_ranks
from unicl.build import build_backend, train
from unicl.data.shards import ShardWriter
from unicl.distributed import ALONE, Ranks
from unicl.engine.checkpoint import checkpoints
from unicl.engine.gradient_cache import backward
from unicl.engine.metrics import read_metrics
from unicl.engine.optimizer import parameter_groups
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import Setting
from unicl.evaluation.protocols import recognition
from unicl.models import load, read_recipe

MOTIONS = ("growing", "moving down", "moving left", "moving right", "moving up", "shrinking")
BOTH = pytest.mark.parametrize("recipe_of", [clip_recipe, head_recipe])
NO_VIDEO = b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def weights_of(run):
    return load(run).model.state_dict()


def steps_of(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("data", ["clips", "classes"])
def test_texts_are_learnt_from_shards_and_from_files(corpus, tmp_path, data):
    train_part = corpus / data / "train" if data == "clips" else corpus / data
    held_out = corpus / data / "test" if data == "clips" else corpus / data
    recipe = clip_recipe(
        corpus, data__train=str(train_part), evaluation__data=str(held_out), video__num_clips="2"
    )
    run = train(recipe, tmp_path / "run")
    assert run.step == 2
    assert 0 <= run.metrics["zero_shot/top1"] <= run.metrics["zero_shot/top5"] <= 1
    assert "retrieval/t2i_r10" in run.metrics
    assert all(row["train/tflops"] > 0 and "train/top1" not in row for row in steps_of(run.path))
    assert read_recipe(run.path) == recipe


@pytest.mark.parametrize("tower", ["3d", "frames"])
def test_a_head_is_trained_and_measured(corpus, tmp_path, tower):
    recipe = head_recipe(corpus, evaluation__data=str(corpus / "classes"), video__tower=tower)
    run = train(recipe, tmp_path / "run")
    assert read_recipe(run.path).video.class_names == MOTIONS
    assert 0 <= run.metrics["recognition/top1"] <= run.metrics["recognition/top5"] <= 1
    first = steps_of(run.path)[0]
    assert 0 <= first["train/top1"] <= 1
    assert 1.0 < first["train/loss"] < 3.0  # of a head that knows nothing: log 6, 1.79
    assert {"train/grad_norm/head", "train/grad_norm/image"} <= first.keys()
    assert "train/grad_norm/text" not in first


def test_a_head_learns_from_shards(corpus, tmp_path):
    recipe = head_recipe(
        corpus,
        data__train=str(corpus / "clips/train"),
        data__crop_scale="0.9,1",
        optimizer__learning_rate="2e-3",
        trainer__batch_size="12",
        trainer__save_every="20",
        trainer__steps="20",
        video__label_smoothing="0",
        video__sampling="uniform",
    )
    run = train(recipe, tmp_path / "run")
    losses = [row["train/loss"] for row in steps_of(run.path)]
    assert losses[-1] < 0.5 * losses[0]


@BOTH
def test_a_run_that_is_cut_ends_as_a_whole_one(corpus, tmp_path, recipe_of):
    given = {"image_tower__drop_path_rate": "0.2", "video__randaugment_ops": "1"}
    whole = train(recipe_of(corpus, **given), tmp_path / "whole")
    assert train(recipe_of(corpus, **given), tmp_path / "cut").step == whole.step
    newest = checkpoints(tmp_path / "cut/checkpoints")[-1]
    newest.rename(newest.with_name(".gone"))  # as a kill between two checkpoints would have
    assert train(recipe_of(corpus, data__num_workers="1", **given), tmp_path / "cut").step == 2
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_run_does_not_go_on_with_other_videos(corpus, tmp_path):
    data = tmp_path / "classes"
    shutil.copytree(corpus / "classes", data)
    recipe = head_recipe(corpus, data__train=str(data))
    train(recipe, tmp_path / "run")
    first = next((data / "train").glob("*/*.mp4"))
    gone = first.rename(tmp_path / "gone.mp4")
    with pytest.raises(UsageError, match=r"classes has other samples than .*run was trained on; "):
        train(recipe, tmp_path / "run")
    shutil.copy(gone, first)  # the same again, with another time
    assert train(recipe, tmp_path / "run").step == 2


@BOTH
def test_workers_do_not_change_the_batches(corpus, recipe_of):
    found = []
    for workers in ("0", "2"):
        given = {"data__num_workers": workers, "video__randaugment_ops": "2", "data__flip": "true"}
        recipe = complete(recipe_of(corpus, **given))
        stream = build(recipe, ALONE, start=True).loader.batches()
        found.append([next(stream) for _ in range(3)])
        stream.close()
    for one, other in zip(*found, strict=True):
        assert one.images.shape == (6, 3, 4, 32, 32)
        assert one.keys == other.keys
        for name in ("images", "tokens", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def gradients_of(recipe, ranks, *, chunks=1):
    torch.manual_seed(0)
    parts = build(recipe, ranks, start=True)
    backend = build_backend(recipe, parts.task, ranks)
    inputs = parts.task.inputs(next(parts.loader.batches()))
    loss, metrics = backward(parts.task, backend, inputs, chunks=chunks)
    found = {name: gradient.clone() for name, gradient in backend.gradients()}
    backend.drop()
    return loss, metrics, found


def check_chunks(recipes, ranks):
    """Compare ranks and chunks with one process and the whole batch.

    The core's own tests compare every engine.
    """
    for recipe in recipes:
        loss, metrics, gradients = gradients_of(recipe, ALONE)
        found = gradients_of(recipe, ranks, chunks=3)
        torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=1e-5)
        assert found[1].keys() == metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
        for name, gradient in found[2].items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-4)


def check_on_ranks(recipes):
    check_chunks(recipes, Ranks(dist.group.WORLD))


@pytest.mark.slow
def test_ranks_and_chunks_compute_what_one_process_does(corpus):
    on_ranks(2, check_on_ranks, [complete(each(corpus)) for each in (clip_recipe, head_recipe)])


@BOTH
def test_lower_layers_learn_slower(corpus, recipe_of):
    recipe = complete(recipe_of(corpus, optimizer__layer_decay="0.5"))
    model = build(recipe, ALONE, start=True).task.model
    scales = {
        parameter: group["lr_scale"]
        for group in parameter_groups(model, recipe.optimizer)
        for parameter in group["params"]
    }
    backbone = model.image.backbone
    assert scales[backbone.patch_embed.proj.weight] < scales[backbone.norm.weight] <= 1
    if recipe_of is head_recipe:
        assert scales[model.head.weight] == 1


@pytest.mark.parametrize("in_shards", [False, True])
def test_defects_are_counted_and_told(corpus, tmp_path, in_shards):
    bad = {"audio": encode_audio(), "corrupt": NO_VIDEO, "empty": b""}
    data = tmp_path / "data"
    good = sorted((corpus / "classes/train").glob("*/*.mp4"))
    if in_shards:
        with ShardWriter(data) as writer:
            for path in good:
                writer.write(path.stem, path.read_bytes(), "mp4", "words")
            for name, encoded in bad.items():
                writer.write(name, encoded, "mp4", "words")
    else:
        shutil.copytree(corpus / "classes/train", data / "train")
        for name, encoded in bad.items():
            (data / f"train/growing/{name}.mp4").write_bytes(encoded)
    given = {"data__train": str(data), "trainer__batch_size": "15"}
    lenient = clip_recipe(corpus, data__max_skipped_share="0.5", **given)
    batch = next(build(lenient, ALONE, start=True).loader.batches())
    assert len(batch) == 12
    assert batch.skipped == {"no video stream": 1, "undecodable video": 1, "no image": 1}
    train(lenient, tmp_path / "run")
    assert [row["train/skipped"] for row in steps_of(tmp_path / "run")] == [3, 6]
    strict = clip_recipe(corpus, trainer__steps="10", trainer__save_every="10", **given)
    with pytest.raises(UniclError, match=r"samples were skipped \(.*no video stream: \d+") as told:
        train(strict, tmp_path / "strict")
    assert "undecodable video" in str(told.value)


@BOTH
def test_videos_of_too_many_pixels_are_skipped(corpus, recipe_of):
    clips, classes = str(corpus / "clips/test"), str(corpus / "classes")
    held_out = clips if recipe_of is clip_recipe else classes
    given = {"data__max_image_pixels": "100", "evaluation__data": held_out}
    parts = build(complete(recipe_of(corpus, **given)), ALONE, start=True)
    for batches in (parts.loader.batches(), parts.evaluators[0].loader.epoch()):
        assert next(iter(batches)).skipped.keys() == {"video too large"}
        batches.close()


def test_the_head_must_know_every_class(corpus, tmp_path):
    shutil.copytree(corpus / "classes", tmp_path / "more")
    shutil.copytree(tmp_path / "more/test/growing", tmp_path / "more/test/dancing")
    recipe = head_recipe(corpus, evaluation__data=str(tmp_path / "more"))
    with pytest.raises(UsageError, match=r"no class of the head, such as 'dancing'"):
        train(recipe, tmp_path / "run")
    given = head_recipe(corpus, video__class_names="growing,moving down")
    with pytest.raises(UsageError, match=r"4 texts of the data are no class .* 'moving left'"):
        train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_without_training_videos_is_one_of_the_head(corpus, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(corpus / "classes", data)
    shutil.rmtree(data / "train/growing")
    (data / "classnames.txt").write_text("larger\ndown\nleft\nright\nup\nsmaller\n")
    recipe = complete(head_recipe(corpus, data__train=str(data), evaluation__data=str(data)))
    assert recipe.video.class_names == ("larger", "down", "left", "right", "up", "smaller")
    run = train(recipe, tmp_path / "run")
    tested = open_video_set(str(data), root=tmp_path)
    result, _ = recognition(load(run.path, device="cpu"), tested, Setting(num_workers=0))
    assert result.num_images == NUM_CLIPS


def test_two_classes_of_one_name_are_told(corpus):
    names = ",".join((*MOTIONS, "moving  up"))
    with pytest.raises(UsageError, match="two classes of the head are called 'moving up'; give"):
        build(head_recipe(corpus, video__class_names=names), ALONE, start=True)


def test_a_head_has_no_class_of_an_empty_text(corpus, tmp_path):
    clip = next((corpus / "classes/train").glob("*/*.mp4")).read_bytes()
    with ShardWriter(tmp_path / "data") as writer:
        for number, text in enumerate(("growing", " ", "shrinking", "")):
            writer.write(f"{number}", clip, "mp4", text)
    recipe = head_recipe(corpus, data__train=str(tmp_path / "data"))
    with pytest.raises(UsageError, match="2 samples of the data have an empty text, which"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_data_has_are_kept(corpus, tmp_path):
    names = ("standing still", *reversed(MOTIONS))
    run = train(head_recipe(corpus, video__class_names=",".join(names)), tmp_path / "run")
    assert load(run.path).classes == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data__train": "nowhere"}, "no set of videos and no folder 'nowhere'"),
        ({"image_tower__model": "resnet18"}, "video.tower 3d inflates a CoSwin only"),
        ({"video__time_windows": "2,2"}, "time_windows"),
        ({"weights": "nowhere"}, "weights names no run"),
    ],
)
def test_mistakes_end_before_anything_is_written(corpus, tmp_path, given, message):
    with pytest.raises(UniclError, match=message):
        train(clip_recipe(corpus, **given), tmp_path / "run")
    assert not (tmp_path / "run").exists()
