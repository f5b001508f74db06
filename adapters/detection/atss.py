"""ATSS: which anchors learn which object, and what they lose (Zhang et al. 2020; Florence, 2.4).

The numbers are those of the recipes of ATSS and of Dynamic Head.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from adapters.detection.anchors import decode_boxes
from unicl.distributed import ALONE, Ranks

# Candidates of a box on each level.
_NEAREST = 9
# More of the nearest anchors, among which are all that are as near as the last candidate: then the
# first of them can be taken, while topk takes one or the other, by device.
_EQUALLY_NEAR = 7
# The centre of an anchor is inside of a box if it is so many pixels away from all sides.
_INSIDE = 0.01
# Distances of so many boxes to all anchors of a level are in memory at once.
_CHUNK = 256
_BOX_WEIGHT = 2.0


class Prediction(NamedTuple):
    """What the head says of a batch; a = anchors of all levels, finest first."""

    logits: Float[Tensor, "n a k"]
    """Of each class."""
    deltas: Float[Tensor, "n a 4"]
    """Boxes, as `encode_boxes` gives them."""
    centerness: Float[Tensor, "n a"]
    """Logits of how central in its object an anchor is."""


class Objects(NamedTuple):
    """The objects in the images of a batch."""

    boxes: Float[Tensor, "b 4"]
    """x1, y1, x2, y2 in pixels, of some width and height."""
    labels: Int64[Tensor, "b"]
    """Columns of the logits."""
    owners: Int64[Tensor, "b"]
    """Numbers of the images in the batch."""


def assign(
    anchors: list[Float[Tensor, "_ 4"]], boxes: Float[Tensor, "b 4"]
) -> Int64[Tensor, "all_anchors"]:
    """Return the number of the box that each anchor of an image is to find; -1 for none.

    Of each level, the nine anchors whose centres are nearest to a box's are its candidates. Those
    whose IoU is at least the mean plus the standard deviation over all levels' candidates, and
    whose centres are inside of the box, are to find it. Of several boxes they take the one of the
    highest IoU. What is equal goes to the first.
    """
    return _assign(anchors, boxes, torch.zeros_like(boxes[:, 0], dtype=torch.int64), 1)[0]


def losses(
    prediction: Prediction,
    anchors: list[Float[Tensor, "_ 4"]],
    objects: Objects,
    *,
    judged: Bool[Tensor, "n k"] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Float[Tensor, ""]]:
    """Compute the losses `classes`, `boxes` and `centerness` of the batch that the ranks share.

    classes: focal loss per anchor that is to find something. boxes: GIoU loss, weighted by how
    central the anchor is in its object, times 2. centerness: binary cross-entropy per such anchor.
    The ranks' averaged gradients are those of the whole batch, and so are the values. Where there
    is no object, boxes and centerness are 0. All is computed in fp32.

    Args:
        prediction: What the head says of this rank's images.
        anchors: Of each level.
        objects: What is to be found in them.
        judged: Whether a class was looked for in an image. Where it was not, no anchor learns
            that there is none, as in federated sets; an object's own class is learned in any case.
        ranks: The processes that share the batch.
    """
    with torch.autocast(prediction.logits.device.type, enabled=False):
        logits, deltas, centerness = (part.float() for part in prediction)
        boxes = objects.boxes.float()
        chosen = _assign(anchors, boxes, objects.owners, len(logits))
        images, places = (chosen >= 0).nonzero(as_tuple=True)
        found = chosen[images, places]
        sought, own_anchors = boxes[found], torch.cat(anchors)[places]
        targets = torch.zeros_like(logits)
        targets[images, places, objects.labels[found]] = 1
        focal = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2)
        if judged is not None:
            focal = focal * torch.maximum(targets, judged[:, None].float())
        central = _centerness(own_anchors, sought)
        guesses = decode_boxes(deltas[images, places], own_anchors)
        own = torch.stack(
            [
                focal.sum(),
                _BOX_WEIGHT * (generalized_box_iou_loss(guesses, sought, eps=1e-6) * central).sum(),
                F.binary_cross_entropy_with_logits(
                    centerness[images, places], central, reduction="sum"
                ),
            ]
        )
        counts = torch.stack([central.new_tensor(len(found)), central.sum()])
        *totals, num_found, sum_central = ranks.sum_(torch.cat([own.detach(), counts]))
        num_found = num_found.clamp(min=1)
        # Without anchors that are to find something, both are sums over none: anything divides.
        norms = torch.stack([num_found, sum_central + (sum_central == 0), num_found])
        # The ranks' gradients are averaged: each rank's own sum counts as often as there are ranks.
        own = own * (ranks.size / norms)
        own = own + (torch.stack(totals) / norms - own).detach()
        return dict(zip(("classes", "boxes", "centerness"), own.unbind(), strict=True))


def _assign(
    anchors: list[Tensor], boxes: Tensor, owners: Tensor, num_images: int
) -> Int64[Tensor, "n a"]:
    """Assign anchors to the boxes of several images at once."""
    every = torch.cat(anchors)
    candidates = _candidates(anchors, boxes)
    near = every[candidates]
    overlaps = _overlaps(near, boxes[:, None])
    mean = overlaps.mean(1, keepdim=True)
    # Unbiased, as torch's `std`; of one candidate alone there is none, which lets it be positive.
    deviation = ((overlaps - mean).square().sum(1) / max(overlaps.shape[1] - 1, 1)).sqrt()
    least = mean[:, 0] + deviation
    centres = (near[..., :2] + near[..., 2:]) / 2
    margins = torch.cat([centres - boxes[:, None, :2], boxes[:, None, 2:] - centres], -1)
    positive = (overlaps >= least[:, None]) & (margins.amin(-1) > _INSIDE)
    # All that follows is of the size of the candidates, and never waits for the device.
    slots = (owners[:, None] * len(every) + candidates).flatten()
    best = overlaps.new_full((num_images * len(every),), -1)
    best.scatter_reduce_(0, slots, overlaps.where(positive, -1).flatten(), "amax")
    wins = positive.flatten() & (overlaps.flatten() == best[slots])
    none = len(boxes)
    numbers = torch.arange(none, device=boxes.device).repeat_interleave(candidates.shape[1])
    chosen = slots.new_full(best.shape, none)
    chosen.scatter_reduce_(0, slots, numbers.where(wins, none), "amin")
    return chosen.where(chosen < none, -1).view(num_images, len(every))


def _candidates(anchors: list[Tensor], boxes: Tensor) -> Int64[Tensor, "b c"]:
    """Return the numbers of the nearest anchors, up to nine of each level."""
    points = (boxes[:, :2] + boxes[:, 2:]) / 2
    first, levels = 0, []
    for level in anchors:
        centres = (level[:, :2] + level[:, 2:]) / 2
        chunks = [_nearest(centres, some) for some in points.split(_CHUNK)]
        levels.append(first + torch.cat(chunks))
        first += len(level)
    return torch.cat(levels, 1)


def _nearest(centres: Tensor, points: Tensor) -> Int64[Tensor, "points c"]:
    (x, y), (own_x, own_y) = centres.unbind(1), points[:, :, None].unbind(1)
    squares = (x - own_x).square_().add_((y - own_y).square_())
    most = min(_NEAREST + _EQUALLY_NEAR, len(centres))
    numbers = squares.topk(most, largest=False).indices.sort().values
    order = squares.gather(1, numbers).argsort(stable=True)
    return numbers.gather(1, order[:, :_NEAREST])


def _overlaps(one: Float[Tensor, "*#n 4"], other: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n"]:
    """Return the IoU of each pair; torchvision's `box_iou` is of all with all."""
    shared = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(
        one[..., :2], other[..., :2]
    )
    intersection = shared.clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return intersection / (areas[0] + areas[1] - intersection)


def _centerness(anchors: Float[Tensor, "p 4"], boxes: Float[Tensor, "p 4"]) -> Float[Tensor, "p"]:
    """Return how central anchors are in their boxes: 1 in the middle, 0 at a side."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = centres - boxes[:, :2], boxes[:, 2:] - centres
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(-1).sqrt()
