"""Decoding and class-wise suppression against plain loops."""

import pytest
import torch
from torch import Tensor

from adapters.detection.anchors import anchor_boxes, encode_boxes
from adapters.detection.found import Detections, detections, put_together, suppress, surest_names
from tests.adapters.detection import plain

SIZES = [(8, 10), (4, 5), (2, 3)]
"""Of an image of 80 x 64 pixels."""


def random_found(seed: int, *, count: int = 60, classes: int = 3, first: int = 0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat([low, low + 5 + torch.rand(count, 2, generator=generator) * 40], 1)
    labels = first + torch.randint(classes, (count,), generator=generator)
    return Detections(boxes, torch.rand(count, generator=generator), labels)


def assert_suppressed(found: Detections, of: Detections, *, overlap: float, most: int) -> None:
    boxes = [tuple(box) for box in of.boxes.tolist()]
    kept = plain.suppress(boxes, of.scores.tolist(), of.labels.tolist(), overlap, most)
    for column, all_ in zip(found, of, strict=True):
        assert torch.equal(column, all_[kept])


@pytest.mark.parametrize("seed", range(8))
def test_suppression_is_that_of_plain_loops(seed: int) -> None:
    of = random_found(seed)
    assert_suppressed(suppress(of, overlap=0.4, most=1000), of, overlap=0.4, most=1000)
    assert_suppressed(suppress(of, overlap=0.6, most=7), of, overlap=0.6, most=7)


def test_high_numbers_of_classes_do_not_matter() -> None:
    # FLOD-9M has 25,190 categories; fp32 knows no half pixels at 25,190 times a large image.
    of = random_found(0, count=200, classes=4, first=25_186)
    of = of._replace(boxes=of.boxes + torch.tensor([2400.0, 0, 2400, 0]))
    assert_suppressed(suppress(of, overlap=0.5, most=1000), of, overlap=0.5, most=1000)


def test_negative_places_do_not_matter() -> None:
    of = random_found(0, count=200, classes=4)
    of = of._replace(boxes=of.boxes - 96)
    assert_suppressed(suppress(of, overlap=0.5, most=1000), of, overlap=0.5, most=1000)


def test_many_boxes() -> None:
    of = random_found(1, count=1200, classes=5)  # torchvision goes another way from 1,000 on
    assert_suppressed(suppress(of, overlap=0.6, most=50), of, overlap=0.6, most=50)


def test_views_are_put_together() -> None:
    views = [random_found(seed, count=20) for seed in range(3)]
    of = Detections(*(torch.cat(parts) for parts in zip(*views, strict=True)))
    assert_suppressed(put_together(views, most=30), of, overlap=0.6, most=30)
    one = put_together(views[:1], overlap=1.0)
    assert torch.equal(one.scores, views[0].scores.sort(descending=True).values)


def outputs(seed: int, *, classes: int = 4) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = anchor_boxes(SIZES, scale=3.0)
    count = sum(map(len, anchors))
    scores = torch.rand(count, classes, generator=generator)
    deltas = 4 * torch.randn(count, 4, generator=generator)
    return anchors, scores, deltas, torch.randn(count, generator=generator)


@pytest.mark.parametrize("seed", range(6))
def test_decoding_is_that_of_plain_loops(seed: int) -> None:
    anchors, scores, deltas, centerness = outputs(seed)
    limits = {"threshold": 0.3, "per_level": 60, "most": 40}
    found = detections(scores, deltas, centerness, anchors, size=(61, 77), overlap=0.5, **limits)
    levels = [level.tolist() for level in anchors]
    lists = [part.double().tolist() for part in (scores, deltas, centerness)]
    expected = plain.detections(*lists, levels, 61, 77, limit=0.5, **limits)
    assert found.labels.tolist() == [label for _, _, label in expected]
    expected_scores = torch.tensor([score for _, score, _ in expected])
    torch.testing.assert_close(found.scores, expected_scores)
    expected_boxes = torch.tensor([box for box, _, _ in expected])
    torch.testing.assert_close(found.boxes, expected_boxes, atol=1e-4, rtol=1e-5)


def told(box: list[int], *, score: float, center: float = 20.0) -> dict[str, Tensor]:
    """Return the outputs of one anchor, which lies in the middle, that is sure of a box."""
    return {
        "scores": torch.tensor([[0.0, score]]),
        "deltas": encode_boxes(torch.tensor([box]).float(), torch.tensor([[-28.0, -28, 36, 36]])),
        "centerness": torch.tensor([center]),
    }


def test_a_score_is_the_geometric_mean_with_centerness() -> None:
    anchors = anchor_boxes([(1, 1)])
    sure = detections(**told([1, 2, 5, 7], score=0.49), anchors=anchors, size=(8, 8))
    assert sure.scores.tolist() == pytest.approx([0.7])
    assert sure.labels.tolist() == [1]
    torch.testing.assert_close(sure.boxes, torch.tensor([[1.0, 2, 5, 7]]))
    half = detections(**told([1, 2, 5, 7], score=0.5, center=0.0), anchors=anchors, size=(8, 8))
    assert half.scores.tolist() == pytest.approx([0.5])


def test_boxes_end_with_the_image() -> None:
    anchors = anchor_boxes([(1, 1)])
    found = detections(**told([-3, 2, 30, 40], score=0.9), anchors=anchors, size=(6, 8))
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 2, 8, 6]]))
    beside = detections(**told([9, 0, 12, 5], score=0.9), anchors=anchors, size=(6, 8))
    assert len(beside.boxes) == 0


def test_the_threshold_looks_at_the_class_alone() -> None:
    anchors = anchor_boxes([(1, 1)])
    kept = told([1, 2, 5, 7], score=0.06, center=-6.0)
    assert len(detections(**kept, anchors=anchors, size=(8, 8)).scores) == 1
    left_out = told([1, 2, 5, 7], score=0.05)
    assert len(detections(**left_out, anchors=anchors, size=(8, 8)).scores) == 0


def test_nothing_found() -> None:
    anchors, scores, deltas, centerness = outputs(0)
    found = detections(0 * scores, deltas, centerness, anchors, size=(64, 80))
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
    again = put_together([found, found])
    assert again.boxes.shape == (0, 4)


def test_an_object_keeps_its_surest_name():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9.5], [20.0, 20, 30, 30], [0.0, 0, 5, 5]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([3, 1, 1, 2]))
    kept = surest_names(found)
    assert kept.labels.tolist() == [3, 1, 2]
    torch.testing.assert_close(kept.boxes, boxes[[0, 2, 3]])
    assert len(surest_names(Detections(*(each[:0] for each in found))).scores) == 0
