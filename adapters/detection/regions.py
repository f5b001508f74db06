"""Zero-shot names of proposals (Florence, 3.6): regions into the space of images and texts.

Florence names each proposal by the two towers, "similar to R-CNN", but does not say how a region
becomes an image feature. There are two ways: the region of the last map is pooled as a whole
image's map is, at hardly any cost; or it is cut out of the image and encoded by itself, as R-CNN
does, at the cost of an image per region and the resolution that small objects need.
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, roi_align
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from adapters.detection.found import Detections, suppress
from unicl.errors import UsageError
from unicl.towers.two_tower import TwoTower

# Pairs of proposal and class among which the best are looked for: all of most vocabularies.
_CANDIDATES = 10_000


@torch.no_grad()
def pooled_embeddings(
    model: TwoTower, image: UInt8[Tensor, "3 h w"], boxes: Float[Tensor, "m 4"]
) -> Float[Tensor, "m dim"]:
    """Return the unit-length embeddings of regions of the last map.

    RoIAlign averages a region of the map, then follows what the tower does to the average of the
    whole map: a box of the whole image has the image's embedding.

    Args:
        model: Image and text tower; the backbone must give a map.
        image: The whole image, as large as the tower is to see it.
        boxes: Regions in pixels of it; what is outside of it is cut off, and none is less than a
            pixel.

    Raises:
        UsageError: The backbone gives tokens or what else, but no map.
    """
    tower: Any = model.image
    height, width = image.shape[1:]
    features = _last_map(tower, image)
    rows, columns = features.shape[2:]
    regions = _within(boxes.float(), height, width)
    # First multiplied: RoIAlign rounds the number of cells up, and n / w * w may be above n.
    regions = regions * regions.new_tensor([columns, rows] * 2)
    regions = regions / regions.new_tensor([width, height] * 2)
    averages = roi_align(features, [regions], output_size=1, aligned=True)
    if _channels_last(tower.backbone):
        averages = averages.movedim(1, -1)
    # Of a map of one cell the backbone takes the average, and what comes after it in its family.
    return F.normalize(tower.projection(tower.backbone.forward_head(averages)).float(), dim=-1)


@torch.no_grad()
def cropped_embeddings(
    model: TwoTower,
    image: UInt8[Tensor, "3 h w"],
    boxes: Float[Tensor, "m 4"],
    *,
    size: int,
    batch_size: int = 64,
    context: float = 1.0,
) -> Float[Tensor, "m dim"]:
    """Return the unit-length embeddings of regions that are cut out and encoded by themselves.

    Regions are stretched to squares, as R-CNN does, bicubically, as images in pretraining.

    Args:
        model: Image and text tower.
        image: The original image, on the model's device.
        boxes: Regions in pixels of it; what is outside of it is cut off, and none is less than a
            pixel.
        size: Side in pixels of what the tower sees.
        batch_size: Regions that are encoded at once.
        context: Factor of a region's sides: above 1 shows what is around it, too.
    """
    height, width = image.shape[1:]
    middles, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    enlarged = torch.cat([middles - context * halves, middles + context * halves], 1)
    low, high = _within(enlarged, height, width).split(2, 1)
    crops = [
        resized_crop(
            image,
            *(top, left, bottom - top, right - left),
            size=[size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        for left, top, right, bottom in torch.cat([low.floor(), high.ceil()], 1).long().tolist()
    ]
    if not crops:
        return model.encode_image(image.new_zeros(1, 3, size, size))[:0]
    batches = [crops[first : first + batch_size] for first in range(0, len(crops), batch_size)]
    return torch.cat([model.encode_image(torch.stack(batch)) for batch in batches])


def name_proposals(
    embeddings: Float[Tensor, "m dim"],
    objectness: Float[Tensor, "m"],
    boxes: Float[Tensor, "m 4"],
    classes: Float[Tensor, "k dim"],
    *,
    scale: float,
    overlap: float = 0.6,
    most: int = 100,
) -> Detections:
    """Return the best pairs of proposal and class.

    A pair's score is the proposal's objectness times the class's share of the softmax over all
    classes, at the temperature of pretraining: how likely an object is there, times how likely it
    is one of these, as if every object had one of the names. A proposal may have several classes.
    Florence does not say how it fuses the two.

    Args:
        embeddings: Of the proposals, of unit length.
        objectness: Their scores, in 0..1.
        boxes: Their places.
        classes: Embeddings of the classes' texts, of unit length.
        scale: Factor of the cosines, as the towers have learned it.
        overlap: Of two proposals of one class with a higher IoU, the better one stays.
        most: Pairs, at most.
    """
    scores = objectness[:, None] * (scale * embeddings @ classes.T).softmax(-1)
    best, pairs = scores.flatten().topk(min(_CANDIDATES, scores.numel()))
    found = Detections(boxes[pairs // len(classes)], best, pairs % len(classes))
    return suppress(found, overlap=overlap, most=most)


def _last_map(tower: Any, image: Tensor) -> Float[Tensor, "1 channels rows columns"]:
    pixels = ((image.to(tower.mean.dtype) - tower.mean) / tower.std)[None]
    features = tower.backbone.forward_features(pixels)
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise UsageError(
            f"{tower.model} has no map to pool regions of; set detection.regions to crop"
        )
    features = features.movedim(-1, 1) if _channels_last(tower.backbone) else features
    return features.float()


def _channels_last(backbone: Any) -> bool:
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"


def _within(boxes: Tensor, height: int, width: int) -> Float[Tensor, "m 4"]:
    """Return the parts of boxes inside of an image, of at least a pixel."""
    low, high = clip_boxes_to_image(boxes, (height, width)).split(2, 1)
    low = torch.minimum(low, low.new_tensor([width - 1, height - 1]))
    return torch.cat([low, torch.maximum(high, low + 1)], 1)
