from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from unicl.errors import UniclError, UsageError
from unicl.evaluation.linear_probe import LinearProbe, fit, search
from unicl.evaluation.metrics import mean_average_precision, mean_per_class_accuracy, top_k_accuracy

CLASSES = 6


def draw(num_images: int = 400, dim: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features with a mean far from zero, and classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)).double()
    mixing *= torch.arange(1, dim + 1).double().pow(-0.5)
    targets = torch.randint(CLASSES, (num_images,), generator=generator)
    centres = 0.7 * torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(8))
    features = torch.randn(num_images, dim, generator=generator) + centres[targets]
    return features.double() @ mixing.T + 3, targets


def draw_table(num_images: int = 300) -> tuple[Tensor, Tensor]:
    features, _ = draw(num_images)
    generator = torch.Generator().manual_seed(3)
    weight = 0.5 * torch.randn(CLASSES, features.shape[1], generator=generator).double()
    noise = torch.randn(num_images, CLASSES, generator=generator)
    return features, (features - 3) @ weight.T + 2 * noise > 1


def objective(probe: LinearProbe, features: Tensor, targets: Tensor) -> float:
    logits = features.double() @ probe.weight.double().T + probe.bias.double()
    if targets.dtype == torch.bool:
        loss = binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum")
    else:
        loss = cross_entropy(logits, targets, reduction="sum")
    return float(0.5 * probe.weight.double().square().sum() + probe.strength * loss)


def scikit_learn(features: Tensor, targets: Tensor, strength: float) -> LinearProbe:
    """Converged as far as fp64 carries."""
    model = LogisticRegression(C=strength, tol=1e-10, solver="newton-cholesky", max_iter=1000)
    model.fit(features.numpy(), targets.numpy())
    weight, bias = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    return LinearProbe(weight=weight, bias=bias, strength=strength)


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0, 100.0])
def test_the_solution_is_that_of_scikit_learn(strength: float) -> None:
    features, targets = draw()
    (found,) = fit(features, targets, num_classes=CLASSES, strengths=[strength], tolerance=1e-14)
    expected = scikit_learn(features, targets, strength)
    scale = expected.weight.abs().max().item()
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5 * scale, rtol=0)
    # The softmax leaves a constant of the intercepts free.
    torch.testing.assert_close(
        found.bias - found.bias.mean(), expected.bias - expected.bias.mean(), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 1e4])
def test_single_precision_reaches_the_objective_at_any_scale(scale: float, strength: float) -> None:
    features, targets = draw(1500)
    features *= scale
    # The same problem at another scale: the weights shrink as the features grow.
    (found,) = fit(features.float(), targets, num_classes=CLASSES, strengths=[strength / scale**2])
    expected = scikit_learn(features, targets, strength / scale**2)
    reached, least = (objective(probe, features, targets) for probe in (found, expected))
    assert found.weight.dtype == torch.float32
    gap = (reached - least) / (found.strength * len(features))
    assert -1e-9 <= gap <= 1e-5  # nats per image, of a gain of more than one


def test_default_tolerance_is_no_worse_than_scikit_learns_default_on_digits() -> None:
    images, classes = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images, strengths = images.float(), [1e-6, 1e-4, 1e-2, 1.0]
    probes = fit(images[:1200], classes[:1200], num_classes=10, strengths=strengths)
    for probe in probes:
        model = LogisticRegression(C=probe.strength, max_iter=1000)
        model.fit(images[:1200].numpy(), classes[:1200].numpy())
        peer = LinearProbe(
            weight=torch.tensor(model.coef_),
            bias=torch.tensor(model.intercept_),
            strength=probe.strength,
        )
        own, other = (objective(side, images[:1200], classes[:1200]) for side in (probe, peer))
        assert own <= other * (1 + 1e-5)
        accuracy = model.score(images[1200:].numpy(), classes[1200:].numpy())
        found = top_k_accuracy(probe.scores(images[1200:]), classes[1200:])
        assert found == pytest.approx(accuracy, abs=0.004)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_many_labels_are_one_regression_each(strength: float) -> None:
    features, targets = draw_table()
    (found,) = fit(features, targets, num_classes=CLASSES, strengths=[strength], tolerance=1e-14)
    model = OneVsRestClassifier(
        LogisticRegression(C=strength, tol=1e-10, solver="newton-cholesky", max_iter=1000)
    )
    model.fit(features.numpy(), targets.numpy().astype(int))
    np.testing.assert_allclose(
        found.scores(features), model.decision_function(features.numpy()), atol=1e-4
    )


