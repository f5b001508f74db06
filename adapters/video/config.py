"""What a recipe of videos says besides: how clips are taken, and what sees them. Imports no torch.

Florence (2.6, 3.8, 3.9) gives neither its frames nor its temporal windows; the defaults are those
of Video-Swin's recipes, whose 32 frames 3D-CoSwin halves in its first embedding.
"""

from dataclasses import dataclass, field
from typing import Literal

from unicl.config import Recipe, require_unset
from unicl.errors import UsageError

READING = ("num_frames", "sampling", "frame_stride", "num_clips", "num_crops")
"""How a model reads videos; at evaluation it may be another way than in training."""
TOWER = (
    *("tower", "tube_frames", "tube_stride", "merge_steps"),
    *("time_windows", "space_windows"),
)
"""What decides the weights of the tower, and what they compute."""
OF_MODEL = (*READING, *TOWER)
"""What a run takes over from the model that it starts from."""

_OF_3D = ("tube_frames", "tube_stride", "merge_steps", "time_windows", "space_windows")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Clips, the tower that sees them, and what they are trained for."""

    tower: Literal["3d", "frames"] = "3d"
    """3d: 3D-CoSwin, inflated where the weights to start from are of images; frames: the image
    tower itself, whose embeddings of single frames are averaged."""
    num_frames: int = 32
    """Frames of a clip."""
    sampling: Literal["uniform", "dense"] = "dense"
    """uniform: one frame of each of `num_frames` equal parts of the video; dense: every
    `frame_stride`-th frame of a window that lies anywhere."""
    frame_stride: int = 2
    """Dense sampling: frames from one that is taken to the next."""
    num_clips: int = 1
    """Evaluation: clips per video, spread over it; the paper has 4."""
    num_crops: int = 1
    """Evaluation: crops per clip, 1 in the middle or 3 along the longer side; the paper has 3."""
    tube_frames: int = 2
    """3d: frames that the first embedding sees at once."""
    tube_stride: int = 2
    """3d: frames from one tube to the next."""
    merge_steps: int = 3
    """3d: steps of time that the embeddings between stages see at once; 1 keeps them apart."""
    time_windows: tuple[int, ...] = ()
    """3d: steps of time in the attention windows of each stage; empty is 2, 4, 8, 16."""
    space_windows: tuple[int, ...] = ()
    """3d: side of the attention windows of each stage; empty is that of the image tower."""
    targets: Literal["texts", "classes"] = "texts"
    """texts: captions or class names, by the contrastive loss; classes: a head with one output per
    text, by cross-entropy."""
    class_names: tuple[str, ...] = ()
    """Classes of the head, in the order of its outputs; empty takes the texts of the data."""
    label_smoothing: float = 0.1
    """Of the head's cross-entropy: share of the target that all classes divide among them."""
    dropout: float = 0.0
    """Before the head."""
    randaugment_ops: int = 0
    """Training: operations of RandAugment per clip, alike for all its frames; 0 is off."""
    randaugment_magnitude: int = 9
    """Training: how strong they are, 0 to 30."""

    def __post_init__(self) -> None:
        positive = ("num_frames", "frame_stride", "num_clips", "tube_frames", "tube_stride")
        for name in positive:
            _require(getattr(self, name) > 0, name, "must be positive", getattr(self, name))
        _require(self.num_crops in (1, 3), "num_crops", "must be 1 or 3", self.num_crops)
        odd = self.merge_steps > 0 and self.merge_steps % 2 == 1
        _require(odd, "merge_steps", "must be odd and positive", self.merge_steps)
        for name in ("time_windows", "space_windows"):
            windows = getattr(self, name)
            _require(all(side > 0 for side in windows), name, "must be positive", windows)
        for name in ("label_smoothing", "dropout"):
            share = getattr(self, name)
            _require(0 <= share < 1, name, "must lie in [0, 1)", share)
        _require(
            self.randaugment_ops >= 0, "randaugment_ops", "must not be negative",
            self.randaugment_ops,
        )  # fmt: skip
        _require(
            0 <= self.randaugment_magnitude <= 30, "randaugment_magnitude", "must lie in [0, 30]",
            self.randaugment_magnitude,
        )  # fmt: skip
        if self.tower == "frames":
            require_unset(self, "video", "video.tower frames", *_OF_3D)
        if self.targets == "texts":
            _require(not self.class_names, "class_names", "needs targets classes", "names")
            _require(not self.dropout, "dropout", "needs targets classes", self.dropout)


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Recipe):
    """Everything a run on videos is determined by.

    `data.train` is a folder of shards, or a set of videos as `unicl eval` takes it.
    """

    task: str = "video"
    """What is trained."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Clips, and what sees them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.video.tower == "3d" and not self.image_tower.model.startswith("coswin"):
            raise UsageError(
                "video.tower 3d inflates a CoSwin only, not image_tower.model "
                f"{self.image_tower.model}; set video.tower to frames"
            )
        if self.model is not None and self.video.targets == "classes":
            raise UsageError(
                "video.targets classes puts a head on a tower that is built here, not on "
                f"{self.model}; set video.targets to texts"
            )
        if self.model is not None and self.video.tower == "3d":
            raise UsageError(
                f"video.tower 3d inflates a CoSwin only, not {self.model}; "
                "set video.tower to frames"
            )


def _require(condition: bool, name: str, must: str, value: object) -> None:
    if not condition:
        raise UsageError(f"video.{name} {must}, got {value}")
