"""What a detector has found in an image: boxes, scores, classes, the best of those that overlap."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

from adapters.detection.anchors import decode_boxes


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Float[Tensor, "m 4"]
    """x1, y1, x2, y2 in pixels."""
    scores: Float[Tensor, "m"]
    labels: Int64[Tensor, "m"]
    """Numbers of the classes."""


def detections(
    scores: Float[Tensor, "a k"],
    deltas: Float[Tensor, "a 4"],
    centerness: Float[Tensor, "a"],
    anchors: list[Float[Tensor, "_ 4"]],
    *,
    size: tuple[int, int],
    threshold: float = 0.05,
    per_level: int = 1000,
    overlap: float = 0.6,
    most: int = 100,
) -> Detections:
    """Return what the head's outputs say about one image.

    A detection's score is the geometric mean of its class's and of the centerness, as in ATSS;
    Dynamic Head's release leaves out the root, which changes no order.

    Args:
        scores: Of each anchor and class, in 0..1.
        deltas: Boxes as seen from the anchors.
        centerness: Logits.
        anchors: Of each level; all levels' are in the order of the other arguments.
        size: Height and width of the image in pixels, without padding: boxes end there.
        threshold: Lower scores of a class, before centerness, are left out.
        per_level: Pairs of box and class of each level that take part, at most.
        overlap: Of two boxes of one class with a higher IoU, the better one stays.
        most: Detections in all, at most.
    """
    num_classes = scores.shape[1]
    parts = [len(level) for level in anchors]
    boxes, joint, labels = [], [], []
    outputs = (part.float().split(parts) for part in (scores, deltas, centerness))
    for level, own_scores, own_deltas, own_centerness in zip(anchors, *outputs, strict=True):
        pairs = (own_scores > threshold).flatten().nonzero()[:, 0]
        places, classes = pairs // num_classes, pairs % num_classes
        products = own_scores[places, classes] * own_centerness.sigmoid()[places]
        best, order = products.topk(min(per_level, len(pairs)))
        boxes.append(decode_boxes(own_deltas[places[order]], level[places[order]].float()))
        joint.append(best.sqrt())
        labels.append(classes[order])
    clipped = clip_boxes_to_image(torch.cat(boxes), size)
    left = (clipped[:, 2:] > clipped[:, :2]).all(-1)  # of a box beside the image nothing is left
    found = Detections(clipped[left], torch.cat(joint)[left], torch.cat(labels)[left])
    return suppress(found, overlap=overlap, most=most)


def put_together(views: list[Detections], *, overlap: float = 0.6, most: int = 100) -> Detections:
    """Return the best of what was found in several views of one image, such as of several sizes.

    Args:
        views: At least one; boxes in pixels of the same image.
        overlap: Of two boxes of one class with a higher IoU, the better one stays.
        most: Detections in all, at most.
    """
    joined = Detections(*(torch.cat(parts) for parts in zip(*views, strict=True)))
    return suppress(joined, overlap=overlap, most=most)


def suppress(found: Detections, *, overlap: float, most: int) -> Detections:
    """Return the best detections, best first, without those that overlap a better one's class-wise.

    Args:
        found: Boxes with a class, in any order.
        overlap: Of two boxes of one class with a higher IoU, the better one stays.
        most: How many, at most.
    """
    boxes, scores, labels = found
    if len(boxes) == 0:
        return found
    # batched_nms moves each class to a place of its own, far away and only from 0 on: fp32 would
    # round the boxes of a class of a high number to whole pixels.
    apart = boxes.double() - boxes.min()
    kept = batched_nms(apart, scores.double(), labels, overlap)[:most]
    return Detections(boxes[kept], scores[kept], labels[kept])


def surest_names(found: Detections, *, overlap: float = 0.8) -> Detections:
    """Return each object under its surest name only, for a person to look at.

    Metrics compare each class by itself, so that one object may be found under several names.

    Args:
        found: What was found in one image.
        overlap: Boxes with a higher IoU are taken for one object.
    """
    kept = nms(found.boxes, found.scores, overlap)
    return Detections(*(tensor[kept] for tensor in found))
