"""The order of samples as a pure function of (seed, epoch, position), the same on any machine.

Shards are permuted per epoch, samples inside windows of a few consecutive shuffled shards, so that
reading stays nearly sequential. Keys come from integer mixing (splitmix64) and are sorted stably;
no random generator is involved whose stream could change between library versions.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt64

from unicl.errors import UsageError

Key = TypeVar("Key")
Value = TypeVar("Value")

_MASK = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# An epoch's keys are told from a window's, so that equal numbers do not give equal permutations.
_SHARD_KEYS = 1
_SAMPLE_KEYS = 2


def mix(*values: int) -> int:
    """Mix integers into one well-spread unsigned 64-bit integer (splitmix64, chained)."""
    state = 0
    for value in values:
        state = (state + value + _INCREMENT) & _MASK
        state = ((state ^ (state >> 30)) * _MULTIPLIERS[0]) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLIERS[1]) & _MASK
        state ^= state >> 31
    return state


def mix_array(state: int, values: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Mix many last integers at once: with state `mix(*first)`, `mix(*first, value)` of each."""
    keys = values.astype(np.uint64) + np.uint64((state + _INCREMENT) & _MASK)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return keys ^ (keys >> np.uint64(31))


class SampleOrder:
    """Which sample stands at which position of an endless stream of epochs.

    Any position is reached directly: the state of an epoch is one number per shard, that of a
    window one number per sample in it, and only the most recent few are kept.

    Args:
        shard_sizes: Number of samples in each shard.
        window: Number of consecutive shuffled shards whose samples are mixed with each other.
        shuffle: False gives the samples as they are stored, epoch after epoch.

    Raises:
        UsageError: There are no samples, or the window is not positive.
    """

    def __init__(
        self,
        shard_sizes: Int64[np.ndarray, " shards"],
        *,
        seed: int,
        window: int,
        shuffle: bool = True,
    ) -> None:
        if window < 1:
            raise UsageError(f"data.shuffle_window must be positive, got {window}")
        if shard_sizes.sum() == 0:
            raise UsageError("the data set has no samples: prepare it again with `unicl prepare`")
        self.num_samples = int(shard_sizes.sum())
        self._sizes = shard_sizes
        self._starts = np.cumsum(shard_sizes) - shard_sizes
        self._seed = seed
        self._window = window
        self._shuffle = shuffle
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def indices(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Return the data set's indices at stream positions start, ..., start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative, got {start} and {count}")
        runs: list[np.ndarray] = []
        position, end = start, start + count
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            run = self._run(epoch, offset, end - position)
            runs.append(run)
            position += len(run)
        return np.concatenate(runs) if runs else np.empty(0, np.int64)

    def _run(self, epoch: int, offset: int, most: int) -> Int64[np.ndarray, " count"]:
        """Return at most `most` indices from an offset in an epoch, up to the window's end."""
        if not self._shuffle:
            return np.arange(offset, min(offset + most, self.num_samples), dtype=np.int64)
        shards, window_starts = _recent(self._epochs, epoch, 2, lambda: self._shuffle_shards(epoch))
        # "right" passes over windows of empty shards, which begin where their successor begins.
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        order = _recent(
            self._windows, (epoch, window), 3, lambda: self._shuffle_window(epoch, window, shards)
        )
        offset -= int(window_starts[window])
        return order[offset : offset + most]

    def _shuffle_shards(
        self, epoch: int
    ) -> tuple[Int64[np.ndarray, " shards"], Int64[np.ndarray, " windows"]]:
        """Return an epoch's shard permutation and the offset where each of its windows begins."""
        keys = mix_array(mix(self._seed, epoch, _SHARD_KEYS), np.arange(len(self._sizes)))
        shards = np.argsort(keys, kind="stable")
        sizes = self._sizes[shards]
        return shards, (np.cumsum(sizes) - sizes)[:: self._window]

    def _shuffle_window(
        self, epoch: int, window: int, shards: Int64[np.ndarray, " shards"]
    ) -> Int64[np.ndarray, " samples"]:
        """Return the permuted indices of all samples in one window of an epoch."""
        members = shards[window * self._window : (window + 1) * self._window]
        indices = np.concatenate(
            [np.arange(size, dtype=np.int64) + start
             for start, size in zip(self._starts[members], self._sizes[members], strict=True)]
        )  # fmt: skip
        keys = mix_array(mix(self._seed, epoch, _SAMPLE_KEYS), indices)
        return indices[np.argsort(keys, kind="stable")]


def _recent(cache: dict[Key, Value], key: Key, capacity: int, make: Callable[[], Value]) -> Value:
    """Return cache[key], made on demand; the oldest entry leaves when the cache is full."""
    if key not in cache:
        while len(cache) >= capacity:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
