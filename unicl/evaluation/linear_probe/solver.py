"""Logistic regression of the same images for one regularisation after another.

Full-batch L-BFGS, whose first guess of the inverse Hessian is a Kronecker product. The Hessian is a
mean over images of (covariance of the predicted class) x (features' outer product); the product of
the two means is close to it, follows the features whatever their scale and correlation, and is
inverted for every C by the same two small eigendecompositions. Several C are solved as a path, each
from the solution before it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from unicl.errors import UsageError
from unicl.evaluation.linear_probe.features import Features, Targets, check
from unicl.evaluation.linear_probe.probe import LinearProbe

# Logits that exist at one time. Fewer would fit a CPU's nearest cache, but its threads wait for
# each other after every chunk, which costs more where they share the machine.
_LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}

# Pairs of steps and gradient differences that L-BFGS remembers.
_MEMORY = 20

_MOST_TRIALS = 12


def fit(
    features: Features,
    targets: Targets,
    *,
    num_classes: int,
    strengths: Sequence[float],
    start: Sequence[LinearProbe] | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> list[LinearProbe]:
    """Fit one probe per strength; several are solved as a path, the strongest penalty first.

    Args:
        features: of any scale; computed in fp64 if they are, else in fp32.
        targets: one class per image, or a table of which classes an image shows.
        num_classes: classes to choose from; some may have no image.
        strengths: C of the objective.
        start: where to begin, one probe per strength; None begins with zeros, then each C with
            the solution of the next smaller one.
        max_iterations: L-BFGS iterations per strength, as CLIP's 1000.
        tolerance: a fit ends when the next step is expected to lower the objective by less than
            this share of what was gained over a probe without weights. It does not depend on the
            scale of the features, unlike scikit-learn's bound on the largest gradient.

    Returns:
        The probes, in the order of the strengths.

    Raises:
        UsageError: features and targets do not fit each other or the number of classes, are empty,
            not finite, or show one class only; a strength is not positive.
    """
    check(features, targets, num_classes)
    for strength in strengths:
        if not (strength > 0 and math.isfinite(strength)):
            raise UsageError(f"a strength must be a positive number, got {strength}")
    if start is not None and len(start) != len(strengths):
        raise UsageError(f"{len(strengths)} strengths but {len(start)} probes to start from")
    solver = Solver([(features, targets)], num_classes, max_iterations, tolerance)
    probes: dict[int, LinearProbe] = {}
    before = None
    for number in sorted(range(len(strengths)), key=lambda number: strengths[number]):
        before = solver.solve(strengths[number], before if start is None else start[number])
        probes[number] = before
    return [probes[number] for number in range(len(strengths))]


class _Value(NamedTuple):
    """Mean objective per image at some parameters, and its gradient."""

    objective: float
    gradient: Tensor
    classes: Tensor | None
    """Mean over the images of the covariance of the predicted class, where it was asked for."""


class Solver:
    """Solves the same images for one C after another.

    Parameters are one tensor [num_classes, dim + 1], the intercept last. The intercept belongs to
    features from which their mean was taken, so that it and the weights hardly influence each
    other; `solve` takes and gives back probes of the features as they are.

    Args:
        splits: features and targets; several splits count as one.
        num_classes: classes to choose from.
        max_iterations: L-BFGS iterations per C.
        tolerance: share of the gain below which a step is not worth taking.
    """

    def __init__(
        self,
        splits: Sequence[tuple[Tensor, Tensor]],
        num_classes: int,
        max_iterations: int,
        tolerance: float,
    ) -> None:
        first = splits[0][0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.splits = [
            (features.to(dtype), targets if targets.dtype == torch.bool else targets.long())
            for features, targets in splits
        ]
        self.num_classes = num_classes
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.num_images = sum(len(features) for features, _ in splits)
        self.multi_label = splits[0][1].dtype == torch.bool
        sums = torch.stack([features.sum(dim=0) for features, _ in self.splits])
        self.origin = self.mean = sums.sum(dim=0) / self.num_images
        self.span = self._shrink() if self.num_images < first.shape[1] else None
        self.num_evaluations = 0
        self._eigen()
        self.null_objective = self._null_objective()

    def solve(self, strength: float, start: LinearProbe | None = None) -> LinearProbe:
        """Minimise the objective for one C."""
        penalty = 1 / (strength * self.num_images)
        parameters = self._minimise(self._enter(start), penalty)
        return self._leave(parameters, strength)

    def _shrink(self) -> Tensor:
        """Replace few wide features by their coordinates in the space that they span.

        Weights outside of it change no logit and cost a penalty, so no solution has them.
        """
        whole = torch.cat([features for features, _ in self.splits]) - self.origin
        span = torch.linalg.svd(whole, full_matrices=False).Vh
        self.splits = [((rows - self.origin) @ span.T, targets) for rows, targets in self.splits]
        self.mean = torch.zeros_like(span[:, 0])
        return span

    def _enter(self, probe: LinearProbe | None) -> Tensor:
        if probe is None:
            return self.mean.new_zeros(self.num_classes, len(self.mean) + 1)
        weight, bias = probe.weight.to(self.mean), probe.bias.to(self.mean)
        inner = weight if self.span is None else weight @ self.span.T
        return torch.cat([inner, (bias + weight @ self.origin)[:, None]], dim=1)

    def _leave(self, parameters: Tensor, strength: float) -> LinearProbe:
        inner, bias = parameters[:, :-1], parameters[:, -1]
        weight = inner.contiguous() if self.span is None else inner @ self.span
        return LinearProbe(weight=weight, bias=bias - weight @ self.origin, strength=strength)

    def _eigen(self) -> None:
        """Eigenvalues and vectors of the features' covariance."""
        covariance = self.mean.new_zeros(len(self.mean), len(self.mean))
        for features, _ in self.splits:
            for rows in features.split(8192):
                centred = rows - self.mean
                covariance.addmm_(centred.T, centred)
        self.variances, self.axes = torch.linalg.eigh(covariance / self.num_images)
        self.variances.clamp_(min=0)

    def _null_objective(self) -> float:
        """The least that a probe without weights reaches: what the classes' shares allow."""
        if self.multi_label:
            counts = torch.stack([targets.sum(dim=0) for _, targets in self.splits]).sum(dim=0)
            shares = counts.double() / self.num_images
            return float(-(torch.xlogy(shares, shares) + torch.xlogy(1 - shares, 1 - shares)).sum())
        shares = torch.cat([targets for _, targets in self.splits]).bincount() / self.num_images
        return float(-torch.xlogy(shares.double(), shares.double()).sum())

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        at_once = _LOGITS_AT_ONCE.get(self.mean.device.type, 1 << 21)
        size = max(256, at_once // self.num_classes)
        for features, targets in self.splits:
            yield from zip(features.split(size), targets.split(size), strict=True)

    def _evaluate(self, parameters: Tensor, penalty: float, *, curvature: bool = False) -> _Value:
        """Objective and gradient, the features read once for both."""
        self.num_evaluations += 1
        weight = parameters[:, :-1]
        bias = parameters[:, -1] - weight @ self.mean
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        gradient = torch.zeros_like(parameters)
        slopes = torch.zeros_like(weight)
        classes = weight.new_zeros(self.num_classes, self.num_classes) if curvature else None
        residual_of = _sigmoid_residual if self.multi_label else _softmax_residual
        for features, targets in self._chunks():
            logits = torch.addmm(bias, features, weight.T)
            loss, residual = residual_of(logits, targets, classes)
            total += loss
            slopes.addmm_(residual.T, features)
            gradient[:, -1] += residual.sum(dim=0)
        # What the features' mean would have added, had it not been taken from them.
        slopes.addr_(gradient[:, -1], self.mean, alpha=-1)
        gradient[:, :-1] = slopes
        gradient /= self.num_images
        gradient[:, :-1] += penalty * weight
        objective = total / self.num_images + penalty / 2 * weight.double().square().sum()
        return _Value(
            float(objective), gradient, None if classes is None else classes / self.num_images
        )

    def _inverse_hessian(self, classes: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
        """The Kronecker-factored guess of the inverse Hessian, as a function of a gradient."""
        values, vectors = torch.linalg.eigh(classes)
        values.clamp_(min=float(values[-1]) * 1e-4 + torch.finfo(values.dtype).tiny)
        scale = torch.empty(len(values), len(self.variances) + 1).to(values)
        scale[:, :-1] = 1 / (values[:, None] * self.variances + penalty)
        scale[:, -1] = 1 / values

        def apply(gradient: Tensor) -> Tensor:
            turned = vectors.T @ gradient
            turned[:, :-1] = turned[:, :-1] @ self.axes
            turned *= scale
            turned[:, :-1] = turned[:, :-1] @ self.axes.T
            return vectors @ turned

        return apply

    def _minimise(self, parameters: Tensor, penalty: float) -> Tensor:
        noise = torch.finfo(parameters.dtype).eps
        now = self._evaluate(parameters, penalty, curvature=True)
        assert now.classes is not None
        guess = self._inverse_hessian(now.classes, penalty)
        pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
        for iteration in range(self.max_iterations):
            direction = -_two_loops(now.gradient, pairs, guess)
            slope = _dot(now.gradient, direction)
            gain = max(0.0, self.null_objective - now.objective)
            # The first step is always worth taking: with small features all that there is to gain
            # can drown in rounding.
            floor = noise * now.objective if iteration else 0.0
            if self._arrived(parameters, now.gradient, slope, gain, floor):
                break
            step = self._line_search(parameters, direction, slope, now, penalty)
            if step is None:
                break
            length, value = step
            change, difference = length * direction, value.gradient - now.gradient
            product = _dot(change, difference)
            if product > 0:
                pairs.append((change, difference, product))
            parameters, now = parameters + change, value
        return parameters

    def _arrived(
        self, parameters: Tensor, gradient: Tensor, slope: float, gain: float, floor: float
    ) -> bool:
        """Whether neither the next step nor larger weights promise enough."""
        # A quadratic's minimum lies half the slope below.
        if -slope / 2 > max(self.tolerance * gain, floor):
            return False
        # Where classes separate, the objective falls ever more slowly as the weights grow, and each
        # step looks small. Growing all weights at once shows it; what that promises is of first
        # order in the distance from the solution, the step's promise of second.
        growth = abs(_dot(gradient[:, :-1], parameters[:, :-1]))
        return growth <= max(math.sqrt(self.tolerance) * gain, floor)

    def _line_search(
        self, parameters: Tensor, direction: Tensor, slope: float, now: _Value, penalty: float
    ) -> tuple[float, _Value] | None:
        """Shorten a step until the objective falls as far as the slope promises, up to rounding."""
        allowed = 4 * torch.finfo(parameters.dtype).eps * abs(now.objective)
        length = 1.0
        for _ in range(_MOST_TRIALS):
            value = self._evaluate(parameters + length * direction, penalty)
            rise = value.objective - now.objective
            if rise <= 1e-4 * length * slope + allowed:
                return length, value
            # Minimum of the parabola through both objectives and the slope.
            parabola = -slope * length**2 / (2 * (rise - slope * length))
            length = min(max(parabola, 0.1 * length), 0.5 * length)
        return None


def _two_loops(
    gradient: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor, float]],
    guess: Callable[[Tensor], Tensor],
) -> Tensor:
    """L-BFGS: apply the inverse Hessian that the remembered pairs make of the first guess."""
    direction = gradient.clone()
    shares = []
    for change, difference, product in reversed(pairs):
        share = _dot(change, direction) / product
        direction.sub_(difference, alpha=share)
        shares.append(share)
    direction = guess(direction)
    if pairs:
        # The guess is scaled to the curvature along the last step, as L-BFGS scales an identity.
        _, difference, product = pairs[-1]
        direction *= product / _dot(difference, guess(difference))
    for (change, difference, product), share in zip(pairs, reversed(shares), strict=True):
        direction.add_(change, alpha=share - _dot(difference, direction) / product)
    return direction


def _softmax_residual(
    logits: Tensor, targets: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and its gradient by the logits, which takes their place in memory."""
    log_shares = torch.log_softmax(logits, dim=1)
    loss = -log_shares.gather(1, targets[:, None]).sum(dtype=torch.float64)
    shares = log_shares.exp_()
    if classes is not None:
        classes.diagonal().add_(shares.sum(dim=0))
        classes.addmm_(shares.T, shares, alpha=-1)
    minus_one = shares.new_full((1, 1), -1.0).expand(len(shares), 1)
    return loss, shares.scatter_add_(1, targets[:, None], minus_one)


def _sigmoid_residual(
    logits: Tensor, targets: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for one binary decision per class."""
    loss = (softplus(logits) - logits * targets).sum(dtype=torch.float64)
    shares = logits.sigmoid()
    if classes is not None:
        classes.diagonal().add_((shares * (1 - shares)).sum(dim=0))
    return loss, shares.sub_(targets.to(shares.dtype))


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.reshape(-1), second.reshape(-1)))
