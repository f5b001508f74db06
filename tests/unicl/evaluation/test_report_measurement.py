"""Tables beside the papers' figures, and what is said of their differences."""

import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest

from unicl.evaluation.published import NUM_TEST_IMAGES, NUM_TRAIN_IMAGES, PUBLISHED
from unicl.evaluation.report import Report, Run, render
from unicl.evaluation.results import Result

# As the papers did, as far as they say how.
ALIKE: dict[str, Any] = {"split": "test", "image_size": 384, "precision": "fp32"}


def result(task: Any, dataset: str, **protocol: Any) -> Result:
    metrics = {
        "few_shot": {"5_shot": 0.8, "20_shot": 0.9},
        "retrieval": {"i2t_r1": 0.8, "t2i_r1": 0.7, "t2i_r10": 0.9},
    }.get(task, {"top1": 0.6543, "top5": 0.9})
    headline = next(iter(metrics))
    return Result(
        task=task,
        dataset=dataset,
        model="m",
        metrics=metrics,
        headline=headline,
        interval=(0.611, 0.699),
        num_images=NUM_TEST_IMAGES.get(dataset, 100),
        protocol={**ALIKE, **protocol},
    )


def page(*results: Result, others: tuple[Result, ...] = ()) -> str:
    runs = [Run(name="ours", results=results)]
    runs += [Run(name="other", results=others)] if others else []
    return unescape(re.sub(r"\s+", " ", render(Report(title="t", runs=runs))))


def differences(html: str) -> list[str]:
    """Items of the list of differences from the papers."""
    found = re.search(r"not the papers' measurement.</b> It differs in</p> <ul>(.*?)</ul>", html)
    return re.findall("<li>(.*?)</li>", found[1]) if found else []


def test_the_papers_figures_stand_beside() -> None:
    html = page(result("zero_shot", "imagenet", num_templates=80, num_classes=1000))
    for figure in ("65.4%", "61.1% to 69.9%", "83.74%", "97.18%", "76.2%", "0.1%", "50,000 images"):
        assert figure in html
    assert "Florence, section 3.1 and table 1" in html


def test_sets_that_only_the_papers_have_are_not_listed() -> None:
    html = page(result("zero_shot", "cifar10", num_templates=18))
    assert "cifar100" not in html
    assert "food101" not in html


def test_a_set_that_no_paper_has() -> None:
    html = page(result("zero_shot", "photos"))
    assert "Florence" not in html
    assert "not the papers' measurement" not in html


def test_what_is_equal_is_no_difference() -> None:
    html = page(result("zero_shot", "imagenet", num_templates=80, split="val"))
    assert differences(html) == [
        "image size: ours and Florence (CoSwin-H) 384 px; CLIP (ViT-L/14) 336 px"
    ]
    assert "<p>The papers do not say</p> <ul><li>precision: ours fp32</li></ul>" in html


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (
            result("zero_shot", "cifar10", image_size=224, num_templates=18),
            "image size: ours 224 px; Florence (CoSwin-H) 384 px; CLIP (ViT-L/14) 336 px",
        ),
        (
            result("zero_shot", "imagenet", num_templates=1),
            "number of prompt templates: ours 1; Florence (CoSwin-H) and CLIP (ViT-L/14) 80",
        ),
        (
            result("zero_shot", "cifar10", split="train"),
            "part of the set: ours train; Florence (CoSwin-H) and CLIP (ViT-L/14) test",
        ),
        (
            result("few_shot", "eurosat", backbone="frozen", num_episodes=600),
            "backbone: ours frozen; Florence (CoSwin-H) trained in each episode",
        ),
        (
            result("few_shot", "eurosat", backbone="frozen", num_episodes=50),
            "episodes: ours 50; Florence (CoSwin-H) 600",
        ),
        (
            result("linear_probe", "pets", num_train=100, chosen_on="a fifth of train"),
            "images trained on: ours 100; Florence (CoSwin-H) and CLIP (ViT-L/14) 3,680",
        ),
    ],
)
def test_differences_are_named(measured: Result, said: str) -> None:
    assert said in differences(page(measured))


def test_views_are_compared_with_papers_that_say_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    views = {"num_frames": 32, "num_clips": 1, "num_crops": 1, "split": "val"}
    measured = result("fine_tune", "kinetics400", **views)
    said = "views of a video, clips x crops: ours 1 x 1"
    assert f"{said}; Florence (CoSwin-H) 4 x 3" in differences(page(measured))
    silent = tuple(replace(row, views=None) for row in PUBLISHED)
    monkeypatch.setattr("unicl.evaluation.published.PUBLISHED", silent)
    assert f"<li>{said}</li>" in page(measured).split("The papers do not say")[1]


