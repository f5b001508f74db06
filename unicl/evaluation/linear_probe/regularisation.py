"""CLIP's search for the strength of the regularisation (CLIP, A.3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from unicl.errors import UsageError
from unicl.evaluation.linear_probe.features import Features, Targets, check
from unicl.evaluation.linear_probe.probe import LinearProbe
from unicl.evaluation.linear_probe.solver import Solver
from unicl.evaluation.metrics import top_k_accuracy

Metric = Callable[..., float]
"""Of scores [num_images, num_classes] and targets; the higher the better."""

# CLIP's grid (CLIP, A.3): from 1e-6 to 1e6, searched down to eight steps per decade.
_STEPS_PER_DECADE = 8
_DECADES = 6
_FIRST_STEP = 2 * _STEPS_PER_DECADE

# What probes that are only compared are solved to; their accuracies hardly move below it.
_COMPARED = 1e-4


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search over the regularisation found."""

    probe: LinearProbe
    """Fitted on training and validation images with the best strength."""
    strength: float
    """The best C; of equally good ones the smallest, which regularises most."""
    metric: float
    """What the probe with this C, fitted on the training images, reaches in validation."""
    curve: dict[float, float]
    """The validation metric by C, ascending, for every C that was tried."""


def search(
    train_features: Features,
    train_targets: Targets,
    val_features: Features,
    val_targets: Targets,
    *,
    num_classes: int,
    metric: Metric = top_k_accuracy,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Search:
    """CLIP's search for C (CLIP, A.3), then a fit on training and validation images together.

    C is tried at every second power of ten from 1e-6 to 1e6, then on both sides of the best one,
    at half the distance each time, down to an eighth of a decade.

    Args:
        train_features: what probes are fitted on.
        train_targets: their classes.
        val_features: what probes are compared on.
        val_targets: their classes.
        num_classes: classes to choose from.
        metric: of scores and targets; the higher the better.
        max_iterations: as in `fit`.
        tolerance: of the last fit, as in `fit`; those before it end at 1e-4.

    Raises:
        UsageError: as in `fit`, for either split, or the splits differ in width.
    """
    check(train_features, train_targets, num_classes, "training ")
    check(val_features, val_targets, num_classes, "validation ", fitted=False)
    if train_features.shape[1] != val_features.shape[1]:
        raise UsageError(
            f"the training features are {train_features.shape[1]} wide, the validation features "
            f"{val_features.shape[1]}: embed both with one model"
        )
    if train_targets.dtype != val_targets.dtype:
        raise UsageError(
            f"the training targets are {train_targets.dtype}, the validation targets "
            f"{val_targets.dtype}: give both as classes, or both as tables of bools"
        )
    train, validation = (train_features, train_targets), (val_features, val_targets)
    solver = Solver([train], num_classes, max_iterations, max(tolerance, _COMPARED))
    probes: dict[int, LinearProbe] = {}
    found: dict[int, float] = {}

    def attempt(position: int) -> None:
        probe = solver.solve(10 ** (position / _STEPS_PER_DECADE), _between(probes, position))
        probes[position] = probe
        found[position] = metric(probe.scores(val_features), val_targets)

    def best() -> int:
        return min(found, key=lambda position: (-found[position], position))

    last = _DECADES * _STEPS_PER_DECADE
    step = _FIRST_STEP
    for position in range(-last, last + 1, step):
        attempt(position)
    while step > 1:
        step //= 2
        centre = best()
        for position in (centre - step, centre + step):
            if abs(position) <= last:
                attempt(position)
    chosen = probes[best()]
    whole = Solver([train, validation], num_classes, max_iterations, tolerance)
    return Search(
        probe=whole.solve(chosen.strength, chosen),
        strength=chosen.strength,
        metric=found[best()],
        curve={probes[position].strength: found[position] for position in sorted(found)},
    )


def _between(probes: dict[int, LinearProbe], position: int) -> LinearProbe | None:
    """Where to start: between the solved neighbours on both sides, or at the one there is."""
    below = max((other for other in probes if other < position), default=None)
    above = min((other for other in probes if other > position), default=None)
    if below is None or above is None:
        neighbour = below if above is None else above
        return None if neighbour is None else probes[neighbour]
    low, high = probes[below], probes[above]
    share = (position - below) / (above - below)
    return LinearProbe(
        weight=torch.lerp(low.weight, high.weight, share),
        bias=torch.lerp(low.bias, high.bias, share),
        strength=low.strength,
    )
