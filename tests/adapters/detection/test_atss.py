"""Assignment and losses against plain loops, on one rank and on several."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters.detection import found
from adapters.detection.anchors import anchor_boxes, encode_boxes
from adapters.detection.atss import Objects, Prediction, assign, losses
from adapters.detection.found import Detections, detections, put_together
from tests.adapters.detection import plain
from unicl.distributed import ALONE, Ranks

SIZES = [(8, 10), (4, 5), (2, 3), (1, 2), (1, 1)]
"""Of an image of 80 x 64 pixels: the coarse levels have fewer than nine anchors."""


def doubles(scale: float = 8.0) -> list[Tensor]:
    return [level.double() for level in anchor_boxes(SIZES, scale=scale)]


def lists(anchors: list[Tensor]) -> list[list[plain.Box]]:
    return [level.tolist() for level in anchors]


def random_boxes(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = 1 + 60 * torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 2
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([76, 60])
    return torch.cat([low, low + sides], 1)


@pytest.mark.parametrize("scale", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_that_of_plain_loops(seed: int, scale: float) -> None:
    anchors, boxes = doubles(scale), random_boxes(seed, 12)
    expected, closest = plain.assign(lists(anchors), boxes.tolist())
    assert closest > 1e-9
    assert assign(anchors, boxes).tolist() == expected
    assert len(set(expected)) > 3  # background and some of the boxes


@st.composite
def whole_boxes(draw: st.DrawFn) -> list[float]:
    x, y = draw(st.integers(0, 78)), draw(st.integers(0, 62))
    width, height = draw(st.integers(1, 80 - x)), draw(st.integers(1, 64 - y))
    return [float(side) for side in (x, y, x + width, y + height)]


@given(boxes=st.lists(whole_boxes(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_boxes_of_whole_pixels_are_assigned_alike_by_any_precision(
    boxes: list[list[float]],
) -> None:
    # Such have equally near anchors, of which the first are candidates.
    anchors = doubles()
    expected, closest = plain.assign(lists(anchors), boxes)
    assume(closest > 1e-5)
    assert assign(anchors, torch.tensor(boxes, dtype=torch.float64)).tolist() == expected
    assert assign([level.float() for level in anchors], torch.tensor(boxes)).tolist() == expected


def test_the_anchor_that_is_the_box_finds_it() -> None:
    anchors = anchor_boxes([(16, 16), (8, 8)])
    box = anchors[0][16 * 7 + 7]
    chosen = assign(anchors, box[None])
    assert chosen[16 * 7 + 7] == 0
    taken = (chosen >= 0).nonzero()[:, 0].tolist()
    # By hand: itself (IoU 1), above and below, left and right (.78). Its diagonal neighbours (.62)
    # are below the mean of all 18 candidates, .49, plus their deviation, .26.
    assert taken == [16 * 6 + 7, 16 * 7 + 6, 16 * 7 + 7, 16 * 7 + 8, 16 * 8 + 7]


def test_an_object_between_the_places_is_nobodys() -> None:
    # 6 pixels wide, between the centres at 4 and 12: no anchor's centre lies inside.
    anchors = anchor_boxes([(4, 4)])
    assert (assign(anchors, torch.tensor([[5.0, 5, 11, 11]])) == -1).all()
    assert (assign(anchors, torch.tensor([[4.0, 4, 11, 11]])) == -1).all()  # on the side of it
    chosen = assign(anchors, torch.tensor([[3.0, 3, 9, 9]]))
    assert (chosen >= 0).nonzero()[:, 0].tolist() == [0]


def test_of_several_boxes_the_one_of_highest_overlap() -> None:
    anchors = anchor_boxes([(16, 16)])
    place = 16 * 8 + 8
    wide = anchors[0][place] + torch.tensor([-16.0, 0, 16, 0])
    exact = anchors[0][place]
    assert assign(anchors, torch.stack([wide, exact]))[place] == 1
    assert assign(anchors, torch.stack([exact, wide]))[place] == 0
    assert (assign(anchors, torch.stack([exact, exact])) <= 0).all()  # equal boxes: the first


def test_one_anchor_alone() -> None:
    anchors = anchor_boxes([(1, 1)])
    assert assign(anchors, torch.tensor([[1.0, 1, 7, 7]])).tolist() == [0]


def test_no_box() -> None:
    chosen = assign(anchor_boxes(SIZES), torch.zeros(0, 4))
    assert chosen.tolist() == [-1] * 109


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, boxes = doubles(), random_boxes(0, 11)
    whole = assign(anchors, boxes)
    monkeypatch.setattr("adapters.detection.atss._CHUNK", 4)
    assert torch.equal(assign(anchors, boxes), whole)


NUM_IMAGES = 4
NUM_CLASSES = 3


def batch(rows: slice = slice(None)) -> tuple[Prediction, Objects, Tensor]:
    """Return outputs that need gradients, objects and what was judged, of some of four images.

    The third image has no object, the last one has most.
    """
    generator = torch.Generator().manual_seed(0)
    count = sum(map(len, anchor_boxes(SIZES)))
    prediction = Prediction(
        torch.randn(NUM_IMAGES, count, NUM_CLASSES, generator=generator),
        2 * torch.randn(NUM_IMAGES, count, 4, generator=generator),
        torch.randn(NUM_IMAGES, count, generator=generator),
    )
    owners = torch.tensor([0, 0, 1, 3, 3, 3, 3, 3])
    labels = torch.tensor([0, 2, 2, 1, 1, 0, 2, 1])
    judged = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]).bool()
    numbers = torch.arange(NUM_IMAGES)[rows]
    own = torch.isin(owners, numbers)
    boxes = random_boxes(10, len(owners)).float()
    objects = Objects(boxes[own], labels[own], owners[own] - numbers[:1])
    prediction = Prediction(*(part[rows].requires_grad_() for part in prediction))
    return prediction, objects, judged[rows]


def by_hand(prediction: Prediction, objects: Objects, judged: Tensor | None) -> dict[str, float]:
    return plain.losses(
        *(part.tolist() for part in prediction),
        lists(anchor_boxes(SIZES)),
        *(part.tolist() for part in objects),
        judged=None if judged is None else judged.tolist(),
    )


@pytest.mark.parametrize("federated", [False, True])
def test_losses_are_those_of_plain_loops(federated: bool) -> None:
    prediction, objects, judged = batch()
    seen = judged if federated else None
    found = losses(prediction, anchor_boxes(SIZES), objects, judged=seen)
    expected = by_hand(prediction, objects, seen)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=2e-5), name


def test_unjudged_classes_teach_only_what_is_there() -> None:
    prediction, objects, judged = batch()
    judged[:] = False
    found = losses(prediction, anchor_boxes(SIZES), objects, judged=judged)
    found["classes"].backward()
    touched = prediction.logits.grad.abs().sum(1) > 0
    has = torch.zeros(NUM_IMAGES, NUM_CLASSES).bool()
    has[objects.owners, objects.labels] = True
    assert touched.any()
    assert not (touched & ~has).any()
    # No gradient that would make the class less likely.
    assert (prediction.logits.grad <= 0).all()


def test_without_objects_nothing_pulls_at_boxes() -> None:
    prediction, objects, _ = batch(slice(2, 3))
    assert len(objects.boxes) == 0
    found = losses(prediction, anchor_boxes(SIZES), objects)
    sum(found.values()).backward()
    assert found["boxes"] == found["centerness"] == 0
    assert found["classes"].item() == pytest.approx(
        by_hand(prediction, objects, None)["classes"], rel=2e-5
    )
    assert (prediction.deltas.grad == 0).all()
    assert (prediction.centerness.grad == 0).all()
    assert (prediction.logits.grad > 0).all()


def test_gradients_are_finite_far_from_the_truth() -> None:
    prediction, objects, _ = batch()
    prediction = Prediction(*(50 * part.detach() for part in prediction))
    for part in prediction:
        part.requires_grad_()
    found = losses(prediction, anchor_boxes(SIZES), objects)
    sum(found.values()).backward()
    assert all(math.isfinite(value.item()) for value in found.values())
    assert all(part.grad.isfinite().all() for part in prediction)


def test_a_perfect_guess_loses_no_boxes() -> None:
    anchors = anchor_boxes(SIZES)
    _, objects, _ = batch(slice(0, 1))
    chosen = assign(anchors, objects.boxes)
    sought = objects.boxes[chosen.clamp(min=0)]
    deltas = encode_boxes(sought, torch.cat(anchors))[None]
    logits = torch.full((1, len(chosen), NUM_CLASSES), -30.0)
    taken = (chosen >= 0).nonzero()[:, 0]
    logits[0, taken, objects.labels[chosen[taken]]] = 30.0
    found = losses(Prediction(logits, deltas, torch.zeros(1, len(chosen))), anchors, objects)
    assert found["boxes"].item() == pytest.approx(0, abs=1e-5)
    assert found["classes"].item() == pytest.approx(0, abs=1e-5)
    # Centerness has a least value, that of a logit which says just how central an anchor is.
    assert found["centerness"].item() == pytest.approx(
        binary_cross_entropy_with_logits(torch.zeros(1), torch.ones(1)).item()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_in_fp32(dtype: torch.dtype) -> None:
    prediction, objects, judged = batch()
    anchors = anchor_boxes(SIZES)
    half = Prediction(*(part.detach().to(dtype).requires_grad_() for part in prediction))
    with torch.autocast("cpu", dtype=dtype):
        found = losses(half, anchors, objects, judged=judged)
    sum(found.values()).backward()
    same = losses(Prediction(*(part.float() for part in half)), anchors, objects, judged=judged)
    for name, value in same.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value)
    assert half.logits.grad.dtype == dtype


def own_gradients(rows: slice, ranks: Ranks) -> tuple[list[Tensor], list[Tensor]]:
    """Return the losses of some images, and their gradients in the places of the whole batch."""
    prediction, objects, judged = batch(rows)
    found = losses(prediction, anchor_boxes(SIZES), objects, judged=judged, ranks=ranks)
    whole = []
    for part, gradient in zip(
        batch()[0], torch.autograd.grad(sum(found.values()), list(prediction)), strict=True
    ):
        whole.append(torch.zeros_like(part))
        whole[-1][rows] = gradient
    return [value.detach() for value in found.values()], whole


class OneOfTwo(Ranks):
    """One of two ranks, played by itself: the first turn notes what it says, the second hears."""

    size = 2

    def __init__(self, heard: list[Tensor]) -> None:
        self.__dict__.update(heard=heard, said=[])  # a frozen dataclass

    def sum_(self, tensor: Tensor) -> Tensor:
        self.said.append(tensor.clone())
        return tensor.copy_(sum(self.heard)) if self.heard else tensor


@pytest.mark.parametrize(
    "shares",
    [
        (slice(0, 3), slice(3, 4)),
        (slice(0, 2), slice(2, 3)),  # the second has no object
        (slice(2, 3), slice(3, 4)),
    ],
)
def test_ranks_share_a_batch(shares: tuple[slice, slice]) -> None:
    said: list[Tensor] = []
    for rows in shares:
        own_gradients(rows, first_turn := OneOfTwo([]))
        said += first_turn.said
    found = [own_gradients(rows, OneOfTwo(said)) for rows in shares]
    values, gradients = own_gradients(slice(shares[0].start, shares[1].stop), ALONE)
    for own_values, _ in found:
        torch.testing.assert_close(own_values, values)
    for first, second, whole in zip(found[0][1], found[1][1], gradients, strict=True):
        torch.testing.assert_close((first + second) / 2, whole)


def test_what_is_found_can_be_had_here() -> None:
    assert (Detections, detections, put_together) == (
        *(found.Detections, found.detections, found.put_together),
    )
