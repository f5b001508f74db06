"""The detector: two towers, a pyramid, a Dynamic Head, and what predicts at each place."""

import math
from typing import cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.anchors import anchor_boxes
from adapters.detection.atss import Prediction
from adapters.detection.config import DetectionConfig
from adapters.detection.dynamic_head import DynamicHead
from adapters.detection.pyramid import FeaturePyramid, level_sizes
from unicl.errors import UsageError
from unicl.towers.image import ImageTower
from unicl.towers.two_tower import TwoTower

STRIDES = (8, 16, 32)
"""Of the tower's maps that the pyramid begins with."""
MULTIPLE = 32
"""Sides of what a detector takes are multiples of this."""

# A place is taken for an object with this probability at first (RetinaNet, Lin et al. 2017).
_PRIOR = 0.01
_INITIAL_SCALE = 10.0
_NUM_BOX = 5  # four sides and centerness


class Detector(TwoTower):
    """Images into a prediction per place, by Dynamic Head on a pyramid (Florence 2.4).

    The towers are those of the model that it was made of, so that weights have the same names, and
    both can still embed. Classes are texts, numbers, or none: see `DetectionConfig.classes`.

    Args:
        image_tower: Has maps of strides 8, 16 and 32.
        text_tower: Embeds names; with numbers it is not used.
        detection: Head, width and classes.
        num_classes: Outputs where classes are numbers.
        embed_dim: Width of the embeddings of names.
        initial_scale: As in `TwoTower`; the weights of trained towers have their own.
        max_scale: As in `TwoTower`.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: nn.Module,
        detection: DetectionConfig,
        *,
        num_classes: int,
        embed_dim: int,
        initial_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__(image_tower, text_tower, initial_scale=initial_scale, max_scale=max_scale)
        self.by_text = detection.classes == "texts"
        self.num_levels, self.anchor_scale = detection.num_levels, detection.anchor_scale
        width = detection.width
        self.pyramid = FeaturePyramid(
            image_tower.map_widths(STRIDES), width, num_levels=detection.num_levels
        )
        self.head = DynamicHead(
            width,
            detection.num_blocks,
            released_offsets=detection.released_offsets,
            checkpointing=detection.checkpointing,
        )
        outputs = {"texts": embed_dim, "numbers": num_classes, "none": 1}[detection.classes]
        self.predictor = _Predictor(width, outputs, detection.num_levels, by_text=self.by_text)
        # They stay what they were: the similarities of whole images with texts.
        self.logit_scale.requires_grad_(False)
        image_tower.projection.requires_grad_(False)

    def places(
        self, images: UInt8[Tensor, "n channels h w"] | Float[Tensor, "n channels h w"]
    ) -> Float[Tensor, "n anchors outputs"]:
        """Return what is predicted at every place of every level, finest level first.

        These are the outputs of the class: logits, or an embedding to compare with those of names;
        then the four sides and the centerness.

        Args:
            images: Sides are multiples of 32.
        """
        if not len(images):  # a rank whose samples were all skipped takes its part in exchanges
            return self.places(images.new_zeros(1, *images.shape[1:]))[:0]
        image_tower: ImageTower = self.image  # type: ignore[assignment]
        return self.predictor(self.head(self.pyramid(image_tower.maps(images, STRIDES))))

    def predict(
        self,
        places: Float[Tensor, "n anchors outputs"],
        names: Float[Tensor, "classes dim"] | None = None,
        fit: Float[Tensor, "2"] | None = None,
    ) -> Prediction:
        """Part what is predicted at places into logits, boxes and centerness.

        Args:
            places: What `places` returned.
            names: Unit-length embeddings of the classes' names, where classes are texts.
            fit: Scale and bias that make logits of similarities; unset takes the model's.
        """
        outputs, boxes, centerness = places.float().split(
            [places.shape[-1] - _NUM_BOX, _NUM_BOX - 1, 1], dim=-1
        )
        if names is not None:
            scale, bias = self.class_fit() if fit is None else fit
            # Half precision has three digits of a similarity, which the scale would magnify.
            with torch.autocast(places.device.type, enabled=False):
                outputs = scale * (F.normalize(outputs, dim=-1) @ names.float().T) + bias
        elif self.by_text:
            raise UsageError("this detector finds objects by name: give it names")
        return Prediction(outputs, boxes, centerness.squeeze(-1))

    def class_fit(self) -> Float[Tensor, "2"]:
        """Return scale and bias that make logits of similarities."""
        return self.predictor.class_fit()

    def anchors(self, height: int, width: int) -> list[Float[Tensor, "_ 4"]]:
        """Return the anchors of each level of an image's size."""
        sizes = level_sizes(height, width, self.num_levels)
        return anchor_boxes(sizes, scale=self.anchor_scale, device=self.logit_scale.device)

    def name_embeddings(self, tokens: Int[Tensor, "names context"]) -> Float[Tensor, "names dim"]:
        """Return the unit-length embeddings of names."""
        return self.encode_text(tokens, deduplicated=True)


class _Predictor(nn.Module):
    """One by one convolutions on each level: class, sides, centerness (ATSS, no towers before)."""

    def __init__(self, width: int, outputs: int, num_levels: int, *, by_text: bool) -> None:
        super().__init__()
        self.classes = nn.Conv2d(width, outputs, 1)
        self.boxes = nn.Conv2d(width, _NUM_BOX - 1, 1)
        self.centerness = nn.Conv2d(width, 1, 1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        for layer in (self.classes, self.boxes, self.centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(cast(Tensor, layer.bias), 0.0)
        bias = -math.log((1 - _PRIOR) / _PRIOR)
        self.by_text = by_text
        if by_text:
            self.log_scale = nn.Parameter(torch.tensor([math.log(_INITIAL_SCALE)]))
            self.bias = nn.Parameter(torch.tensor([bias]))
        else:
            nn.init.constant_(cast(Tensor, self.classes.bias), bias)

    def class_fit(self) -> Float[Tensor, "2"]:
        return torch.cat([self.log_scale.float().exp(), self.bias.float()])

    def forward(self, levels: list[Float[Tensor, "n c _ _"]]) -> Float[Tensor, "n anchors outputs"]:
        places = []
        for level, scale in zip(levels, self.scales, strict=True):
            outputs = [self.classes(level), self.boxes(level) * scale, self.centerness(level)]
            places.append(torch.cat(outputs, dim=1).flatten(2).mT)
        return torch.cat(places, dim=1)
