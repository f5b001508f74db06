"""Embeddings and items to be searched."""

from collections.abc import Iterator

import numpy as np

from unicl.search.items import Item

MODEL = {"model": "cats-and-dogs", "fingerprint": "1f2e"}


def unit(count: int, dim: int = 16, *, seed: int = 0) -> np.ndarray:
    """Vectors of unit length around a few centres."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, dim))
    vectors = centres[generator.integers(20, size=count)]
    vectors = vectors + 0.5 * generator.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def item(number: int) -> Item:
    return Item(f"key{number}", f"photos/{number}.jpg", f"text {number}")


def blocks(
    vectors: np.ndarray, first: int = 0, size: int = 100
) -> Iterator[tuple[np.ndarray, list[Item]]]:
    """The rows of vectors from `first` on, with items numbered as the rows are."""
    for start in range(first, len(vectors), size):
        block = vectors[start : start + size]
        yield block, [item(start + row) for row in range(len(block))]


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows of the nearest vectors by brute force in fp64."""
    similarities = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return (-similarities).argsort(axis=1)[:, :k]
