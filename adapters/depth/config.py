"""What a recipe of images with depth says besides: how depth maps are read. Imports no torch."""

from dataclasses import dataclass, field

from unicl.config import Recipe
from unicl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """From the values of a depth map to the bytes of the fourth channel."""

    unit: float = 0.001
    """Metres that a step of a depth map stands for: 0.001 in NYUv2 and ScanNet, 0.0002 in TUM
    RGB-D, 0.000125 in SUN RGB-D."""
    nearest: float = 0.5
    """Depth in metres that has the largest byte; what is nearer has it, too."""

    def __post_init__(self) -> None:
        for name in ("unit", "nearest"):
            if getattr(self, name) <= 0:
                raise UsageError(f"depth.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DepthRecipe(Recipe):
    """Everything a run on images with depth is determined by.

    `data.train` is a class folder whose images have depth maps.
    """

    task: str = "depth"
    """What is trained."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """How depth maps are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None:
            raise UsageError(f"task depth needs an image tower of four channels, not {self.model}")
