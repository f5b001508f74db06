"""What probes are fitted on: features and what their images show."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unicl.errors import UsageError

# `check` compares the sizes, and says it in words.
Features = Float[Tensor, "_num_images _dim"]
Targets = Int[Tensor, " _num_images"] | Bool[Tensor, "_num_images _num_classes"]
"""One class per image, or a table of which classes an image shows."""


def check(
    features: Features, targets: Targets, num_classes: int, what: str = "", *, fitted: bool = True
) -> None:
    """Say in one line what is wrong with features and their targets, if anything is.

    Args:
        features: the features.
        targets: what they show.
        num_classes: classes to choose from.
        what: the split's name for the message.
        fitted: whether a probe is to be fitted on them, which one class alone does not allow.

    Raises:
        UsageError: something is wrong.
    """
    if len(features) != len(targets):
        raise UsageError(f"{len(features)} {what}features but {len(targets)} {what}targets")
    if not features.numel():
        raise UsageError(f"there are no {what}features: a probe needs images of two classes")
    # The sum is finite if all numbers are, unless it overflows: only then look at each.
    if not features.sum().isfinite() and not features.isfinite().all():
        row = int((~features.isfinite()).any(dim=1).nonzero()[0])
        raise UsageError(f"{what}features of image {row} are not finite: embed it again")
    if targets.dtype == torch.bool:
        if targets.shape[1] != num_classes:
            raise UsageError(
                f"the {what}targets are a table of {targets.shape[1]} classes, not of {num_classes}"
            )
        if fitted and not targets.any():
            raise UsageError(f"no class is shown in the {what}targets: a probe needs some images")
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UsageError(
            f"the {what}targets hold class {wrong}, but there are {num_classes} classes, from 0"
        )
    if fitted and low == high:
        raise UsageError(f"all {what}targets are class {low}: a probe needs at least two classes")
