"""How fast is the linear probe's search beside scikit-learn over the same regularisations?

The features are drawn, and meant to be as awkward as embeddings are: the variances of their
directions fall as 1/j, so that a few directions hold most of it; the directions lie across the
coordinates; the mean is far from zero; the norm is near 10, as that of CLIP's raw features. Classes
come in groups of five that share a part of their centres and overlap, each class as wide as it
likes and each image as far out as it likes, and one label in twenty is wrong. The table of
other features has the same without correlation, at unit norm, and scikit-learn's digits.

scikit-learn fits every C that our search visited, once and from zero, in fp32 (for it the faster
type), then training and validation images together with our C; its own stopping rule, the default,
bounds the largest gradient and leaves weak penalties unfinished, which the table shows as our
objective over its.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness import Skipped
from benchmarks.record import Bar, Result
from unicl.evaluation.linear_probe import LinearProbe, Search, search
from unicl.evaluation.metrics import top_k_accuracy


@dataclass(frozen=True)
class _Task:
    """Images of three splits."""

    features: Tensor
    targets: Tensor
    sizes: tuple[int, int, int]
    """Training, validation and test images."""

    @property
    def num_classes(self) -> int:
        return int(self.targets.max()) + 1

    def split(self, number: int) -> tuple[Tensor, Tensor]:
        return self.features.split(self.sizes)[number], self.targets.split(self.sizes)[number]

    def both(self) -> tuple[Tensor, Tensor]:
        """Training and validation images."""
        count = sum(self.sizes[:2])
        return self.features[:count], self.targets[:count]


@dataclass(frozen=True)
class _Peer:
    """scikit-learn's fit."""

    probe: LinearProbe
    iterations: int
    seconds: float


