"""Florence's figures of detection: their sets, and what its text says of them."""

from typing import get_args

from adapters.detection.sets import KNOWN_SETS
from unicl.evaluation.published import PUBLISHED, ROBOFLOW, Task

DETECTION = [row for row in PUBLISHED if row.task.startswith("detection")]


def of(task: str, model: str) -> dict[str, float]:
    (row,) = (row for row in DETECTION if row.task == task and row.model.startswith(model))
    metric = "5_shot" if task == "detection_few_shot" else "ap"
    return {name: figures[metric] for name, figures in row.figures.items()}


def test_every_row_is_of_known_tasks_and_sets():
    for row in DETECTION:
        assert row.task in get_args(Task)
        assert set(row.figures) in (
            {"coco", "coco_test_dev"},
            {"coco", "coco_test_dev", "objects365"},
            set(ROBOFLOW),
        )
    assert len({(row.model, row.task) for row in DETECTION}) == len(DETECTION) == 7
    assert len(ROBOFLOW) == 11


def test_zero_shot_beats_five_shots_on_seven_of_the_eleven_sets():
    # The paper says so of its own table (section 3.6).
    florence = of("detection_zero_shot", "Florence")
    few_shot = of("detection_few_shot", "Dynamic Head")
    assert sum(florence[name] > few_shot[name] for name in ROBOFLOW) == 7
    baseline = of("detection_zero_shot", "ZSD")
    assert all(florence[name] > baseline[name] for name in ROBOFLOW)


def test_all_images_beat_five_of_each_class():
    few_shot = of("detection_few_shot", "Dynamic Head")
    full = of("detection_fine_tune", "Dynamic Head")
    assert all(full[name] > few_shot[name] for name in ROBOFLOW)


def test_coco_has_both_of_its_test_sets():
    found = {row.model: row.figures for row in DETECTION if "coco" in row.figures}
    assert found["Florence (CoSwin-H)"]["coco"] == {"ap": 62.0}
    assert found["Florence (CoSwin-H)"]["coco_test_dev"] == {"ap": 62.4}
    assert len(found) == 3


def test_the_papers_numbers_are_those_of_the_sets():
    images = (638, 364, 292, 149, 3680, 26, 2986, 12416, 665, 203, 737)
    classes = (7, 3, 12, 2, 37, 1, 1, 2, 1, 2, 1)
    known = [KNOWN_SETS[name] for name in ROBOFLOW]
    assert tuple(each.num_images for each in known) == images
    assert tuple(each.num_classes for each in known) == classes
