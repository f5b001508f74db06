"""What a run of detection is made of, what it starts from, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from adapters.detection.building import build, build_model, complete
from tests.adapters.detection.layouts import CATEGORIES, box, image, write
from tests.adapters.detection.runs import recipe_of
from unicl.build import train
from unicl.distributed import ALONE
from unicl.engine.checkpoint import checkpoints
from unicl.engine.gradient_cache import backward
from unicl.engine.metrics import read_metrics
from unicl.engine.optimizer import parameter_groups
from unicl.engine.torch_backend import TorchBackend
from unicl.errors import UniclError, UsageError
from unicl.models import read_recipe

CLASSES = pytest.mark.parametrize("classes", ["texts", "numbers", "none"])


def weights_of(run):
    return load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def steps_of(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if "train/loss" in row]


def started(runs, weights, **given):
    """Build the model of a recipe that starts from a run."""
    recipe = complete(recipe_of(runs, weights=str(runs / weights), **given))
    torch.manual_seed(5)
    return build_model(recipe, start=True)


@CLASSES
def test_a_run_knows_its_classes(runs, classes):
    detection = read_recipe(runs / classes).detection
    held_out = {"blue triangle", "green circle", "red cross", "yellow square"}
    if classes == "none":
        assert detection.class_names == detection.category_ids == ()
    else:
        assert len(detection.class_names) == len(detection.category_ids) == 20
        assert not held_out & set(detection.class_names)
        content = json.loads((runs / "scenes/train/_annotations.coco.json").read_text())
        names = {each["id"]: each["name"] for each in content["categories"]}
        known = zip(detection.category_ids, detection.class_names, strict=True)
        assert all(names[number] == name for number, name in known)
    assert all(0 < row["train/loss/classes"] < 10 for row in steps_of(runs / classes))


@CLASSES
def test_towers_start_as_they_were_trained(runs, classes):
    towers = weights_of(runs / "towers")
    own = started(runs, "towers", detection__classes=classes).state_dict()
    for name, weight in towers.items():
        if classes == "numbers" and not name.startswith("image.backbone."):
            continue  # nothing is embedded
        assert torch.equal(own[name], weight), name
    assert own.keys() - towers.keys() >= {"predictor.classes.weight", "pyramid.norms.0.weight"}


def test_classes_none_changes_no_tower(runs):
    towers, own = weights_of(runs / "towers"), weights_of(runs / "none")
    for name, weight in towers.items():
        assert torch.equal(own[name], weight), name
    fresh = started(runs, "towers", detection__classes="none").train()
    assert not fresh.image.training
    assert not fresh.text.training
    trained = {name.split(".")[0] for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {"pyramid", "head", "predictor"}


def test_a_locked_tower_stays(runs, tmp_path):
    given = {"image_tower__locked": "true", "weights": str(runs / "towers")}
    train(recipe_of(runs, **given), tmp_path / "run")
    before, after = weights_of(runs / "towers"), weights_of(tmp_path / "run")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(name.startswith("text.") for name in changed)


def test_a_head_starts_from_another_as_far_as_it_fits(runs):
    whole = weights_of(runs / "texts")
    same = started(runs, "texts").state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in whole.items())
    deeper = started(runs, "texts", detection__num_blocks="2").state_dict()
    more = {name for name in deeper if name not in whole}
    assert more
    assert all(name.startswith("head.dyhead_tower.1.") for name in more)
    assert all(torch.equal(deeper[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("count", [20, 3])
def test_classes_by_number_start_from_a_detector(runs, count):
    given = {
        "detection__classes": "numbers",
        "detection__class_names": ",".join("abcdefghijklmnopqrst"[:count]),
    }
    recipe = recipe_of(runs, weights=str(runs / "numbers"), **given)
    own, whole = build_model(recipe, start=True).state_dict(), weights_of(runs / "numbers")
    assert torch.equal(own["predictor.boxes.weight"], whole["predictor.boxes.weight"])
    assert len(own["predictor.classes.weight"]) == count
    if count == 20:
        assert torch.equal(own["predictor.classes.weight"], whole["predictor.classes.weight"])


def test_embeddings_are_not_taken_for_logits(runs):
    given = {
        "detection__classes": "numbers",
        "detection__class_names": ",".join("abcdefghijklmnop"),
    }
    recipe = recipe_of(runs, weights=str(runs / "texts"), **given)
    own, whole = build_model(recipe, start=True).state_dict(), weights_of(runs / "texts")
    assert own["predictor.classes.weight"].shape == whole["predictor.classes.weight"].shape
    assert not torch.equal(own["predictor.classes.weight"], whole["predictor.classes.weight"])
    assert torch.equal(own["predictor.boxes.weight"], whole["predictor.boxes.weight"])
    assert own["predictor.classes.bias"].max() < -4  # a rare object, as at the start


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_tower__model": "test_vit"}, "test_vit has no maps of strides 8, 16, 32"),
        (
            {
                "image_tower__model": "swin_tiny_patch4_window7_224",
                "image_tower__image_size": "224",
            },
            "does not take images of any size, as detection needs: Input height",
        ),
        ({"detection__classes": "none"}, "classes none keeps .* name a run by `weights`"),
        ({"weights": "nowhere"}, "weights names no run, .* file: nowhere"),
        ({"data__train": "nowhere"}, "no set of boxes and no file or folder 'nowhere'"),
        ({"detection__class_names": "a,b"}, "class_names differ from the 20 classes of .* 'a'"),
        ({"evaluation__data": "nowhere"}, "'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_occupy_nothing(runs, tmp_path, given, message):
    with pytest.raises(UsageError, match=message) as caught:
        train(recipe_of(runs, **given), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_kind(runs):
    with pytest.raises(UniclError, match=r"text\.") as caught:
        started(runs, "numbers")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"does not fit image_tower\.model"):
        started(runs, "towers", image_tower__model="test_resnet")


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        ("coswin_nano", "texts"),
        ("coswin_nano", "numbers"),
        ("coswin_nano", "none"),
        ("convnextv2_atto", "texts"),
        ("test_efficientnet", "numbers"),
    ],
)
def test_every_trained_parameter_has_a_gradient(runs, model, classes):
    """DDP waits for all of them."""
    given = {"detection__classes": classes, "detection__width": "32", "detection__num_levels": "4"}
    if classes == "none":
        given["weights"] = str(runs / "towers")
    else:
        given["image_tower__model"] = model
    recipe = complete(recipe_of(runs, **given))
    parts = build(recipe, ALONE, start=True)
    task, batch = parts.task, next(parts.loader.batches())
    backend = TorchBackend(task, recipe.optimizer, ALONE)
    for each in (batch, empty(batch)):
        backward(task, backend, task.inputs(each))
        trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in trained.values())
        backend.drop()


def empty(batch):
    none = {name: getattr(batch, name)[:0] for name in ("sizes", "originals", "boxes")}
    none["images"] = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    rest = {
        name: getattr(batch, name)[:0] for name in ("labels", "owners", "judged", "rows", "keys")
    }
    return replace(batch, **none, **rest)


@CLASSES
def test_a_run_that_is_cut_ends_as_a_whole_one(runs, tmp_path, classes):
    given = {
        "detection__classes": classes,
        "weights": str(runs / "towers"),
        "image_tower__drop_path_rate": "0.2",
        "detection__classes_per_step": "6",
        "data__flip": "true",
        "data__crop_scale": "0.6,1",
    }
    whole = train(recipe_of(runs, **given), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = checkpoints(tmp_path / "cut/checkpoints")[-1]
    newest.rename(newest.with_name(".gone"))
    given["data__num_workers"] = "1"
    assert train(recipe_of(runs, **given), tmp_path / "cut").step == whole.step == 2
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("change", ["box", "image"])
def test_a_run_does_not_go_on_with_other_data(runs, tmp_path, change):
    shutil.copytree(runs / "scenes", tmp_path / "scenes")
    recipe = recipe_of(tmp_path)
    train(recipe, tmp_path / "run")
    path = tmp_path / "scenes/train/_annotations.coco.json"
    before = path.read_text()
    if change == "box":
        content = json.loads(before)
        content["annotations"][0]["bbox"][2] -= 3
        path.write_text(json.dumps(content))
    else:
        (tmp_path / "scenes/train/000000.png").unlink()
    with pytest.raises(UsageError, match=r"has other samples than .*run was trained on"):
        train(recipe, tmp_path / "run")
    if change == "box":
        path.write_text(before)
        assert train(recipe, tmp_path / "run").step == 2


def test_what_is_measured_during_training(runs, tmp_path):
    given = {"evaluation__data": str(runs / "scenes"), "trainer__keep_best": "detection/ap50"}
    run = train(recipe_of(runs, **given), tmp_path / "run")
    assert {"detection/ap", "detection/ap50", "detection/ar100"} <= run.metrics.keys()
    (tmp_path / "alone/test").mkdir(parents=True)
    shutil.copytree(runs / "scenes/test", tmp_path / "alone/test", dirs_exist_ok=True)
    given["evaluation__data"] = str(tmp_path / "alone")
    with pytest.raises(UsageError, match="has no split 'val'; it has test"):
        train(recipe_of(runs, **given), tmp_path / "other")
    given["evaluation__data"] = str(tmp_path / "alone/test")
    assert "detection/ap" in train(recipe_of(runs, **given), tmp_path / "other").metrics


def test_classes_by_number_are_not_measured_on_others(runs, tmp_path):
    shutil.copytree(runs / "scenes/test", tmp_path / "test")
    recipe = recipe_of(runs, detection__classes="numbers", evaluation__data=str(tmp_path / "test"))
    with pytest.raises(UsageError, match=r"does not know 4 of the 24 classes .* 'blue triangle'"):
        train(recipe, tmp_path / "run")


def test_sets_train_together(runs, tmp_path):
    images = [image(1, "a.jpg", 80, 64)]
    names = [*CATEGORIES, {"id": 9, "name": "Red_Circle"}]
    boxes = [box(1, 1, 9, (5, 5, 30, 30)), box(2, 1, 3, (40, 10, 30, 30))]
    write(tmp_path / "boxes.json", images, boxes, names, pictures=tmp_path)
    recipe = complete(recipe_of(runs, detection__sets=str(tmp_path / "boxes.json")))
    names = recipe.detection.class_names
    assert len(names) == 22
    assert names[-2:] == ("dog", "stop sign")
    assert recipe.detection.category_ids == tuple(range(1, 23))
    loader = build(recipe, ALONE, start=True).loader
    assert sum(len(batch) for batch in loader.epoch()) == loader.samples.num_samples == 9


def test_two_classes_of_one_name_are_one(tmp_path):
    names = [{"id": 3, "name": "dog"}, {"id": 8, "name": "Dog"}, {"id": 9, "name": "cat"}]
    images = [image(1, "a.jpg", 80, 64)]
    boxes = [box(1, 1, 3, (5, 5, 30, 30)), box(2, 1, 8, (40, 10, 30, 30))]
    path = write(tmp_path / "boxes.json", images, boxes, names, pictures=tmp_path)
    recipe = complete(recipe_of(tmp_path, data__train=str(path)))
    assert recipe.detection.class_names == ("dog", "cat")
    batch = next(build(recipe, ALONE, start=True).loader.batches())
    assert set(batch.labels.tolist()) == {0}


def test_a_low_scale_is_no_obstacle(runs):
    given = {"loss__initial_scale": "5", "loss__max_scale": "8", "weights": str(runs / "towers")}
    model = build_model(complete(recipe_of(runs, **given)), start=True)
    assert model.scale().item() == pytest.approx(8)  # that of the run, as far as allowed
    model = build_model(
        complete(recipe_of(runs, loss__initial_scale="5", loss__max_scale="8")), start=True
    )
    assert model.scale().item() == pytest.approx(5)


def test_lower_layers_learn_slower(runs):
    recipe = complete(recipe_of(runs, optimizer__layer_decay="0.5"))
    model = build(recipe, ALONE, start=True).task.model
    groups = parameter_groups(model, recipe.optimizer)
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[model.image.backbone.patch_embed.proj.weight] < 1
    assert scales[model.predictor.boxes.weight] == 1


def test_a_set_smaller_than_a_batch_repeats(runs):
    recipe = complete(recipe_of(runs, trainer__batch_size="30"))
    batch = next(build(recipe, ALONE, start=True).loader.batches())
    assert len(batch) == 30
