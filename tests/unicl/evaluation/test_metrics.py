import math
from functools import partial

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor

from unicl.errors import UsageError
from unicl.evaluation.metrics import (
    average_precision,
    bootstrap_interval,
    interpolated_average_precision,
    mean_average_precision,
    mean_interpolated_average_precision,
    mean_per_class_accuracy,
    top_k_accuracy,
    wilson_interval,
)


def draw(num_images: int = 300, num_classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (num_images,), generator=generator)
    scores = torch.randn(num_images, num_classes, generator=generator)
    scores[torch.arange(num_images), targets] += 1
    return scores, targets


def draw_table(num_images: int = 200, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(num_images, num_classes, generator=generator) < 0.2
    return torch.randn(num_images, num_classes, generator=generator) + targets, targets


def test_top_k_is_that_of_scikit_learn() -> None:
    scores, targets = draw()
    for k in (1, 5):
        expected = top_k_accuracy_score(targets, scores, k=k)
        assert top_k_accuracy(scores, targets, k) == pytest.approx(expected, abs=1e-6)


def test_ties_and_what_is_no_number_count_as_lost() -> None:
    targets = torch.tensor([0, 1])
    assert top_k_accuracy(torch.zeros(2, 3), targets, k=2) == 0.0
    assert top_k_accuracy(torch.zeros(2, 3), targets, k=3) == 1.0
    assert top_k_accuracy(torch.full((2, 3), math.nan), targets) == 0.0
    assert mean_per_class_accuracy(torch.zeros(2, 3), targets) == 0.0


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_mean_per_class_is_the_balanced_accuracy_of_scikit_learn() -> None:
    scores, targets = draw()
    targets[targets == 3] = 2  # unbalanced, and one class without images
    expected = balanced_accuracy_score(targets, scores.argmax(dim=1))
    assert mean_per_class_accuracy(scores, targets) == pytest.approx(expected, abs=1e-6)


def test_average_precision_is_that_of_clip_benchmark() -> None:
    scores, targets = draw_table()
    targets[:, 2] = False
    expected = average_precision_per_class(scores, targets)
    found = average_precision(scores, targets)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[2] == 0
    assert mean_average_precision(scores, targets) == pytest.approx(expected.mean().item())


def interpolated_by_hand(scores: np.ndarray, shown: np.ndarray) -> float:
    found, curve = 0, []
    for cut, image in enumerate(np.argsort(-scores), 1):
        found += bool(shown[image])
        curve.append((found / shown.sum(), found / cut))
    levels = [max(p for r, p in curve if r >= t / 10 - 1e-9) for t in range(11)]
    return sum(levels) / 11


@pytest.mark.parametrize("masked", [False, True])
def test_eleven_points_of_recall(masked: bool) -> None:
    scores, targets = draw_table()
    generator = torch.Generator().manual_seed(2)
    counted = torch.rand(targets.shape, generator=generator) < (0.7 if masked else 2)
    found = interpolated_average_precision(scores, targets, counted if masked else None)
    for number, value in enumerate(found.tolist()):
        keep = counted[:, number]
        expected = interpolated_by_hand(scores[keep, number].numpy(), targets[keep, number].numpy())
        assert value == pytest.approx(expected, abs=1e-9)
    mean = mean_interpolated_average_precision(scores, targets, counted)
    assert mean == pytest.approx(found.mean().item())


def test_masked_images_do_not_count_for_average_precision_either() -> None:
    scores, targets = draw_table(num_classes=1)
    counted = torch.arange(len(scores))[:, None] % 3 > 0
    keep = counted[:, 0]
    expected = average_precision(scores[keep], targets[keep])
    torch.testing.assert_close(average_precision(scores, targets, counted), expected)


@pytest.mark.parametrize("metric", [average_precision, interpolated_average_precision])
def test_of_equal_scores_the_wrong_ones_come_first(metric) -> None:
    targets = torch.tensor([[True], [False], [False], [False]])
    assert metric(torch.zeros(4, 1), targets).item() == pytest.approx(0.25)
    assert metric(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (7, 10), (990, 1000), (5, 5)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_is_that_of_scipy(hits: int, count: int, confidence: float) -> None:
    expected = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    found = wilson_interval(hits / count, count, confidence=confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bootstrap_agrees_with_wilson_and_repeats() -> None:
    scores, targets = draw(1000)
    low, high = bootstrap_interval(top_k_accuracy, scores, targets)
    assert (low, high) == bootstrap_interval(top_k_accuracy, scores, targets)
    expected = wilson_interval(top_k_accuracy(scores, targets), 1000)
    assert (low, high) == pytest.approx(expected, abs=0.008)
    narrow = bootstrap_interval(top_k_accuracy, scores, targets, confidence=0.5, num_draws=200)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(partial(top_k_accuracy, k=7), scores, targets) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.tensor([1])), "2 rows of scores but 1"),
        (lambda: top_k_accuracy(torch.zeros(1, 3), torch.tensor([3])), "class 3, but .* of 3"),
        (lambda: top_k_accuracy(torch.zeros(1, 3), torch.tensor([-1])), "class -1, but"),
        (lambda: average_precision(torch.zeros(2, 3), torch.ones(2, 2) > 0), r"\[2, 3\].*\[2, 2\]"),
        (lambda: wilson_interval(1.5, 10), "got 1.5 of 10"),
        (lambda: wilson_interval(0.5, 10, confidence=95.0), "got 95"),
        (lambda: bootstrap_interval(len, torch.zeros(3), torch.zeros(2)), "got 3, 2"),
        (lambda: bootstrap_interval(len, torch.zeros(0)), "got 0"),
    ],
)
def test_bad_input_is_one_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
