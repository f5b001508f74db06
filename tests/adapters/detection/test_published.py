"""Florence's figures of detection: their sets, and what its text says of them."""

from typing import get_args

from adapters.detection.published import DETECTION, NUM_CLASSES, NUM_IMAGES, ROBOFLOW
from unicl.evaluation.published import Task


def of(task: str, model: str) -> dict[str, float]:
    (row,) = (row for row in DETECTION if row.task == task and row.model.startswith(model))
    return {name: figures["ap"] for name, figures in row.figures.items()}


def test_every_row_is_of_known_tasks_and_sets():
    for row in DETECTION:
        assert row.task in get_args(Task)
        assert set(row.figures) in ({"coco"}, {"objects365"}, set(ROBOFLOW))
        assert all(0 < figures["ap"] < 100 for figures in row.figures.values())
    assert len({(row.model, row.task, row.protocol) for row in DETECTION}) == len(DETECTION)
    assert len(ROBOFLOW) == len(NUM_IMAGES) == len(NUM_CLASSES) == 11


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
    rows = [row for row in DETECTION if "coco" in row.figures]
    values = {(row.model, row.protocol.split(";")[0]): row.figures["coco"]["ap"] for row in rows}
    assert values["Florence (CoSwin-H)", "minival"] == 62.0
    assert values["Florence (CoSwin-H)", "test-dev"] == 62.4
    assert len(values) == 6
