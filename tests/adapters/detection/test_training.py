"""The loss of a step, its classes, and that every way to run gives the same gradient."""

from dataclasses import replace

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from adapters.detection.atss import Objects, Prediction, losses
from adapters.detection.building import build, complete
from adapters.detection.training import DetectionTraining
from tests.adapters.detection.painted import write_painted
from tests.adapters.detection.runs import recipe_of
from tests.unicl.ranks import on_ranks
from unicl.build import build_backend
from unicl.distributed import ALONE, Ranks
from unicl.engine.gradient_cache import backward
from unicl.errors import UsageError

NAMES = ["red", "green", "blue", "white"]
IMAGES = [
    [("red", (4, 4, 24, 30)), ("blue", (40, 10, 70, 50))],
    [],
    [("green", (10, 20, 40, 60))],
    [("green", (2, 2, 20, 20)), ("green", (30, 30, 60, 60)), ("red", (60, 2, 80, 20))],
]
FEDERATED = [
    {"neg_category_ids": [8], "not_exhaustive_category_ids": []},
    {"neg_category_ids": [6], "not_exhaustive_category_ids": []},
    {"neg_category_ids": [], "not_exhaustive_category_ids": []},
    {"neg_category_ids": [7], "not_exhaustive_category_ids": []},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    write_painted(folder / "all", IMAGES, NAMES)
    write_painted(folder / "some", IMAGES, NAMES, federated=FEDERATED)
    write_painted(folder / "empty", [[], [], [], []], NAMES)
    return folder


def recipe_for(folder, part="all", **given):
    # Of 16 channels each is a group of its norm, whose mean of 0 lies in the kink of a ReLU.
    data = {"data__train": str(folder / part / "boxes.json"), "detection__width": "32"}
    return complete(recipe_of(folder, **data, **given))


def built(recipe, ranks=ALONE):
    """Build a task and its loader, always with the same weights."""
    torch.manual_seed(0)
    parts = build(recipe, ranks, start=True)
    return parts.task, parts.loader


def whole_batch(recipe):
    """Return the four images as one batch, in order."""
    (batch,) = built(recipe)[1].epoch()
    return rows_of(batch, batch.rows.argsort().tolist())


def rows_of(batch, rows):
    """Return some images of a batch."""
    kept = torch.tensor(rows, dtype=torch.int64)
    places = torch.full((len(batch),), -1)
    places[kept] = torch.arange(len(kept))
    own = places[batch.owners] >= 0
    fields = {name: getattr(batch, name)[kept] for name in ("images", "sizes", "originals", "rows")}
    return replace(
        batch,
        **fields,
        judged=batch.judged[kept],
        boxes=batch.boxes[own],
        labels=batch.labels[own],
        owners=places[batch.owners[own]],
        keys=tuple(batch.keys[row] for row in rows),
    )


def gradients_of(task, recipe, inputs, ranks=ALONE, *, chunks=1):
    backend = build_backend(recipe, task, ranks)
    loss, metrics = backward(task, backend, inputs, chunks=chunks)
    found = {name: gradient.clone() for name, gradient in backend.gradients()}
    backend.drop()
    return loss, metrics, found


@pytest.mark.parametrize("part", ["all", "some"])
def test_the_loss_is_that_of_all_classes(folder, part):
    recipe = recipe_for(folder, part)
    batch = whole_batch(recipe)
    task, _ = built(recipe)
    loss, metrics, found = gradients_of(task, recipe, task.inputs(batch))

    model = built(recipe)[0].model
    tokens = task._tokens
    outputs = model.places(batch.images)
    names = model.encode_text(tokens, economies=False)
    similarities = F.normalize(outputs[..., :-5], dim=-1) @ names.T
    scale, bias = model.predictor.log_scale.exp(), model.predictor.bias
    prediction = Prediction(scale * similarities + bias, outputs[..., -5:-1], outputs[..., -1])
    objects = Objects(batch.boxes, batch.labels, batch.owners)
    anchors = model.anchors(*batch.images.shape[-2:])
    parts = losses(prediction, anchors, objects, judged=batch.judged)
    sum(parts.values()).backward()

    torch.testing.assert_close(loss, sum(parts.values()).detach(), rtol=1e-5, atol=1e-6)
    for name, value in parts.items():
        torch.testing.assert_close(metrics[f"loss/{name}"], value.detach(), rtol=1e-5, atol=1e-6)
        assert value > 0
    assert metrics["scale"].item() == pytest.approx(10)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("classes", ["numbers", "texts"])
def test_what_nobody_looked_for_gives_no_gradient(folder, classes):
    recipe = recipe_for(folder, "some", detection__classes=classes)
    batch = whole_batch(recipe)
    task, _ = built(recipe)
    inputs = task.inputs(batch)
    task.model.train()
    encoded = {tower: task.encode(tower, rows).detach() for tower, rows in inputs.towers.items()}
    model = task.model
    fit = encoded["scale"][0] if "scale" in encoded else None
    prediction = model.predict(encoded["image"], encoded.get("text"), fit)
    logits = prediction.logits.requires_grad_()
    objects = Objects(batch.boxes, inputs.context["labels"], batch.owners)
    parts = losses(
        prediction._replace(logits=logits),
        model.anchors(*batch.images.shape[-2:]),
        objects,
        judged=inputs.context["judged"],
    )
    (gradient,) = torch.autograd.grad(parts["classes"], logits)
    touched = gradient.abs().sum(1) > 0
    # 0: red and blue are there, white was looked for. 1: green. 2: green is there. 3: blue.
    expected = {0: "red blue white", 1: "green", 2: "green", 3: "red green blue"}
    for image, names in expected.items():
        here = {NAMES[column] for column in touched[image].nonzero().flatten().tolist()}
        assert here == set(names.split()), image


def test_classes_of_a_step_follow_from_seed_and_position(runs):
    recipe = complete(recipe_of(runs, detection__classes_per_step="9"))
    task, loader = built(recipe)
    stream = loader.batches()
    batches = [next(stream) for _ in range(3)]
    stream.close()

    def chosen(task, batch):
        return task._choose(batch).tolist()

    seen = [chosen(task, batch) for batch in batches]
    assert seen == [chosen(built(recipe)[0], batch) for batch in batches]
    torch.manual_seed(99)
    assert seen == [chosen(task, batch) for batch in batches]
    for columns, batch in zip(seen, batches, strict=True):
        assert columns == sorted(set(columns))
        assert set(batch.labels.tolist()) <= set(columns)
        assert len(columns) == max(9, len(batch.labels.unique()))
        inputs = task.inputs(batch)
        assert len(inputs.towers["text"]) == len(columns)
        assert [columns[label] for label in inputs.context["labels"]] == batch.labels.tolist()
        assert inputs.context["judged"].shape == (4, len(columns))
    other = DetectionTraining(
        task.model,
        names=recipe.detection.class_names,
        tokenize=lambda texts: torch.arange(len(texts))[:, None],
        classes_per_step=9,
        seed=1,
    )
    assert seen != [chosen(other, batch) for batch in batches]
    assert chosen(task, batches[0]) != chosen(task, replace(batches[0], consumed=400))


def test_only_classes_that_were_looked_for_are_drawn(folder):
    recipe = recipe_for(folder, "some", detection__classes_per_step="3")
    task, batch = built(recipe)[0], whole_batch(recipe)
    assert task._choose(rows_of(batch, [1])).tolist() == [1]
    assert task._choose(rows_of(batch, [2])).tolist() == [1]
    assert task._choose(rows_of(batch, [0])).tolist() == [0, 2, 3]
    assert task._choose(rows_of(batch, [0, 1])).tolist()[0] == 0


@pytest.mark.parametrize("classes", ["texts", "numbers"])
def test_a_batch_without_objects_trains(folder, classes):
    recipe = recipe_for(folder, "some", detection__classes=classes)
    task, _ = built(recipe)
    batch = whole_batch(recipe)
    empty = sorted(set(range(len(batch))) - set(batch.owners.tolist()))
    loss, metrics, found = gradients_of(task, recipe, task.inputs(rows_of(batch, empty)))
    assert loss > 0
    assert metrics["loss/boxes"] == metrics["loss/centerness"] == 0
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["predictor.classes.weight"].abs().sum() > 0
    assert found["predictor.boxes.weight"].abs().sum() == 0


def test_a_set_without_objects_is_refused(folder):
    with pytest.raises(UsageError, match="has no objects to learn from"):
        built(recipe_for(folder, "empty"))


def test_objects_without_classes(runs):
    given = {"weights": str(runs / "towers"), "detection__classes": "none"}
    recipe = complete(recipe_of(runs, **given))
    task, loader = built(recipe)
    batch = next(loader.batches())
    inputs = task.inputs(batch)
    assert inputs.towers.keys() == {"image"}
    assert set(inputs.context["labels"].tolist()) == {0}
    loss, _, found = gradients_of(task, recipe, inputs)
    assert loss > 0
    assert {name.split(".")[0] for name in found} == {"pyramid", "head", "predictor"}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("classes", ["texts", "numbers"])
@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_chunks_compute_what_the_whole_does(folder, classes, chunks):
    recipe = recipe_for(folder, detection__classes=classes, detection__classes_per_step="3")
    task, _ = built(recipe)
    inputs = task.inputs(whole_batch(recipe))
    expected = gradients_of(task, recipe, inputs)
    assert_same(gradients_of(built(recipe)[0], recipe, inputs, chunks=chunks), expected)


def check_ranks(cases):
    """Compare two ranks with one process, for each recipe, rows of each rank, and chunks."""
    ranks = Ranks(dist.group.WORLD)
    for recipe, rows, chunks in cases:
        batch = whole_batch(recipe)
        task, _ = built(recipe)
        expected = gradients_of(task, recipe, task.inputs(batch))
        task, _ = built(recipe, ranks)
        inputs = task.inputs(rows_of(batch, rows[ranks.rank]))
        assert_same(gradients_of(task, recipe, inputs, ranks, chunks=chunks), expected)


def test_ranks_compute_what_one_process_does(folder):
    # DDP refuses parameters without gradient, which a rank without images could have.
    texts, numbers = recipe_for(folder), recipe_for(folder, "some", detection__classes="numbers")
    one_has_none = ([], [0, 1, 2, 3])
    on_ranks(2, check_ranks, [(texts, one_has_none, 1), (numbers, one_has_none, 2)])
