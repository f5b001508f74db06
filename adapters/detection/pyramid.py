"""Maps of a tower as a pyramid of equal channels (Lin et al. 2017), P3 to P7."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from unicl.errors import UsageError

_FINEST_STRIDE = 8
_NUM_MAPS = 3
_MOST_LEVELS = 5


class FeaturePyramid(nn.Module):
    """A norm for each map, a feature pyramid, and coarser levels by convolutions.

    P6 is made of P5, and P7 of what a ReLU leaves of P6.

    Args:
        in_channels: Channels of the tower's maps of strides 8, 16 and 32.
        channels: Channels of every level.
        num_levels: 3 for P3 to P5, 4 or 5 for P6 and P7, too.

    Raises:
        UsageError: There are not three maps, or no such number of levels.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = 256, *, num_levels: int = 5
    ) -> None:
        super().__init__()
        if len(in_channels) != _NUM_MAPS:
            raise UsageError(
                f"a pyramid is made of {_NUM_MAPS} maps of strides 8, 16 and 32, "
                f"got {len(in_channels)}"
            )
        if not _NUM_MAPS <= num_levels <= _MOST_LEVELS:
            raise UsageError(
                f"a pyramid has {_NUM_MAPS} to {_MOST_LEVELS} levels, got {num_levels}"
            )
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in in_channels)
        extra: ExtraFPNBlock | None = None
        if num_levels == _NUM_MAPS + 1:
            extra = _LastLevelP6(channels)
        elif num_levels == _MOST_LEVELS:
            # Made of P5, as both have the same channels.
            extra = LastLevelP6P7(channels, channels)
        self.fpn = FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=extra)

    def forward(self, maps: Sequence[Float[Tensor, "n _ _ _"]]) -> list[Float[Tensor, "n c _ _"]]:
        """Return the levels, finest first.

        Args:
            maps: Of strides 8, 16 and 32.
        """
        normed = {
            str(index): norm(each.movedim(1, -1)).movedim(-1, 1)
            for index, (norm, each) in enumerate(zip(self.norms, maps, strict=True))
        }
        return list(self.fpn(normed).values())


def level_sizes(height: int, width: int, num_levels: int) -> list[tuple[int, int]]:
    """Return height and width of each level's map for images of a size, finest first."""
    strides = [_FINEST_STRIDE * 2**level for level in range(num_levels)]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


class _LastLevelP6(ExtraFPNBlock):
    """The first half of torchvision's LastLevelP6P7."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        nn.init.kaiming_uniform_(self.p6.weight, a=1)
        nn.init.zeros_(self.p6.bias)  # type: ignore[arg-type]

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append P6 to the levels."""
        return [*results, self.p6(results[-1])], [*names, "p6"]