def test_fewer_images_than_dimensions() -> None:
    features, targets = draw(num_images=25, dim=200)
    (found,) = fit(features, targets, num_classes=CLASSES, strengths=[0.1], tolerance=1e-14)
    expected = scikit_learn(features, targets, 0.1)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-4)
    (again,) = fit(features, targets, num_classes=CLASSES, strengths=[0.1], start=[found])
    torch.testing.assert_close(again.weight, found.weight, atol=1e-4, rtol=1e-3)


def test_strengths_come_back_in_their_order_and_any_start_leads_there() -> None:
    features, targets = draw()
    strengths = [1.0, 1e-3, 0.1]
    options = {"num_classes": CLASSES, "strengths": strengths, "tolerance": 1e-14}
    probes = fit(features, targets, **options)
    assert [probe.strength for probe in probes] == strengths
    others = fit(features, targets, **options, start=probes[::-1])
    for one, other in zip(probes, others, strict=True):
        torch.testing.assert_close(one.weight, other.weight, atol=1e-5, rtol=1e-4)


def test_max_iterations_bounds_the_work() -> None:
    features, targets = draw()
    lowest = [
        objective(probe, features, targets)
        for count in (1, 3, 1000)
        for probe in fit(
            features, targets, num_classes=CLASSES, strengths=[1.0], max_iterations=count
        )
    ]
    assert lowest[0] > lowest[1] > lowest[2]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = draw(1000)
    (whole,) = fit(features, targets, num_classes=CLASSES, strengths=[0.1])
    monkeypatch.setattr("unicl.evaluation.linear_probe.solver._LOGITS_AT_ONCE", {"cpu": 1})
    (chunked,) = fit(features, targets, num_classes=CLASSES, strengths=[0.1])
    torch.testing.assert_close(chunked.weight, whole.weight)


def test_a_class_without_images_and_features_that_say_nothing() -> None:
    features, targets = draw()
    features[:, 0] = 5.0
    (found,) = fit(features, targets, num_classes=CLASSES + 1, strengths=[1.0])
    assert found.weight.shape == (CLASSES + 1, features.shape[1])
    assert (found.predict(features) < CLASSES).all()
    (found,) = fit(
        torch.ones(9, 4), torch.tensor([0] * 6 + [1] * 3), num_classes=2, strengths=[1.0]
    )
    assert found.predict(torch.ones(1, 4)).item() == 0
    assert found.weight.abs().max().item() < 1e-3


def test_search_halves_the_interval_around_the_peak() -> None:
    (features, targets), (val_features, val_targets) = draw(1500), draw(500, seed=1)
    found = search(features, targets, val_features, val_targets, num_classes=CLASSES)
    tried = {round(8 * np.log10(strength), 6): value for strength, value in found.curve.items()}
    assert list(found.curve) == sorted(found.curve)
    assert tried.keys() >= {-48, -32, -16, 0, 16, 32, 48}
    expected, step = {position: tried[position] for position in range(-48, 49, 16)}, 16
    while step > 1:
        step //= 2
        centre = min(expected, key=lambda position: (-expected[position], position))
        for position in (centre - step, centre + step):
            if abs(position) <= 48:
                expected[position] = tried[position]
    assert tried == expected
    assert found.metric == max(tried.values()) == found.curve[found.strength]
    assert found.probe.strength == found.strength
    # Each value is that of a probe fitted on the training images alone.
    for strength, value in found.curve.items():
        expected_probe = scikit_learn(features, targets, strength)
        accuracy = top_k_accuracy(expected_probe.scores(val_features), val_targets)
        assert value == pytest.approx(accuracy, abs=0.011)
    # The probe itself saw both.
    both = torch.cat([features, val_features]), torch.cat([targets, val_targets])
    expected_probe = scikit_learn(*both, found.strength)
    assert objective(found.probe, *both) <= objective(expected_probe, *both) * (1 + 1e-4)


def test_search_with_other_metrics() -> None:
    (features, targets), (val_features, val_targets) = draw(), draw(100, seed=1)
    found = search(
        features,
        targets,
        val_features,
        val_targets,
        num_classes=CLASSES,
        metric=mean_per_class_accuracy,
    )
    assert 0.5 < found.metric <= 1
    features, targets = draw_table()
    found = search(
        features[:200],
        targets[:200],
        features[200:],
        targets[200:],
        num_classes=CLASSES,
        metric=mean_average_precision,
    )
    assert 0.5 < found.metric <= 1


