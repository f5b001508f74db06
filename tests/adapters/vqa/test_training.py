"""The losses against plain ones, and that every way to run gives the same gradient."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from adapters.vqa.building import build, complete
from tests.adapters.vqa.runs import recipe_of, write_data
from tests.unicl.ranks import on_ranks
from unicl.build import build_backend
from unicl.config import EngineConfig
from unicl.distributed import ALONE, Ranks
from unicl.engine.deepspeed_backend import DeepSpeedBackend
from unicl.engine.gradient_cache import backward
from unicl.engine.task import Task

OBJECTIVES = ("pretraining", "answers", "captions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("quiz"))


def built(recipe, ranks=ALONE):
    """Build a task and its loader, always with the same weights."""
    torch.manual_seed(0)
    parts = build(recipe, ranks, start=True)
    # BERT's small weights leave next to nothing for the gradients of what lies below.
    for name, parameter in parts.task.model.named_parameters():
        if name.startswith(("fusion.", "heads.")) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return parts.task, parts.loader


def recipe_for(folder, objective, **given):
    return complete(recipe_of(folder, objective, trainer__batch_size="6", **given))


def whole_batch(recipe):
    stream = built(recipe)[1].batches()
    batch = next(stream)
    stream.close()
    return batch


def rows_of(batch, rows):
    kept = torch.tensor(rows, dtype=torch.int64)
    fields = {name: getattr(batch, name)[kept] for name in ("images", "tokens", "labels")}
    texts, keys = ([part[row] for row in rows] for part in (batch.texts, batch.keys))
    return replace(batch, **fields, texts=tuple(texts), keys=tuple(keys))


def gradients_of(task, backend, inputs, *, chunks=1):
    loss, metrics = backward(task, backend, inputs, chunks=chunks)
    found = {name: gradient.clone() for name, gradient in backend.gradients()}
    backend.drop()
    return loss, metrics, found


def plain_gradients(recipe):
    """Return loss and gradients of the whole batch, written out."""
    task, _ = built(recipe)
    model, batch = task.model, whole_batch(recipe)
    inputs = task.inputs(batch).towers["pairs"]
    image = model.image.tokens(batch.images)
    if recipe.vqa.objective == "answers":
        logits = model.heads["answers"](model.fuse(image, batch.tokens).pooled)
        targets = task.targets.of(batch.labels)
        shares = logits.sigmoid()
        losses = -(targets * shares.log() + (1 - targets) * (1 - shares).log())
        loss = losses.sum() / len(batch)
    elif recipe.vqa.objective == "captions":
        losses = []
        for one, text in zip(image, batch.tokens, strict=True):
            said = text[: int(text.argmax()) + 1][None]
            memory = model.fusion.remember(one[None])
            logits = model.heads["words"](model.speak(said[:, :-1], memory))
            losses.append(F.cross_entropy(logits[0], said[0, 1:], reduction="none"))
        loss = torch.cat(losses).mean()
    else:
        own = model.heads["matching"](model.fuse(image, inputs["tokens"]).pooled)
        other = model.heads["matching"](model.fuse(image, inputs["others"]).pooled)
        truth = torch.tensor([1] * len(own) + [0] * len(other))
        states = model.fuse(image, inputs["hidden"]).text
        logits = model.heads["words"](states)
        targets = inputs["targets"][:, : states.shape[1]]
        words = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss = F.cross_entropy(torch.cat([own, other]), truth) + words
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {n: p.grad for n, p in trained.items()}


def assert_same(found, expected, *, rtol=1e-3, atol=1e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[-1].keys() == expected[-1].keys()
    for name, gradient in expected[-1].items():
        torch.testing.assert_close(found[-1][name], gradient, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_what_it_says(folder, objective):
    recipe = recipe_for(folder, objective)
    task, _ = built(recipe)
    assert isinstance(task, Task)
    inputs = task.inputs(whole_batch(recipe))
    found = gradients_of(task, build_backend(recipe, task), inputs)
    expected = plain_gradients(recipe)
    assert_same(found, expected)
    for name, gradient in expected[1].items():
        assert gradient is not None, name  # DDP would wait for it


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_both_towers(folder, objective):
    recipe = recipe_for(folder, objective)
    task, _ = built(recipe)
    found = gradients_of(task, build_backend(recipe, task), task.inputs(whole_batch(recipe)))[2]
    for tower in ("image.backbone.", "text.blocks.", "text.token_embedding.", "fusion.", "heads."):
        assert max(g.abs().max() for n, g in found.items() if n.startswith(tower)) > 1e-6, tower
    assert not any(name.endswith("projection.weight") and "fusion" not in name for name in found)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_gradients_stop_where_a_tower_is_locked(runs, tower):
    given = {"weights": str(runs / "towers"), f"{tower}_tower__locked": "true"}
    recipe = recipe_for(runs, "answers", **given)
    task, _ = built(recipe)
    found = gradients_of(task, build_backend(recipe, task), task.inputs(whole_batch(recipe)))[2]
    towers = {name.partition(".")[0] for name in found}
    assert towers == {"image", "text", "fusion", "heads"} - {tower}
    task.model.train()
    assert not getattr(task.model, tower).training


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunks", [2, 4, 7])
def test_chunks_compute_what_the_whole_does(folder, objective, chunks):
    recipe = recipe_for(folder, objective)
    inputs = built(recipe)[0].inputs(whole_batch(recipe))
    results = []
    for count in (1, chunks):
        task, _ = built(recipe)
        results.append(gradients_of(task, build_backend(recipe, task), inputs, chunks=count))
    assert_same(results[1], results[0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-6)


def test_checkpointing_computes_the_same(folder):
    results = []
    for flag in ("false", "true"):
        given = {f"{each}__checkpointing": flag for each in ("vqa", "image_tower", "text_tower")}
        recipe = recipe_for(folder, "pretraining", **given)
        task, _ = built(recipe)
        inputs = task.inputs(whole_batch(recipe))
        results.append(gradients_of(task, build_backend(recipe, task), inputs))
    assert_same(results[1], results[0])


def check_ranks(recipes):
    """Compare DDP and ZeRO 2 on two ranks with one process, parts uneven and one of them empty."""
    ranks = Ranks(dist.group.WORLD)
    for recipe in recipes:
        batch = whole_batch(recipe)
        task, _ = built(recipe)
        expected = gradients_of(task, build_backend(recipe, task), task.inputs(batch))
        for sizes, chunks in (((4, 2), 1), ((6, 0), 2)):
            own = list(range(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1])))
            backends = [
                functools.partial(build_backend, recipe),
                functools.partial(_zero_2, recipe),
            ]
            for make in backends:
                task, _ = built(recipe, ranks)
                backend = make(task, ranks)
                inputs = task.inputs(rows_of(batch, own))
                assert_same(gradients_of(task, backend, inputs, chunks=chunks), expected)


def _zero_2(recipe, task, ranks):
    engine = EngineConfig(backend="deepspeed", zero_stage=2)
    return DeepSpeedBackend(task, recipe.optimizer, ranks, engine)


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does(folder):
    recipes = [recipe_for(folder, objective) for objective in OBJECTIVES]
    checked = {f"{each}__checkpointing": "true" for each in ("vqa", "image_tower", "text_tower")}
    recipes.append(recipe_for(folder, "pretraining", **checked))
    on_ranks(2, check_ranks, recipes)


@pytest.mark.parametrize("objective", ["answers", "captions"])
def test_what_is_logged_is_a_share(folder, objective):
    recipe = recipe_for(folder, objective)
    task, _ = built(recipe)
    inputs = task.inputs(whole_batch(recipe))
    embeddings = {"pairs": task.encode("pairs", inputs.towers["pairs"])}
    if objective == "answers":
        best = inputs.context["targets"].argmax(1)
        embeddings["pairs"] = F.one_hot(best, task.targets.num_answers).double() * 20 - 10
        assert task.loss(embeddings, inputs.context)[1]["answers/accuracy"] == 1
    else:
        _, guessed, counts = embeddings["pairs"].T
        share = task.loss(embeddings, inputs.context)[1]["words/accuracy"]
        assert share == guessed.sum() / counts.sum()
