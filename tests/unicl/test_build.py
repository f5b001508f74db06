"""From a recipe to a trained, reloaded model on real shards."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unicl.corpus import small_recipe, write_corpus
from unicl.build import build_train_loader, train
from unicl.config import parse_recipe
from unicl.engine.checkpoint import checkpoints
from unicl.engine.metrics import read_metrics
from unicl.errors import UniclError, UsageError
from unicl.models import build_model, choose_device, load_model, read_recipe
from unicl.towers.text import tokenize


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", num_samples=40)
    write_corpus(folder / "held_out", num_samples=12, seed=1)
    return folder


def recipe_for(corpus, **overrides):
    keys = small_recipe(corpus / "train", corpus / "held_out")
    return parse_recipe("", {**keys, **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_a_recipe_trains_evaluates_and_loads_again(corpus, tmp_path):
    recipe = recipe_for(corpus)
    run = train(recipe, tmp_path / "run")
    assert run.step == 6
    assert 0 <= run.metrics["zero_shot/top1"] <= run.metrics["zero_shot/top5"] <= 1
    assert "retrieval/t2i_r10" in run.metrics
    assert read_recipe(run.path) == recipe
    model, loaded = load_model(run.path)
    assert loaded == recipe
    assert not model.training
    embedding = model.encode_image(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(1))


def test_a_small_run_learns_the_colours(corpus, tmp_path):
    recipe = recipe_for(
        corpus,
        trainer__steps="100",
        trainer__save_every="100",
        trainer__log_every="10",
        optimizer__learning_rate="1e-3",
        image_tower__drop_path_rate="0",
    )
    run = train(recipe, tmp_path / "run")
    assert run.metrics["zero_shot/top1"] >= 0.8
    losses = [
        row["train/loss"] for row in read_metrics(run.path / "metrics.jsonl") if "train/loss" in row
    ]
    assert losses[-1] < losses[0]


def test_the_same_command_continues_and_ends_equal(corpus, tmp_path):
    whole = train(recipe_for(corpus), tmp_path / "whole")
    half = tmp_path / "cut"
    run = train(recipe_for(corpus), half)
    # Take the end away, as a kill between two checkpoints would have.
    newest = checkpoints(half / "checkpoints")[-1]
    newest.rename(newest.with_name(".gone"))
    assert train(recipe_for(corpus, data__num_workers="1"), half).step == run.step
    one, other = load_model(whole.path)[0], load_model(half)[0]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_chunks_give_the_same_run(corpus, tmp_path):
    """Gradient cache on real towers: equal to rounding, drop-path off as its draws differ."""
    plain = train(recipe_for(corpus, image_tower__drop_path_rate="0"), tmp_path / "plain")
    chunked = recipe_for(corpus, image_tower__drop_path_rate="0", trainer__chunk="5")
    cached = train(chunked, tmp_path / "cached")
    one, other = load_model(plain.path)[0], load_model(cached.path)[0]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_folder_of_another_recipe_is_left_alone(corpus, tmp_path):
    train(recipe_for(corpus), tmp_path / "run")
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UsageError, match=r"run with another optimizer\.learning_rate; choose"):
        train(recipe_for(corpus, optimizer__learning_rate="1"), tmp_path / "run")
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty and not a run"):
        train(recipe_for(corpus), tmp_path / "other")


def test_a_run_does_not_go_on_with_other_shards(corpus, tmp_path):
    write_corpus(tmp_path / "data", num_samples=12)
    recipe = recipe_for(corpus, data__train=str(tmp_path / "data"), trainer__steps="2")
    train(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    write_corpus(tmp_path / "data", num_samples=12)  # writes the same bytes again
    assert train(recipe, tmp_path / "run").step == 2
    shutil.rmtree(tmp_path / "data")
    write_corpus(tmp_path / "data", num_samples=11)
    with pytest.raises(UsageError, match=r"data has other samples than .*run was trained on; "):
        train(recipe, tmp_path / "run")
    (tmp_path / "run/data.digest").unlink()  # of a run from before it was kept
    assert train(recipe, tmp_path / "run").step == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_tower__model": "coswin_tinny"}, "coswin_tiny"),
        ({"data__train": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data__train": ""}, r"data\.train is not set"),
        ({"trainer__batch_size": "1"}, "trainer.batch_size must be at least 2"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_thing(corpus, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        train(recipe_for(corpus, **overrides), tmp_path / "run")


def test_a_mistake_does_not_occupy_the_folder(corpus, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        train(recipe_for(corpus, data__train=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(recipe_for(corpus, trainer__steps="1"), tmp_path / "run").step == 1


def test_held_out_texts_must_be_class_names(corpus, tmp_path):
    write_corpus(tmp_path / "three", num_samples=3)
    with pytest.raises(UsageError, match=r"has 3 texts that are no class name .* such as 'black "):
        train(recipe_for(corpus, evaluation__names=str(tmp_path / "three")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_an_error_recommends_can_be_done(corpus, tmp_path):
    """Keys that do not change the training are free on resume, and the recipe keeps up."""
    train(recipe_for(corpus, trainer__steps="4"), tmp_path)
    changed = recipe_for(
        corpus,
        trainer__steps="4",
        trainer__max_nonfinite="3",
        data__max_skipped_share="0.5",
        evaluation__templates="clip",
    )
    assert train(changed, tmp_path).step == 4
    assert read_recipe(tmp_path) == changed


def test_a_run_may_be_called_like_a_checkpoint(corpus, tmp_path):
    run = train(recipe_for(corpus, trainer__steps="1"), tmp_path / "step-mine").path
    assert load_model(run)[1].trainer.steps == 1
    assert load_model(checkpoints(run / "checkpoints")[-1])[1].trainer.steps == 1


def test_what_is_wrong_with_the_data_is_said_at_the_start(tmp_path, caplog):
    shards = write_corpus(tmp_path / "train", num_samples=10)
    (tar,) = shards.glob("*.tar")
    os.truncate(tar, tar.stat().st_size // 2)
    recipe = parse_recipe("", {**small_recipe(shards), "data.max_skipped_share": "1"})
    build_train_loader(recipe)
    assert "shard-000000.tar has" in caplog.text
    assert "the samples it lacks are skipped" in caplog.text
    assert "batch_size 12 is larger than" in caplog.text


def test_loading_what_is_not_a_run_says_so(corpus, tmp_path):
    with pytest.raises(UniclError, match="is not a run"):
        load_model(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UniclError, match="has no checkpoint yet"):
        load_model(tmp_path)


def test_a_run_inside_the_folder_is_suggested(tmp_path):
    (tmp_path / "unicl").mkdir()
    (tmp_path / "unicl" / "recipe.toml").write_text("")
    with pytest.raises(UniclError, match=r"is not a run: .*; perhaps you mean .*/unicl$"):
        load_model(tmp_path)


def test_damaged_weights_are_not_used(corpus, tmp_path, caplog):
    run = train(recipe_for(corpus), tmp_path / "run").path
    older, newest = checkpoints(run / "checkpoints")
    whole = load_model(older)[0].state_dict()
    overwrite(newest / "model.safetensors")
    with pytest.raises(UniclError, match=r"model\.safetensors is damaged: its SHA-256"):
        load_model(newest)
    loaded = load_model(run)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())
    assert (
        "is damaged: its SHA-256 is not the one in SHA256SUMS; looking for another checkpoint"
        in caplog.text
    )
    overwrite(older / "model.safetensors")
    with pytest.raises(UniclError, match=r"no checkpoint of .*run is whole; train it again"):
        load_model(run)
    with pytest.raises(UniclError, match=rf"step-00000099; there is .*{newest.name}$"):
        load_model(newest.with_name("step-00000099"))


def overwrite(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_metric_of_the_best_can_be_changed(corpus, tmp_path):
    """A name that is wrong shows at the first evaluation; it must not lock the run."""
    with pytest.raises(UsageError, match="keep_best is 'top1'"):
        train(recipe_for(corpus, trainer__keep_best="top1", trainer__eval_every="3"), tmp_path)
    recipe = recipe_for(corpus, trainer__keep_best="zero_shot/top1", trainer__eval_every="3")
    assert train(recipe, tmp_path).step == 6


def test_a_run_starts_from_another_ones_model(corpus, tmp_path):
    """From a run, a checkpoint or a file; to another image size, window and context length."""
    source = train(recipe_for(corpus), tmp_path / "source").path
    old = load_model(source)[0]
    newest = checkpoints(source / "checkpoints")[-1]
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    tokens = tokenize(["red square", "blue"], context_length=10)
    for path in (source, newest, newest / "model.safetensors"):
        recipe = recipe_for(corpus, weights=str(path), text_tower__context_length="10")
        model = build_model(recipe).eval()
        assert torch.equal(model.encode_text(tokens), old.encode_text(tokens))
        assert torch.equal(model.encode_image(images), old.encode_image(images))
        assert torch.equal(model.logit_scale, old.logit_scale)
    longer = recipe_for(
        corpus,
        weights=str(source),
        text_tower__context_length="30",
        image_tower__image_size="48",
        image_tower__window_size="5",
    )
    model = build_model(longer).eval()
    assert torch.equal(model.encode_text(tokens), old.encode_text(tokens))
    tables = [w for k, w in model.named_parameters() if k.endswith("bias_table")]
    assert {len(table) for table in tables} == {81}
    # Once it has a checkpoint of its own, a run needs what it started from no more.
    run = train(longer, tmp_path / "run").path
    source.rename(tmp_path / "gone")
    assert train(longer, run).step == 6
    load_model(run)
    with pytest.raises(UsageError, match=r"weights names no run, checkpoint, \.safetensors or"):
        train(longer, tmp_path / "other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"embed_dim": "8"},
            r"safetensors is of another .*projection.weight is \(16, \d+\), .*\(8",
        ),
        ({"text_tower__num_layers": "2"}, r"safetensors is of another .* no text.blocks.1"),
        (
            {"text_tower__width": "8"},
            r"safetensors is of another .*: text\..* is \(16, 16\), .* 8\)",
        ),
        ({"image_tower__model": "test_vit"}, r"safetensors does not fit image_tower.model: "),
        ({"image_tower__layer_scale": "1"}, r"safetensors does not fit image_tower.model: .*gamma"),
    ],
)
def test_weights_to_start_from_must_fit(corpus, tmp_path, overrides, message):
    model = build_model(recipe_for(corpus))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(UniclError, match=message) as caught:
        train(recipe_for(corpus, weights=str(path), **overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_backbone_is_no_whole_model(corpus, tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_file(build_model(recipe_for(corpus)).image.backbone.state_dict(), path)
    with pytest.raises(UsageError, match=r"has no whole model's weights: it lacks image.backbone"):
        build_model(recipe_for(corpus, weights=str(path)))
    build_model(recipe_for(corpus, image_tower__weights=str(path)))


def test_the_average_is_what_is_loaded(corpus, tmp_path):
    run = train(recipe_for(corpus, optimizer__ema_decay="0.9"), tmp_path / "run").path
    newest = checkpoints(run / "checkpoints")[-1]
    average = load_file(newest / "ema.safetensors")
    assert not torch.equal(
        average["logit_scale"], load_file(newest / "model.safetensors")["logit_scale"]
    )
    started = build_model(recipe_for(corpus, weights=str(run)))
    for model in (load_model(run)[0], load_model(newest)[0], started):
        for name, value in model.state_dict().items():
            assert torch.equal(value, average[name]), name
    (newest / "ema.safetensors").unlink()
    with pytest.raises(UniclError, match=r"cannot read ema\.safetensors"):
        load_model(newest)


def test_a_locked_tower_keeps_its_weights(corpus, tmp_path):
    path = tmp_path / "model.safetensors"
    before = build_model(recipe_for(corpus)).state_dict()
    save_file(before, path)
    locked = {"weights": str(path), "image_tower__locked": "true"}
    run = train(recipe_for(corpus, **locked, image_tower__drop_path_rate="0"), tmp_path / "run")
    model = load_model(run.path)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("image."), name


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x", "mps", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UsageError, match="device"):
        choose_device(device)
    assert choose_device("cpu").type == "cpu"


def test_equal_seeds_build_equal_models(corpus):
    def weights(seed):
        torch.manual_seed(seed)
        return build_model(recipe_for(corpus)).state_dict()

    assert all(
        torch.equal(a, b) for a, b in zip(weights(1).values(), weights(1).values(), strict=True)
    )
    assert not torch.equal(
        weights(1)["text.projection.weight"], weights(2)["text.projection.weight"]
    )


def test_the_text_towers_settings_reach_it(corpus):
    recipe = recipe_for(corpus, text_tower__activation="quick_gelu", text_tower__norm_eps="0.5")
    text = build_model(recipe).text
    assert text.activation == "quick_gelu"
    assert {module.eps for module in text.modules() if isinstance(module, torch.nn.LayerNorm)} == {
        0.5
    }
