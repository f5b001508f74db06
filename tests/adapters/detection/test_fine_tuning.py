"""Detectors fine-tuned on a few shots, and on a whole set."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from adapters.detection.coco import open_coco
from adapters.detection.fine_tuning import choose_shots, fine_tuning_recipe
from adapters.detection.sets import open_detection_set
from unicl.errors import UsageError
from unicl.evaluation.published import published
from unicl.evaluation.results import read_results
from unicl.evaluator import Options, evaluate
from unicl.models import read_recipe

QUICK = {"data.num_workers": "0", "trainer.precision": "fp32", "trainer.steps": "2"}


def options(out: Path | None, **changes: object) -> Options:
    return Options(out=out, device="cpu", num_workers=0, **changes)


def train_part(runs):
    return open_detection_set(str(runs / "scenes"), split="train", root=Path("data"))


def few_shot(runs, out, *, overrides=QUICK, data="scenes", **changes):
    task, own = "detection-few-shot", options(out, **changes)
    (result,) = evaluate(str(runs / "texts"), task, [str(runs / data)], own, overrides)
    return result


@pytest.mark.parametrize("shots", [1, 3])
def test_each_class_gets_its_shots_or_all_that_there_are(runs, shots):
    images = train_part(runs)
    rows = choose_shots(images, shots, seed=0)
    there = np.bincount(images.labels, minlength=len(images.class_names))
    chosen = np.bincount(images.at(rows).labels, minlength=len(images.class_names))
    assert (chosen >= np.minimum(there, shots)).all()
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows) > 0).all()
    # The last one looked at was needed.
    assert any(
        (np.bincount(images.at(np.delete(rows, n)).labels, minlength=len(there)) < shots).any()
        for n in range(len(rows))
    )


def test_seeds_choose_other_images(tmp_path):
    count = 40
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(count)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1 + n % 2, "bbox": [0, 0, 4, 4]}
            for n in range(count)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "0.png").touch()
    images = open_coco(tmp_path / "x.json", name="x", split="train")
    first, again, other = (choose_shots(images, 5, seed).tolist() for seed in (0, 0, 1))
    assert len(first) == 10
    assert first == again
    assert first != other


def test_few_shots_are_trained_one_by_one_and_told_together(runs, tmp_path):
    result = few_shot(runs, tmp_path, shots=(1, 2))
    assert result.task == "detection_few_shot"
    assert list(result.metrics) == ["1_shot", "2_shot"] == result.shown
    assert result.headline == "1_shot"
    assert result.model == str(runs / "texts")
    (saved,) = read_results(tmp_path / "evaluation")
    assert saved == result
    for shots in (1, 2):
        chosen = open_coco(tmp_path / f"train_{shots}_shot.json", name="x", split="")
        rows = choose_shots(train_part(runs), shots, seed=0)
        assert chosen.image_ids.tolist() == train_part(runs).image_ids[rows].tolist()
        assert chosen.class_names == train_part(runs).class_names
        assert chosen.files.read(0).image == train_part(runs).files.read(int(rows[0])).image
        (own,) = read_results(tmp_path / f"run_{shots}_shot/evaluation")
        assert own.metrics == {f"{shots}_shot": result.metrics[f"{shots}_shot"]}
        assert own.protocol["num_train"] == len(rows)
        assert own.protocol["from"] == str(runs / "texts")
    # What is done is not done again.
    before = (tmp_path / "run_1_shot/metrics.jsonl").read_text()
    again = few_shot(runs, tmp_path, shots=(1,))
    assert again.metrics == {"1_shot": result.metrics["1_shot"]}
    assert (tmp_path / "run_1_shot/metrics.jsonl").read_text() == before
    with pytest.raises(UsageError, match=r"for 2 steps of 7 samples, not 3 .*another --out"):
        few_shot(runs, tmp_path, shots=(1,), overrides={**QUICK, "trainer.steps": "3"})


def test_the_images_that_publishers_chose_are_taken(runs, tmp_path, monkeypatch):
    scenes = shutil.copytree(runs / "scenes", tmp_path / "scenes")
    content = json.loads((scenes / "train/_annotations.coco.json").read_text())
    for seed, count in ((3, 2), (30, 3)):
        content["images"] = content["images"][:count]
        ids = {image["id"] for image in content["images"]}
        own = [each for each in content["annotations"] if each["image_id"] in ids]
        path = scenes / f"train/fewshot_train_shot1_seed{seed}.json"
        path.write_text(json.dumps({**content, "annotations": own}))
        content = json.loads((scenes / "train/_annotations.coco.json").read_text())
    trained = []

    def stop(recipe, out):
        trained.append(Path(recipe.data.train).name)
        raise UsageError("enough")

    monkeypatch.setattr("adapters.detection.fine_tuning.train", stop)
    for seed in (0, 30, 31):
        own = options(tmp_path / "out", shots=(1,), seed=seed)
        with pytest.raises(UsageError, match="enough"):
            evaluate(str(runs / "texts"), "detection-few-shot", [str(scenes)], own, QUICK)
    theirs = [f"fewshot_train_shot1_seed{seed}.json" for seed in (3, 30)]
    assert trained == [*theirs, "train_1_shot.json"]


def test_a_whole_set_is_trained_on(runs, tmp_path):
    own = options(tmp_path, split="val")
    scenes = str(runs / "scenes")
    (result,) = evaluate(str(runs / "numbers"), "detection-fine-tune", [scenes], own, QUICK)
    assert result.task == "detection_fine_tune"
    assert {"ap", "ap50"} <= set(result.metrics)
    assert result.protocol["num_train"] == 8
    (saved,) = read_results(tmp_path / "run/evaluation")
    assert saved == result
    recipe, start = read_recipe(tmp_path / "run"), read_recipe(runs / "numbers")
    for key in ("classes", "width", "num_blocks", "min_sizes", "test_sizes", "max_size"):
        assert getattr(recipe.detection, key) == getattr(start.detection, key)
    assert len(recipe.detection.class_names) == 20


def test_numbers_that_the_test_part_exceeds_are_refused_before_training(runs, tmp_path):
    with pytest.raises(UsageError, match="does not know 4 of the 24 classes"):
        evaluate(
            str(runs / "numbers"),
            "detection-fine-tune",
            [str(runs / "scenes")],
            options(tmp_path / "out"),
            QUICK,
        )
    assert not (tmp_path / "out").exists()


def test_proposals_become_a_detector_by_name(runs):
    recipe = fine_tuning_recipe(runs / "none", 8, Path("x"), {}, epochs=24)
    assert recipe.detection.classes == "texts"
    assert recipe.detection.class_names == ()
    assert not recipe.text_tower.locked
    assert recipe.weights == str(runs / "none")


def test_steps_are_epochs_of_the_set(runs):
    def steps(num_images, **overrides):
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        recipe = fine_tuning_recipe(runs / "texts", num_images, Path("x"), given, epochs=24)
        return recipe.trainer.steps, recipe.trainer.batch_size, recipe.schedule.warmup_steps

    assert steps(800) == (2400, 8, 100)
    assert steps(801) == (2403, 8, 100)
    assert steps(3) == (200, 3, 66)
    assert steps(800, trainer__batch_size="16") == (1200, 16, 100)
    assert steps(800, trainer__steps="30") == (30, 8, 10)


def test_what_cannot_be_fine_tuned_is_refused_in_a_line(runs, tmp_path):
    scenes, model = str(runs / "scenes"), str(runs / "texts")
    with pytest.raises(UsageError, match="name a folder with --out"):
        evaluate(model, "detection-fine-tune", [scenes], options(None))
    with pytest.raises(UsageError, match="takes one set, got a, b"):
        evaluate(model, "detection-fine-tune", ["a", "b"], options(tmp_path))
    alone = f"{scenes}/test/_annotations.coco.json"
    with pytest.raises(UsageError, match="has no train part to learn from"):
        evaluate(model, "detection-fine-tune", [alone], options(tmp_path))
    none = {**QUICK, "detection.classes": "none"}
    with pytest.raises(UsageError, match=r"detection\.classes none learns no classes"):
        evaluate(model, "detection-fine-tune", [scenes], options(tmp_path), none)
    with pytest.raises(UsageError, match="no set of boxes"):
        evaluate(model, "detection-few-shot", ["./missing"], options(tmp_path))


def test_the_papers_few_shot_figures_have_the_name_of_ours():
    (row,) = published("detection_few_shot", "aquarium")
    assert row.figures["aquarium"] == {"5_shot": 39.0}
