"""What a recipe of detection says besides: head, classes, sizes of images. Imports no torch.

Florence (2.4, 3.6) gives neither the number of blocks nor the width of its Dynamic Head; the
defaults are those of Dynamic Head's own recipes (Dai et al. 2021), and ATSS's (Zhang et al. 2020).
"""

from dataclasses import dataclass, field
from typing import Literal

from unicl.config import Recipe, require_unset
from unicl.errors import UsageError

OF_MODEL = (
    *("classes", "class_names", "category_ids"),
    *("width", "num_blocks", "num_levels", "anchor_scale", "released_offsets"),
)
"""What decides the weights of the detector, and what they compute."""
READING = ("test_sizes", "max_size", "regions", "score_threshold", "max_detections")
"""How a detector looks at images; at evaluation it may be another way than in training."""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """The detector: its head, its classes, how it learns and how it looks at images."""

    classes: Literal["texts", "numbers", "none"] = "texts"
    """texts: an object's class is the nearest of the names, which may be any; numbers: one output
    per class; none: boxes of objects of whatever class, while both towers stay as they are, to name
    them afterwards, which is the paper's zero-shot detection. Every proposal gets one of the names
    that are asked for: ask for all that may be there."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty takes those of the data."""
    category_ids: tuple[int, ...] = ()
    """Their numbers in the data's annotations; empty takes the data's."""
    width: int = 256
    """Channels of the pyramid and of the head."""
    num_blocks: int = 6
    """Blocks of the Dynamic Head."""
    num_levels: int = 5
    """Levels of the pyramid, from stride 8 on: 5 are P3 to P7."""
    anchor_scale: float = 8.0
    """Side of an anchor in strides of its level."""
    released_offsets: bool = False
    """Use offsets on the coarser neighbour as the released code does, which reads them in another
    order than they were made for; only for weights that were trained that way."""
    checkpointing: bool = False
    """Recompute the activations of the head's blocks in the backward pass."""
    sets: tuple[str, ...] = ()
    """More sets to train on, beside `data.train`; classes of equal names are one."""
    classes_per_step: int = 128
    """texts: names per step, those of the batch's objects and others drawn from the vocabulary."""
    min_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Training: shorter side of an image in pixels, drawn anew each time."""
    max_size: int = 1333
    """Longer side in pixels, at most."""
    test_sizes: tuple[int, ...] = (800,)
    """Evaluation: shorter sides; of several, the detections are put together."""
    regions: Literal["crop", "pool"] = "crop"
    """classes none: what the towers see of a proposal. crop: it is cut out of the image and
    encoded; pool: it is averaged out of the last map."""
    score_threshold: float = 0.05
    """Detections of lower scores are left out."""
    max_detections: int = 100
    """Detections per image, at most."""

    def __post_init__(self) -> None:
        positive = (
            *("width", "num_blocks", "anchor_scale", "classes_per_step"),
            *("max_size", "max_detections"),
        )
        for name in positive:
            _require(getattr(self, name) > 0, name, "must be positive", getattr(self, name))
        # With 16, each group of a norm would be one channel, whose mean is always zero.
        suits = self.width % 16 == 0 and self.width >= 32
        _require(suits, "width", "must be a multiple of 16, at least 32", self.width)
        _require(3 <= self.num_levels <= 5, "num_levels", "must lie in [3, 5]", self.num_levels)
        threshold = self.score_threshold
        _require(0 <= threshold < 1, "score_threshold", "must lie in [0, 1)", threshold)
        for name in ("min_sizes", "test_sizes"):
            sizes = getattr(self, name)
            _require(bool(sizes) and min(sizes) > 0, name, "must be positive numbers", sizes)
            _require(
                max(sizes) <= self.max_size, name, f"must be at most max_size {self.max_size}",
                max(sizes),
            )  # fmt: skip
        if self.category_ids:
            _require(
                len(self.category_ids) == len(self.class_names),
                "category_ids", "must be one number per name in class_names",
                len(self.category_ids),
            )  # fmt: skip
        if self.classes == "none":
            require_unset(self, "detection", "detection.classes none", "class_names")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """Everything a detector's run is determined by.

    `data.train` is a folder or JSON file of boxes, as `unicl eval` takes it.
    """

    task: str = "detection"
    """What is trained."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """The detector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainer.compile:
            raise UsageError(
                "trainer.compile has no effect on a detector, whose images differ in size; leave "
                "it out"
            )
        if self.model is not None:
            raise UsageError(
                f"task detection needs an image tower with maps of several sizes, not {self.model}"
            )


def _require(condition: bool, name: str, must: str, value: object) -> None:
    if not condition:
        raise UsageError(f"detection.{name} {must}, got {value}")
