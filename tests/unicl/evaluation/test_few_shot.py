import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from unicl.errors import UsageError
from unicl.evaluation.few_shot import (
    _NUMBERS_AT_ONCE,
    FewShotResult,
    draw_episodes,
    few_shot,
)


def test_episodes_hold_different_images_of_different_classes() -> None:
    targets = np.random.default_rng(0).integers(0, 8, 400)
    episodes = draw_episodes(targets, shot=5, num_episodes=20)
    assert episodes.support.shape == (20, 5, 5)
    assert episodes.query.shape == (20, 5, 15)
    for support, query in zip(episodes.support, episodes.query, strict=True):
        both = np.concatenate([support, query], axis=1)
        assert len(np.unique(both)) == both.size
        classes = targets[both]
        assert (classes == classes[:, :1]).all()
        assert len(np.unique(classes[:, 0])) == 5
    again = draw_episodes(targets, shot=5, num_episodes=20)
    np.testing.assert_array_equal(again.query, episodes.query)
    # More episodes begin with the same ones.
    more = draw_episodes(targets, shot=5, num_episodes=30)
    np.testing.assert_array_equal(more.query[:20], episodes.query)


def test_too_few_images() -> None:
    targets = np.repeat(np.arange(6), [20, 20, 20, 20, 19, 3])
    with pytest.raises(
        UsageError, match=r"5 classes of at least 20 samples each .* 6 classes 4 have so many"
    ):
        draw_episodes(targets, shot=5)


def test_heads_learn_digits_better_with_more_shots() -> None:
    digits = load_digits()
    features = torch.from_numpy(digits.images.reshape(1, -1, 64) / 16).float()
    results = {}
    for shot in (1, 10):
        episodes = draw_episodes(digits.target.astype(np.int64), shot=shot, num_episodes=16)
        results[shot] = few_shot(features, episodes)
    assert results[1].mean > 0.5
    assert results[10].mean > max(0.8, results[1].mean + 0.1)


def test_a_head_does_not_know_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    features = torch.from_numpy(digits.images.reshape(1, -1, 64) / 16).float()
    episodes = draw_episodes(digits.target.astype(np.int64), shot=5, num_episodes=4)
    together = few_shot(features, episodes)
    monkeypatch.setitem(_NUMBERS_AT_ONCE, "cpu", 1)
    alone = few_shot(features, episodes)
    # Other random numbers, the same heads but for that.
    assert alone.mean == pytest.approx(together.mean, abs=0.08)


def test_features_without_a_difference_leave_guessing() -> None:
    targets = np.repeat(np.arange(5), 40)
    result = few_shot(torch.ones(2, 200, 8), draw_episodes(targets, shot=5, num_episodes=4))
    assert result.mean == pytest.approx(0.2)


def test_the_interval_is_of_the_mean() -> None:
    result = FewShotResult(torch.tensor([0.4, 0.6] * 50))
    low, high = result.interval
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=1e-5)
