"""Anchors against places by hand and torchvision's coder."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from adapters.detection.anchors import anchor_boxes, decode_boxes, encode_boxes


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=generator) * 200], 1)


def test_anchors_stand_in_the_middle_of_their_places() -> None:
    fine, coarse = anchor_boxes([(3, 4), (2, 2)])
    assert fine.shape == (12, 4)
    assert fine[0].tolist() == [-28, -28, 36, 36]  # 64 pixels around (4, 4)
    assert fine[1].tolist() == [-20, -28, 44, 36]  # row by row: x goes first
    assert fine[-1].tolist() == [-4, -12, 60, 52]
    assert coarse.tolist() == [
        [-56, -56, 72, 72], [-40, -56, 88, 72], [-56, -40, 72, 88], [-40, -40, 88, 88]
    ]  # fmt: skip


def test_scale_is_the_side_in_strides() -> None:
    (level,) = anchor_boxes([(1, 1)], scale=4.0)
    assert level.tolist() == [[-12, -12, 20, 20]]


def test_the_coder_is_torchvisions() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, anchors = random_boxes(50, 0), random_boxes(50, 1)
    deltas = encode_boxes(boxes, anchors)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_boxes(deltas, anchors), boxes, atol=1e-3, rtol=1e-5)
    wild = deltas * 10
    expected = coder.decode_single(wild, anchors)
    torch.testing.assert_close(decode_boxes(wild, anchors), expected, atol=0.1, rtol=1e-4)


@pytest.mark.parametrize("growth", [1e3, 1e30, math.inf])
def test_sides_stay_finite(growth: float) -> None:
    (anchor,) = anchor_boxes([(1, 1)])
    box = decode_boxes(torch.tensor([[0.0, 0.0, growth, 0.0]]), anchor)[0]
    assert box[2] - box[0] == pytest.approx(62.5 * 64)
    assert box[3] - box[1] == pytest.approx(64)