def measure(*, quick: bool) -> Result:
    """Time both searches on the large task, and on small ones of other kinds."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise Skipped("it needs scikit-learn: pip install scikit-learn") from error
    size = (600, 200, 200, 32, 10) if quick else (10_000, 2_000, 2_000, 256, 50)
    others = {
        "isotropic": draw(*size, decay=0.0, spread=0.25),
        "unit norm": draw(*size, norm=1.0),
        "digits": _digits(),
    }
    rows = [_summary(name, task, *_sides(task)) for name, task in others.items()]
    task = draw(*((2_000, 500, 500, 64, 20) if quick else (50_000, 10_000, 10_000, 512, 100)))
    found, seconds, peers, refitted = _sides(task)
    peer_seconds = sum(peer.seconds for peer in peers.values()) + refitted.seconds
    test, classes = task.split(2)
    own, other = (
        100 * top_k_accuracy(probe.scores(test), classes) for probe in (found.probe, refitted.probe)
    )
    excess = _excess(task, found.probe, refitted.probe)
    count, dim = task.split(0)[0].shape
    return Result(
        bars=[
            Bar(
                f"linear probe with search, {count:,} x {dim}, {task.num_classes} classes, "
                "scikit-learn's time over ours",
                peer_seconds / seconds,
                10.0,
                "x",
                "at least",
            ),
            Bar(
                "its test accuracy against scikit-learn's at the chosen C, difference",
                abs(own - other),
                0.2,
                "points",
                "at most",
            ),
            Bar(
                "its objective above scikit-learn's there",
                1e6 * excess,
                1.0,
                "ppm",
                "at most",
            ),
        ],
        tables={
            "Every C that the search visited": _curve(task, found, peers),
            "Other features": rows,
        },
        facts={
            "seconds": seconds,
            "scikit_learn_seconds": peer_seconds,
            "chosen_C": found.strength,
            "test_accuracy": own,
            "scikit_learn_test_accuracy": other,
            "validation_images": task.sizes[1],
            "rounds": "one; scikit-learn's takes minutes",
        },
    )


def draw(
    num_train: int,
    num_validation: int,
    num_test: int,
    dim: int,
    num_classes: int,
    *,
    decay: float = 1.0,
    spread: float = 0.27,
    wrong: float = 0.05,
    norm: float = 10.0,
) -> _Task:
    """Draw features as the top of this file says.

    Args:
        num_train: training images.
        num_validation: validation images.
        num_test: test images.
        dim: width of the features.
        num_classes: classes, in groups of five.
        decay: direction j of the features has variance j to the minus this.
        spread: how far the classes' centres lie apart, in standard deviations.
        wrong: share of images with a class drawn at random.
        norm: of a typical feature.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = num_train + num_validation + num_test
    deviations = torch.arange(1, dim + 1).float().pow(-decay / 2)
    deviations /= deviations.square().sum().sqrt()
    groups = normal(-(-num_classes // 5), dim).repeat_interleave(5, dim=0)[:num_classes]
    centres = spread * (groups + normal(num_classes, dim)) / 2**0.5
    widths = torch.exp(0.25 * normal(num_classes))
    targets = torch.randint(num_classes, (count,), generator=generator)
    features = normal(count, dim) * (widths[targets] * torch.exp(0.3 * normal(count)))[:, None]
    features += centres[targets]
    features *= deviations
    features = features @ torch.linalg.qr(normal(dim, dim)).Q + 0.7 * normal(dim) / dim**0.5
    drawn = torch.randint(num_classes, (count,), generator=generator)
    targets = torch.where(torch.rand(count, generator=generator) < wrong, drawn, targets)
    return _Task(norm * features, targets, (num_train, num_validation, num_test))


def objective(probe: LinearProbe, features: Tensor, targets: Tensor) -> float:
    """What both sides minimise, in fp64."""
    loss = sum(
        float(cross_entropy(probe.scores(rows.double()), chosen, reduction="sum"))
        for rows, chosen in zip(features.split(8192), targets.split(8192), strict=True)
    )
    return float(probe.weight.double().square().sum()) / 2 + probe.strength * loss


def _excess(task: _Task, own: LinearProbe, peer: LinearProbe) -> float:
    return objective(own, *task.both()) / objective(peer, *task.both()) - 1


def _digits() -> _Task:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    features, targets = torch.tensor(images).float()[order], torch.tensor(classes)[order]
    return _Task(features, targets, (1000, 397, 400))


def _sides(task: _Task) -> tuple[Search, float, dict[float, _Peer], _Peer]:
    """Our search, and scikit-learn's fits of what it visited and of what it chose."""
    start = time.perf_counter()
    found = search(*task.split(0), *task.split(1), num_classes=task.num_classes)
    seconds = time.perf_counter() - start
    peers = {strength: _peer(*task.split(0), strength) for strength in found.curve}
    return found, seconds, peers, _peer(*task.both(), found.strength)


def _peer(features: Tensor, targets: Tensor, strength: float) -> _Peer:
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(C=strength, max_iter=1000)
    start = time.perf_counter()
    model.fit(features.numpy(), targets.numpy())
    seconds = time.perf_counter() - start
    weight, bias = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    probe = LinearProbe(weight=weight, bias=bias, strength=strength)
    return _Peer(probe, int(model.n_iter_[0]), seconds)


def _curve(task: _Task, found: Search, peers: dict[float, _Peer]) -> list[dict[str, object]]:
    validation, classes = task.split(1)
    return [
        {
            "C": f"{strength:.3g}",
            "validation": 100 * metric,
            "scikit_learn": 100 * top_k_accuracy(peer.probe.scores(validation), classes),
            "its_iterations": peer.iterations,
            "its_seconds": peer.seconds,
        }
        for (strength, metric), peer in zip(found.curve.items(), peers.values(), strict=True)
    ]


def _summary(
    name: str, task: _Task, found: Search, seconds: float, peers: dict[float, _Peer], peer: _Peer
) -> dict[str, object]:
    test, classes = task.split(2)
    count, dim = task.split(0)[0].shape
    return {
        "features": name,
        "size": f"{count:,} x {dim}, {task.num_classes} classes",
        "ratio": (sum(side.seconds for side in peers.values()) + peer.seconds) / seconds,
        "seconds": seconds,
        "chosen_C": f"{found.strength:.3g}",
        "accuracy": 100 * top_k_accuracy(found.probe.scores(test), classes),
        "scikit_learn": 100 * top_k_accuracy(peer.probe.scores(test), classes),
        "objective_above": f"{_excess(task, found.probe, peer.probe):+.0e}",
    }
