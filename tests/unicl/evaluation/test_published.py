from statistics import mean

import pytest

from adapters.detection.sets import KNOWN_SETS as KNOWN_DETECTION_SETS
from adapters.video.files import KNOWN_VIDEO_SETS
from adapters.vqa.questions import KNOWN_SET as KNOWN_QUESTIONS
from unicl.data.image_sets import KNOWN_SETS, LINEAR_PROBE_SETS, ZERO_SHOT_SETS
from unicl.data.image_sets.public import PUBLIC_SETS
from unicl.evaluation.published import PUBLISHED, published, reported_part


@pytest.mark.parametrize(
    ("task", "names"), [("zero_shot", ZERO_SHOT_SETS), ("linear_probe", LINEAR_PROBE_SETS)]
)
def test_the_papers_tables_have_every_set_by_its_own_metric(task, names):
    tables = [row for row in PUBLISHED if row.task == task]
    assert [row.model.split()[0] for row in tables] == ["Florence", "CLIP"]
    for row in tables:
        assert tuple(row.figures) == names
        for name, figures in row.figures.items():
            assert PUBLIC_SETS[name].metric in figures


@pytest.mark.parametrize(
    ("task", "lost"), [("zero_shot", {"cifar10"}), ("linear_probe", {"cifar10", "cifar100"})]
)
def test_florence_loses_to_clip_where_its_text_says(task, lost):
    florence, clip = (row.figures for row in PUBLISHED if row.task == task)
    metrics = {name: PUBLIC_SETS[name].metric for name in florence}
    behind = {name for name, key in metrics.items() if florence[name][key] < clip[name][key]}
    assert behind == lost


@pytest.mark.parametrize(("shots", "average"), [(5, 68.5), (20, 76.4), (50, 79.5)])
def test_few_shot_means_are_the_papers(shots, average):
    (row,) = (row for row in PUBLISHED if row.task == "few_shot")
    figures = [values[f"{shots}_shot"] for values in row.figures.values()]
    assert mean(figures) == pytest.approx(average, abs=0.051)


def test_no_table_is_named_for_videos_whose_number_nobody_checked():
    rows = [row for row in PUBLISHED if {"msrvtt", "kinetics400"} & row.figures.keys()]
    assert {row.source for row in rows} == {"Florence, sections 3.8 and 3.9"}


def test_a_set_has_what_is_published_of_it():
    rows = published("retrieval", "coco")
    assert [row.figures["coco"]["i2t_r1"] for row in rows] == [64.7, 58.4]
    assert published("retrieval", "digits") == ()
    for row in PUBLISHED:
        assert all(
            0 < value <= 100 for figures in row.figures.values() for value in figures.values()
        )
        if row.task.startswith("detection"):
            assert set(row.figures) <= {*KNOWN_DETECTION_SETS, "coco_test_dev"}
        elif row.task != "few_shot":
            assert set(row.figures) <= {*KNOWN_SETS, *KNOWN_VIDEO_SETS, KNOWN_QUESTIONS}
        assert row.source
        assert row.protocol


def test_figures_are_of_the_part_that_has_labels():
    sets = {name for row in PUBLISHED for name in row.figures}
    on_val = {name for name in sets if reported_part(name) == "val"}
    assert on_val == {"imagenet", "kinetics400", "kinetics600"}
    assert reported_part("kinetics700") == "val"
    assert reported_part("coco", "retrieval") == "test"
    assert reported_part("coco", "detection_zero_shot") == "val"
    assert reported_part("vqav2", "vqa") == "test-dev"
    assert reported_part("my/questions", "vqa") == "val"
