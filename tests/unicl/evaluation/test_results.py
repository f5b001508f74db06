"""Results on disk: none takes another's place, and none that is damaged is taken for one."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from unicl.errors import UniclError
from unicl.evaluation.results import Result, read_result, read_results, save_result, to_csv

RESULT = Result(
    task="zero_shot",
    dataset="photos",
    model="m",
    metrics={"top1": 0.5, "top5": 0.9},
    headline="top1",
    interval=(0.4, 0.6),
    num_images=7,
    skipped={"truncated": 1},
    protocol={"split": "test", "num_classes": 2, "intervals": {"top5": [0.8, 1.0]}},
)
PROBE = replace(RESULT, task="linear_probe", dataset="cifar10")


def test_the_same_measured_anew_takes_its_place(tmp_path: Path) -> None:
    save_result(tmp_path, replace(RESULT, num_images=3))
    assert save_result(tmp_path, RESULT).name == "zero_shot_photos.json"
    assert read_results(tmp_path) == [RESULT]


def test_a_damaged_result_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_result(tmp_path, RESULT)
    (tmp_path / "a.json").write_text('{"cut')
    assert read_results(tmp_path) == [RESULT]
    assert f"{tmp_path / 'a.json'} is no result of `unicl eval`, move it away" in caplog.text


def test_results_of_different_things_stay_side_by_side(tmp_path: Path) -> None:
    names = [
        *("imagenet", "./imagenet", "猫", "犬", "a/photos", "../a/photos", "a_photos"),
        *("photos", "photos_val", "photos-saved-probe", "x" * 300, "x" * 301, "..", "\udcff"),
    ]
    results = [replace(RESULT, dataset=name) for name in names]
    results.append(replace(RESULT, protocol={"split": "val"}))
    results.append(replace(RESULT, protocol={"mark": "video.num_clips=4, video.num_crops=3"}))
    results += [PROBE, replace(PROBE, protocol={"probe": "mine.safetensors"})]
    results.append(replace(PROBE, protocol={"probe": "other.safetensors"}))
    paths = [save_result(tmp_path, result) for result in results]
    # Case aside, for file systems that do not tell it.
    assert len({path.name.lower() for path in paths}) == len(results)
    assert [read_result(path) for path in paths] == results
    assert len({(result.task, result.name) for result in results}) == len(results)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "guessing"),
        ("model", 3),
        ("metrics", {"top1": "0.5"}),
        ("metrics", [0.5]),
        ("headline", None),
        ("interval", [0.4]),
        ("interval", ["a", "b"]),
        ("num_images", "5"),
        ("num_images", True),
        ("num_images", -1),
        ("skipped", {"truncated": "one"}),
        ("protocol", None),
        ("protocol", {"num_classes": "2"}),
        ("protocol", {"shared_captions": 0.5}),
        ("protocol", {"intervals": {"top1": 0.5}}),
        ("protocol", {"split": ["test"]}),
        ("seconds", "soon"),
    ],
)
def test_a_field_of_another_type_is_told(tmp_path: Path, field: str, value: object) -> None:
    path = save_result(tmp_path, RESULT)
    fields = json.loads(path.read_text())
    fields["unicl"][field] = value
    path.write_text(json.dumps(fields))
    name = next(iter(value)) if field == "protocol" and isinstance(value, dict) else field
    with pytest.raises(UniclError, match=f"{path.name} is no result .*{name}") as caught:
        read_result(path)
    assert "\n" not in str(caught.value)


def test_a_dataset_must_be_named(tmp_path: Path) -> None:
    path = save_result(tmp_path, RESULT)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "dataset": 3}))
    with pytest.raises(UniclError, match="dataset is no text"):
        read_result(path)


def test_both_mean_average_precisions() -> None:
    result = replace(RESULT, metrics={"map11": 0.7, "map": 0.6}, headline="map11")
    assert result.shown == ["map11", "map"]
    assert replace(result, headline="map").shown == ["map", "map11"]
    assert replace(result, metrics={"map11": 0.7}).shown == ["map11"]
    assert replace(result, task="linear_probe").to_json()["metrics"] == {
        "lp_map11": 0.7,
        "lp_mean_average_precision": 0.6,
    }


@pytest.mark.parametrize(
    ("model", "full_name"),
    [("open_clip:ViT-B-32/openai", "ViT-B-32 openai"), ("runs/mine", "runs/mine")],
)
def test_a_table_for_a_person_and_a_spreadsheet(model: str, full_name: str) -> None:
    results = [replace(RESULT, model=model, metrics={"top1": 0.1 + 0.2, "top5": 2 / 3})]
    (row,) = csv.DictReader(to_csv(results).splitlines())
    assert row["model_fullname"] == full_name
    assert (row["acc1"], row["acc5"]) == ("0.3", "0.666667")


def test_ranks_are_written_by_their_own_names(tmp_path: Path) -> None:
    metrics = {"t2i_r1": 0.5, "t2i_median_rank": 1.5, "t2i_mean_rank": 16.8}
    result = replace(
        RESULT, task="retrieval", metrics=metrics, headline="t2i_r1", interval=None, protocol={}
    )
    path = save_result(tmp_path, result)
    assert read_result(path) == result
    assert result.shown == [*metrics]
    (row,) = csv.DictReader(to_csv([result]).splitlines())
    assert row["image_retrieval_recall@1"] == "0.5"
    assert (row["t2i_median_rank"], row["t2i_mean_rank"]) == ("1.5", "16.8")
