"""Towers that see videos, each in one view or several: clips, crops, or single frames."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicl.towers.two_tower import Images, TwoTower


class VideoTwoTower(TwoTower):
    """Videos and texts into unit-length embeddings of one space.

    A video's embedding is the mean of its views' unit-length embeddings, at unit length again
    (CLIP4Clip's mean pooling, Luo et al. 2021, where the views are frames). Weights have the names
    that they have in a model of images.

    Args:
        image_tower: Views into features: frames [n, 3, h, w], or clips [n, 3, frames, h, w].
        text_tower: Tokens into features of the same width.
        view_dims: Dimensions of a view: 3 of frames, 4 of clips.
        initial_scale: As in `TwoTower`.
        max_scale: As in `TwoTower`.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        *,
        view_dims: int,
        initial_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__(image_tower, text_tower, initial_scale=initial_scale, max_scale=max_scale)
        self.view_dims = view_dims

    @classmethod
    def of(cls, model: TwoTower, *, view_dims: int) -> "VideoTwoTower":
        """Let the towers of a model see videos; both share all weights."""
        video = cls(model.image, model.text, view_dims=view_dims, max_scale=model.max_scale)
        video.logit_scale = model.logit_scale
        video._locked = list(model._locked)
        return video.train(model.training)  # type: ignore[return-value]

    def encode_image(self, images: Images) -> Float[Tensor, "batch dim"]:
        """Return the unit-length embeddings of videos [batch, *view] or [batch, views, *view]."""
        embeddings = super().encode_image(in_views(images, self.view_dims))
        return F.normalize(mean_of_views(embeddings, len(images)), dim=-1)

    def encode_image_twice(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch width"]]:
        """Return the embeddings of videos, and the mean features that they are projected from."""
        embeddings, features = super().encode_image_twice(in_views(images, self.view_dims))
        return (
            F.normalize(mean_of_views(embeddings, len(images)), dim=-1),
            mean_of_views(features, len(images)),
        )


class VideoClassifier(TwoTower):
    """Videos into the probabilities of classes: a linear head on the pooled features of a tower.

    It stands where two towers stand, so that it is trained, kept and evaluated like them; it has no
    text tower.

    Args:
        image_tower: Clips [n, 3, frames, h, w] into features, by `pool`; its projection is dropped.
        num_classes: Outputs of the head.
        width: Width of the pooled features.
        dropout: Before the head.
        view_dims: Dimensions of a view.
    """

    def __init__(
        self,
        image_tower: Any,
        *,
        num_classes: int,
        width: int,
        dropout: float = 0.0,
        view_dims: int = 4,
    ) -> None:
        super().__init__(image_tower, nn.Identity())
        image_tower.projection = nn.Identity()
        self.logit_scale.requires_grad_(False)
        self.view_dims = view_dims
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def logits(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Return the head's outputs, the mean over a video's views: its frames, if it has any."""
        pooled = self.image(in_views(images, self.view_dims))
        logits = self.head(self.dropout(pooled)).float()
        return mean_of_views(logits, len(images))

    def encode_image(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Return the probabilities of the classes, the mean over a video's views."""
        probabilities = self.logits(in_views(images, self.view_dims)).softmax(-1)
        return mean_of_views(probabilities, len(images))

    def encode_image_twice(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch width"]]:
        """Return the probabilities, and the mean of the views' pooled features."""
        pooled = self.image(in_views(images, self.view_dims))
        probabilities = self.head(pooled).float().softmax(-1)
        return (
            mean_of_views(probabilities, len(images)),
            mean_of_views(pooled.float(), len(images)),
        )


def in_views(images: Images, view_dims: int) -> Tensor:
    """Lay out videos [batch, views, *view] view by view; [batch, *view] stays as it is."""
    return images if images.ndim == view_dims + 1 else images.flatten(0, 1)


def mean_of_views(
    encoded: Float[Tensor, "views dim"], num_videos: int
) -> Float[Tensor, "{num_videos} dim"]:
    """Return the mean of each video's views, which lie one after the other."""
    # Not -1: a rank whose samples were all skipped has no videos, and so no number of views.
    num_views = len(encoded) // max(1, num_videos)
    return encoded.unflatten(0, (num_videos, num_views)).mean(1)