def test_search_up_to_the_ends_of_the_grid() -> None:
    (features, targets), (val_features, val_targets) = draw(60), draw(30, seed=1)
    for end, sign in {1e-6: 1, 1e6: -1}.items():
        found = search(
            features,
            targets,
            val_features,
            val_targets,
            num_classes=CLASSES,
            metric=lambda scores, _, sign=sign: -sign * scores.std(dim=0).mean().item(),
            max_iterations=20,
        )
        # What separates hardly changes any more where the penalty is all but gone.
        assert found.strength == pytest.approx(end, rel=1e-6 if end < 1 else 0.99)
        assert min(found.curve) == pytest.approx(1e-6)
        assert max(found.curve) == pytest.approx(1e6)


def test_a_saved_probe_is_the_same(tmp_path: Path) -> None:
    features, targets = draw()
    (probe,) = fit(features.float(), targets, num_classes=CLASSES, strengths=[0.1 + 0.2])
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    loaded = LinearProbe.load(path)
    assert loaded.strength == probe.strength
    assert loaded.names is None
    assert torch.equal(loaded.scores(features), probe.scores(features.float()))
    names = tuple(f"größe {number}" for number in range(CLASSES))
    LinearProbe(weight=probe.weight, bias=probe.bias, strength=1.0, names=names).save(path)
    assert LinearProbe.load(path).names == names


def test_files_that_are_no_probe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the probe .*none.safetensors"):
        LinearProbe.load(tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a probe")
    with pytest.raises(UniclError, match="is damaged"):
        LinearProbe.load(damaged)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    with pytest.raises(UsageError, match="holds no linear probe"):
        LinearProbe.load(other)


def test_a_probe_and_features_of_another_width() -> None:
    probe = LinearProbe(weight=torch.ones(2, 5), bias=torch.ones(2), strength=1.0)
    with pytest.raises(UsageError, match="features of width 5, these are 4 wide"):
        probe.predict(torch.ones(3, 4))


ONES = torch.ones(4, 3)
TWO = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("features", "targets", "strength", "message"),
    [
        (ONES, TWO[:3], 1.0, "4 features but 3 targets"),
        (ONES[:0], TWO[:0], 1.0, "there are no features"),
        (ONES[:, :0], TWO, 1.0, "there are no features"),
        (ONES / torch.tensor([1, 0, 1]), TWO, 1.0, "features of image 0 are not finite"),
        (ONES, TWO * 0 + 1, 1.0, "all targets are class 1"),
        (ONES, TWO + 1, 1.0, "class 2, but there are 2 classes"),
        (ONES, TWO - 1, 1.0, "class -1, but there are 2 classes"),
        (ONES, torch.ones(4, 3) > 0, 1.0, "a table of 3 classes, not of 2"),
        (ONES, torch.zeros(4, 2) > 0, 1.0, "no class is shown in the targets"),
        (ONES, TWO, 0.0, "a strength must be a positive number, got 0.0"),
    ],
)
def test_bad_input_is_one_line(
    features: Tensor, targets: Tensor, strength: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fit(features, targets, num_classes=2, strengths=[strength])
    assert "\n" not in str(caught.value)


def test_starts_and_splits_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="1 strengths but 0 probes to start from"):
        fit(ONES, TWO, num_classes=2, strengths=[1.0], start=[])
    with pytest.raises(UsageError, match="training features are 3 wide, the validation features 2"):
        search(ONES, TWO, ONES[:, :2], TWO, num_classes=2)
    with pytest.raises(UsageError, match="validation targets hold class 2"):
        search(ONES, TWO, ONES, TWO + 1, num_classes=2)
    with pytest.raises(UsageError, match=r"torch.int64, the validation targets torch.bool"):
        search(ONES, TWO, ONES, torch.ones(4, 2) > 0, num_classes=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same() -> None:
    features, targets = draw()
    options = {"num_classes": CLASSES, "strengths": [0.1], "tolerance": 1e-14}
    (expected,) = fit(features, targets, **options)
    (found,) = fit(features.cuda(), targets.cuda(), **options)
    assert found.weight.is_cuda
    torch.testing.assert_close(found.weight.cpu(), expected.weight, atol=1e-6, rtol=1e-5)
