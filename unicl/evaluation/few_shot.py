"""Few-shot episodes (Florence 3.4; CD-FSL, Guo et al. 2020): a linear head on a handful of images.

The image tower stays as it is, so that an episode costs a product of its features; the paper tunes
it too. All else is the paper's: SGD, 100 epochs, momentum 0.99, dropout, mirrored images.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from unicl.data.order import mix
from unicl.errors import UsageError

# What the paper prints (3.4), and, where it is silent, the batch of CD-FSL's own code.
_EPOCHS = 100
_BATCH = 4
_LEARNING_RATE = 0.01
_MOMENTUM = 0.99
_DROPOUT = 0.5
_QUERIES = 15
# Numbers in the heads that learn side by side: enough to keep the device busy with each step.
_NUMBERS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Episodes:
    """Which images each episode learns from and is asked about; classes are numbered anew."""

    support: Int64[np.ndarray, "num_episodes way shot"]
    """Rows of the images to learn from, class by class."""
    query: Int64[np.ndarray, "num_episodes way num_queries"]
    """Rows of the images to name."""


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy over the episodes."""

    accuracies: Float[Tensor, " num_episodes"]
    """Share of each episode's queries that are named right, in 0..1."""

    @property
    def mean(self) -> float:
        """Mean over the episodes."""
        return self.accuracies.mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """The mean's 95% confidence interval, as CD-FSL reports it."""
        half = 1.96 * self.accuracies.std(correction=0).item() / math.sqrt(len(self.accuracies))
        return self.mean - half, self.mean + half


def draw_episodes(
    targets: Int64[np.ndarray, " num_images"],
    *,
    shot: int,
    way: int = 5,
    num_episodes: int = 600,
    seed: int = 0,
) -> Episodes:
    """Draw classes, and images of each, all different inside an episode.

    Args:
        targets: class of each image.
        shot: images to learn from per class; 15 more are asked about.
        way: classes of an episode.
        num_episodes: how many.
        seed: decides all of it.

    Raises:
        UsageError: too few classes have enough images.
    """
    needed = shot + _QUERIES
    numbers, counts = np.unique(targets, return_counts=True)
    large = numbers[counts >= needed]
    if len(large) < way:
        raise UsageError(
            f"{shot} shots take {way} classes of at least {needed} samples each ({_QUERIES} of "
            f"them to be asked about); of the set's {len(numbers)} classes {len(large)} have so "
            "many"
        )
    rows_of = {int(number): np.flatnonzero(targets == number) for number in large}
    drawn = np.empty((num_episodes, way, needed), np.int64)
    for episode in range(num_episodes):
        generator = np.random.default_rng(mix(seed, shot, episode))
        for place, number in enumerate(generator.choice(large, way, replace=False)):
            drawn[episode, place] = generator.choice(rows_of[int(number)], needed, replace=False)
    return Episodes(support=drawn[..., :shot], query=drawn[..., shot:])


def few_shot(
    features: Float[Tensor, "views num_images width"],
    episodes: Episodes,
    *,
    seed: int = 0,
) -> FewShotResult:
    """Train a linear head for each episode, and ask it.

    Args:
        features: of each image as it is, and mirrored if there are two views: one of them is drawn
            for each image of a batch; logits are averaged over the views when asked.
        episodes: which images to learn from and which to name.
        seed: decides initial heads, batches, views and dropout.
    """
    numbers = features.shape[2] * episodes.support.shape[1]
    at_once = max(1, _NUMBERS_AT_ONCE[features.device.type] // numbers)
    accuracies = [
        _train_and_ask(
            features,
            torch.from_numpy(episodes.support[start : start + at_once]),
            torch.from_numpy(episodes.query[start : start + at_once]),
            torch.Generator(features.device).manual_seed(mix(seed, start) % 2**63),
        )
        for start in range(0, len(episodes.support), at_once)
    ]
    return FewShotResult(torch.cat(accuracies))


def _train_and_ask(
    features: Float[Tensor, "views num_images width"],
    support: Int[Tensor, "episodes way shot"],
    query: Int[Tensor, "episodes way num_queries"],
    generator: torch.Generator,
) -> Float[Tensor, " episodes"]:
    count, way, shot = support.shape
    num_views, _, width = features.shape
    bound = width**-0.5  # as torch's Linear begins
    weight = _uniform((count, width, way), bound, generator)
    bias = _uniform((count, 1, way), bound, generator)
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    rows = support.flatten(1).to(features.device)
    labels = torch.arange(way, device=features.device).repeat_interleave(shot)
    episode = torch.arange(count, device=features.device)[:, None]
    for _ in range(_EPOCHS):
        # Another order of the images in each episode.
        order = torch.rand(rows.shape, generator=generator, device=rows.device).argsort(dim=1)
        for chosen in order.split(_BATCH, dim=1):
            view = torch.randint(num_views, chosen.shape, generator=generator, device=rows.device)
            x = _dropout(features[view, rows[episode, chosen]], generator)
            # The gradient of the mean cross-entropy, and torch's SGD: autograd and an optimizer
            # would take three times as long for so little arithmetic.
            gradient = (x @ weight + bias).softmax(dim=2) - one_hot(labels[chosen], way)
            gradient /= chosen.shape[1]
            weight_step.mul_(_MOMENTUM).baddbmm_(x.mT, gradient)
            bias_step.mul_(_MOMENTUM).add_(gradient.sum(dim=1, keepdim=True))
            weight.add_(weight_step, alpha=-_LEARNING_RATE)
            bias.add_(bias_step, alpha=-_LEARNING_RATE)
    asked = features[:, query.flatten(1).to(features.device)].mean(dim=0)
    truth = torch.arange(way, device=features.device).repeat_interleave(query.shape[2])
    return ((asked @ weight + bias).argmax(dim=2) == truth).float().mean(dim=1).cpu()


def _dropout(x: Tensor, generator: torch.Generator) -> Tensor:
    # torch's own takes no generator, and the global one would tie episodes to what ran before.
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= _DROPOUT
    return x * kept / (1 - _DROPOUT)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    values = torch.rand(shape, generator=generator, device=generator.device)
    return (2 * values - 1) * bound
