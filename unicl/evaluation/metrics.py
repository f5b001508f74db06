"""What scores are worth: accuracies, average precisions, and how sure they are."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unicl.errors import UsageError

# Sizes that differ are said in words.
Scores = Float[Tensor, "_num_images _num_classes"]
Classes = Int[Tensor, " _num_images"]
Shown = Bool[Tensor, "_num_images _num_classes"]


def top_k_accuracy(scores: Scores, targets: Classes, k: int = 1) -> float:
    """Share of the images whose class is among the best k, in 0..1; ties count as lost.

    Raises:
        UsageError: there are no images, or a class that has no score.
    """
    return (class_ranks(scores, targets) < k).double().mean().item()


def mean_per_class_accuracy(scores: Scores, targets: Classes) -> float:
    """Mean over the classes that occur of the share of their images named right; ties are lost.

    Raises:
        UsageError: there are no images, or a class that has no score.
    """
    return mean_per_class((class_ranks(scores, targets) < 1).double(), targets)


def mean_per_class(
    right: Float[Tensor, " num_images"], targets: Int[Tensor, " num_images"]
) -> float:
    """Mean over the classes that occur of the mean over their images."""
    counts = targets.bincount()
    sums = targets.bincount(right)
    return (sums[counts > 0] / counts[counts > 0]).mean().item()


def average_precision(
    scores: Scores, targets: Shown, counted: Shown | None = None
) -> Float[Tensor, " _num_classes"]:
    """Average precision of each class over the images, without interpolation.

    Of equal scores the images without the class come first. A class that no image shows has 0.

    Args:
        scores: the higher, the surer.
        targets: which classes an image shows.
        counted: which images count for which class; None counts all.

    Raises:
        UsageError: there are no images, or the tables differ in size.
    """
    hits, precision = _precision(scores, targets, counted)
    return (precision * hits).sum(dim=0) / hits.sum(dim=0).clamp(min=1)


def interpolated_average_precision(
    scores: Scores, targets: Shown, counted: Shown | None = None
) -> Float[Tensor, " _num_classes"]:
    """VOC2007's average precision of each class: the best precision at eleven levels of recall.

    At each recall of 0, 0.1, ..., 1 the highest precision among all cuts that reach it; then the
    mean of the eleven. VOC leaves images out in which a class is `difficult`: `counted` is False
    there. Arguments, ties and errors are those of `average_precision`.
    """
    hits, precision = _precision(scores, targets, counted)
    found, there = hits.cumsum(dim=0), hits.sum(dim=0)
    # The best precision of this cut and all longer ones.
    best = precision.flip(0).cummax(dim=0).values.flip(0)
    # In whole numbers, rounded up: recall 3/10 reaches 0.3 exactly.
    wanted = (there[:, None] * torch.arange(11, device=there.device) + 9) // 10
    first = torch.searchsorted(found.T.contiguous(), wanted)
    levels = best.T.gather(1, first)
    return torch.where(there > 0, levels.mean(dim=1), 0.0)


def mean_average_precision(scores: Scores, targets: Shown, counted: Shown | None = None) -> float:
    """Mean over the classes of `average_precision`."""
    return average_precision(scores, targets, counted).mean().item()


def mean_interpolated_average_precision(
    scores: Scores, targets: Shown, counted: Shown | None = None
) -> float:
    """Mean over the classes of `interpolated_average_precision`: VOC2007's own figure."""
    return interpolated_average_precision(scores, targets, counted).mean().item()


def wilson_interval(
    accuracy: float, num_images: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), which holds near 0 and 1, too.

    Raises:
        UsageError: the accuracy is no share, or there are no images.
    """
    if not 0 <= accuracy <= 1 or num_images < 1:
        raise UsageError(
            f"an interval needs a share in 0..1 of at least one image, got {accuracy} of "
            f"{num_images}"
        )
    z = _two_sided(confidence)
    weight = z * z / num_images
    centre = (accuracy + weight / 2) / (1 + weight)
    spread = accuracy * (1 - accuracy) / num_images + weight / num_images / 4
    half = z * math.sqrt(spread) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    metric: Callable[..., float],
    *tables: Tensor,
    confidence: float = 0.95,
    num_draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a metric over images drawn with replacement (Efron 1979).

    Args:
        metric: of the tables, such as `mean_per_class_accuracy` of scores and targets.
        tables: what the metric takes, one row per image.
        confidence: share of the draws inside the interval.
        num_draws: how often as many images as there are are drawn.
        seed: of the draws; equal seeds give equal intervals.

    Raises:
        UsageError: there are no images, or the tables differ in length.
    """
    _two_sided(confidence)
    lengths = {len(table) for table in tables}
    if len(lengths) != 1 or 0 in lengths:
        sizes = ", ".join(str(len(table)) for table in tables)
        raise UsageError(f"a bootstrap needs tables of one length, one row per image, got {sizes}")
    (length,) = lengths
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_draws):
        rows = torch.randint(length, (length,), generator=generator)
        values.append(metric(*(table[rows.to(table.device)] for table in tables)))
    outside = (1 - confidence) / 2
    limits = torch.tensor([outside, 1 - outside], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(limits).tolist()
    return low, high


def _two_sided(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence lies between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def class_ranks(scores: Scores, targets: Classes) -> Classes:
    """Number of wrong classes that score at least as high as the right one.

    Raises:
        UsageError: there are no images, or a class that has no score.
    """
    num_images, num_classes = scores.shape
    if num_images != len(targets) or not num_images:
        raise UsageError(f"{num_images} rows of scores but {len(targets)} targets")
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        wrong = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
        raise UsageError(f"the targets hold class {wrong}, but there are scores of {num_classes}")
    right = scores.gather(1, targets[:, None])
    # A score that is no number is below nothing, and must not win by that.
    return num_classes - 1 - (scores < right).sum(dim=1)


def _precision(scores: Scores, targets: Shown, counted: Shown | None) -> tuple[Shown, Scores]:
    """Whether each image shows the class, surest first, and the precision of a cut behind it."""
    counted = torch.ones_like(targets) if counted is None else counted
    if not scores.shape == targets.shape == counted.shape or not len(scores):
        raise UsageError(
            f"scores are {list(scores.shape)}, targets {list(targets.shape)}, what counts "
            f"{list(counted.shape)}: all must be images by classes"
        )
    # What does not count goes to the end, where it changes no precision. A class's images lie side
    # by side in memory while they are sorted, which is several times faster.
    shown = (targets & counted).T.contiguous()
    ranked = scores.masked_fill(~counted, -math.inf).T.contiguous()
    negatives_first = shown.byte().argsort(dim=1, stable=True)
    surest_first = ranked.gather(1, negatives_first).argsort(dim=1, descending=True, stable=True)
    hits = shown.gather(1, negatives_first.gather(1, surest_first)).T
    cuts = torch.arange(1, len(hits) + 1, device=hits.device, dtype=torch.float64)
    return hits, hits.cumsum(dim=0) / cuts[:, None]