def test_images_that_were_left_out() -> None:
    fields = vars(result("zero_shot", "cifar10"))
    html = page(Result(**{**fields, "num_images": 9_997, "skipped": {"truncated": 3}}))
    assert "images: ours 9,997; Florence (CoSwin-H) and CLIP (ViT-L/14) 10,000" in differences(html)
    assert any("ours 3 (truncated: 3)" in line for line in differences(html))


def test_what_nobody_says_is_not_asked() -> None:
    measured = result("zero_shot", "cifar10", num_templates=18)
    asked = page(measured, result("zero_shot", "digits")).split("The papers do not say")[1]
    assert "precision" in asked.split("</ul>")[0]
    silent = replace(measured, protocol={**measured.protocol, "precision": None})
    assert "The papers do not say" not in page(silent, result("zero_shot", "digits"))


def test_of_a_set_that_no_paper_has_the_table_says_it() -> None:
    damaged = result("zero_shot", "photos", num_classes=2)
    html = page(replace(damaged, skipped={"undecodable image": 1200, "image too large": 34}))
    assert "100 images, 2 names; 1,234 left out<" in html
    assert "2 names<" in page(damaged)


def test_what_the_regularisation_was_chosen_on() -> None:
    papers = "Florence (CoSwin-H) and CLIP (ViT-L/14)"
    said = "regularisation chosen on: ours a fifth of train;"
    html = page(result("linear_probe", "pets", chosen_on="a fifth of train"))
    assert f"{said} {papers} a share of train" in differences(html)
    html = page(result("linear_probe", "dtd", chosen_on="a fifth of train"))
    assert f"{said} {papers} the validation part" in differences(html)
    html = page(result("linear_probe", "dtd", chosen_on="dtd (val)"))
    assert not any(line.startswith("regularisation") for line in differences(html))


def test_runs_that_were_not_measured_alike() -> None:
    ours = result("zero_shot", "photos", num_templates=1)
    html = page(ours, others=(result("zero_shot", "photos", num_templates=7),))
    assert "<b>The runs were not measured alike.</b>" in html
    assert "<li>number of prompt templates: ours 1; other 7</li>" in html
    assert "not measured alike" not in page(ours, others=(ours,))


def test_values_that_differ_by_set_are_said_with_their_sets() -> None:
    sets = ("photos", "scans", "drawings")
    html = page(
        *(result("zero_shot", name, image_size=48 + 8 * (name == "scans")) for name in sets)
    )
    assert "48 px; 56 px (scans)" in html


def test_captions_that_several_images_share() -> None:
    said = "captions that several images share: ours 1,234, right for all their images; Florence"
    measured = replace(result("retrieval", "coco", shared_captions=1234), interval=None)
    html = page(measured)
    assert any(line.startswith(said) for line in differences(html))
    assert "right for their own image only" in html
    assert "confidence interval" not in html
    assert "captions that" not in page(result("retrieval", "coco", shared_captions=0))


def test_a_part_that_no_paper_measured_stands_beside_the_papers_with_a_warning() -> None:
    html = page(result("zero_shot", "cifar10"), result("zero_shot", "cifar10", split="train"))
    assert len(re.findall(r"<tr><td class=\"words\">cifar10.*?<td>94.6%</td>", html)) == 2
    assert "cifar10 (train)" in html
    (line,) = [each for each in differences(html) if each.startswith("part of the set")]
    assert line.startswith("part of the set: ours train;")


def test_both_mean_average_precisions_of_a_set() -> None:
    fields = {"metrics": {"map11": 0.8123, "map": 0.7123}, "headline": "map11"}
    html = page(replace(result("zero_shot", "voc2007"), **fields))
    for words in ("11-point mean average precision", ">mean average precision", "81.2%", "71.2%"):
        assert words in html


def test_every_published_set_has_its_number_of_images() -> None:
    sets = {name for row in PUBLISHED if row.task == "zero_shot" for name in row.figures}
    assert sets == set(NUM_TRAIN_IMAGES)
    assert sets | {"flickr30k", "coco", "msrvtt"} == set(NUM_TEST_IMAGES)
