import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicl.data.order import SampleOrder, mix, mix_array
from unicl.errors import UsageError

sizes = (
    st.lists(st.integers(0, 12), min_size=1, max_size=8)
    .filter(any)
    .map(lambda values: np.array(values, dtype=np.int64))
)
seeds = st.integers(0, 2**63)
windows = st.integers(1, 10)


@given(sizes, seeds, windows, st.integers(0, 3))
def test_each_epoch_is_a_permutation(shard_sizes, seed, window, epoch):
    order = SampleOrder(shard_sizes, seed=seed, window=window)
    n = order.num_samples
    assert sorted(order.indices(epoch * n, n)) == list(range(n))


@given(sizes, seeds, windows, st.integers(0, 200), st.integers(0, 60), st.integers(0, 60))
def test_slices_compose_whatever_was_asked_before(shard_sizes, seed, window, start, n, m):
    order = SampleOrder(shard_sizes, seed=seed, window=window)
    tail = order.indices(start + n, m)
    whole = SampleOrder(shard_sizes, seed=seed, window=window).indices(start, n + m)
    np.testing.assert_array_equal(np.concatenate([order.indices(start, n), tail]), whole)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), seeds, st.integers(1, 4))
def test_a_window_mixes_the_samples_of_few_shards(shard_sizes, seed, window):
    order = SampleOrder(np.array(shard_sizes, dtype=np.int64), seed=seed, window=window)
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    shards = shard_of[order.indices(0, order.num_samples)]
    # Walk the epoch window by window: each holds the whole of `window` shards (the last fewer).
    begin, num_windows = 0, 0
    while begin < len(shards):
        members = list(dict.fromkeys(shards[begin:]))[: len(shard_sizes)]
        for count in range(1, window + 1):
            total = sum(shard_sizes[shard] for shard in members[:count])
            window_shards = set(shards[begin : begin + total])
            if len(window_shards) == count and (count == window or begin + total == len(shards)):
                break
        else:
            pytest.fail(f"no window of {window} shards begins at {begin}")
        begin += total
        num_windows += 1
    assert num_windows == -(-len(shard_sizes) // window)


def test_seeds_and_epochs_differ():
    shard_sizes = np.full(10, 50)
    first = SampleOrder(shard_sizes, seed=0, window=4).indices(0, 1000)
    other = SampleOrder(shard_sizes, seed=1, window=4).indices(0, 500)
    assert (first[:500] == first[500:]).mean() < 0.05
    assert (first[:500] == other).mean() < 0.05


def test_samples_are_spread_evenly():
    # Over many epochs each sample comes first about equally often: chi-square of 15 degrees.
    order = SampleOrder(np.full(4, 4), seed=7, window=2)
    first = np.array([order.indices(16 * epoch, 1)[0] for epoch in range(3200)])
    expected = 3200 / 16
    assert ((np.bincount(first, minlength=16) - expected) ** 2 / expected).sum() < 37.7  # p=0.001


def test_order_never_changes_silently():
    order = SampleOrder(np.array([5, 0, 7, 3, 9]), seed=1, window=2)
    assert order.indices(0, 48).tolist() == [
        13, 12, 14, 18, 1, 3, 15, 22, 4, 23, 2, 20, 19, 17, 0, 16, 21, 9, 10, 8, 11, 5, 6, 7,
        1, 4, 15, 3, 2, 16, 17, 18, 20, 23, 0, 21, 22, 19, 13, 5, 6, 11, 9, 12, 14, 8, 10, 7,
    ]  # fmt: skip
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of the published splitmix64


@given(st.lists(st.integers(0, 2**63 - 1), max_size=5), seeds)
def test_array_and_integer_mixing_agree(values, seed):
    keys = mix_array(mix(seed), np.array(values, dtype=np.int64))
    assert keys.tolist() == [mix(seed, value) for value in values]


def test_unshuffled_order_is_as_stored():
    order = SampleOrder(np.array([2, 3]), seed=0, window=1, shuffle=False)
    assert order.indices(3, 9).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 30 * 900_000_000))
def test_any_position_of_900_million_samples_is_in_reach(position):
    order = SampleOrder(np.full(90_000, 10_000), seed=0, window=16)
    near = order.indices(position, 1000)
    assert len(set(near.tolist())) == 1000
    # At most two windows of 16 shards.
    assert len(set((near // 10_000).tolist())) <= 32


def test_only_the_recent_is_kept():
    order = SampleOrder(np.full(100, 5), seed=0, window=2)
    order.indices(0, 5000)
    assert len(order._windows) <= 3
    assert len(order._epochs) <= 2


@pytest.mark.parametrize(("shard_sizes", "window"), [([0, 0], 1), ([3], 0)])
def test_nothing_to_order_is_a_usage_error(shard_sizes, window):
    with pytest.raises(UsageError):
        SampleOrder(np.array(shard_sizes), seed=0, window=window)
