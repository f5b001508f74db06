import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from adapters.detection import deformable
from adapters.detection.deformable import Sampling, deform_conv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _inputs(n, size, stride, *, dtype=torch.float64, far=3.0, map_size=None, channels=5, out=7):
    """Offsets reach out of the map on all sides."""
    places = [-(-side // stride) for side in size]
    tensors = {
        "x": torch.randn(n, channels, *(map_size or size)),
        "offset": far * torch.randn(n, 18, *places),
        "mask": torch.rand(n, 9, *places),
        "weight": torch.randn(out, channels, 3, 3),
        "bias": torch.randn(out),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def _assert_equal_with_gradients(own, expected, inputs, tolerance):
    torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    for name, ours, theirs in zip(
        inputs,
        torch.autograd.grad(own, list(inputs.values()), gradient),
        torch.autograd.grad(expected, list(inputs.values()), gradient),
        strict=True,
    ):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance * max(1, scale), msg=name
        )


def _peer(x, offset, mask, weight, bias, stride=1):
    return deform_conv2d(x, offset, weight, bias, stride=stride, padding=1, mask=mask)


def _by_hand(x, offset, mask, weight, bias, stride):
    """Plain loops over places, taps and the four pixels around a sample, of one image."""
    (_, height, width), (_, rows, columns) = x.shape, mask.shape
    out = bias[:, None, None].repeat(1, rows, columns)
    for row in range(rows):
        for column in range(columns):
            for tap in range(9):
                y = row * stride + tap // 3 - 1 + offset[2 * tap, row, column].item()
                z = column * stride + tap % 3 - 1 + offset[2 * tap + 1, row, column].item()
                for i in (math.floor(y), math.floor(y) + 1):
                    for j in (math.floor(z), math.floor(z) + 1):
                        if 0 <= i < height and 0 <= j < width:
                            part = (1 - abs(y - i)) * (1 - abs(z - j)) * mask[tap, row, column]
                            kernel = weight[:, :, tap // 3, tap % 3]
                            out[:, row, column] += part * (kernel @ x[:, i, j])
    return out


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 7), (6, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_is_torchvisions_with_its_gradients(size, stride, dtype, tolerance):
    inputs = _inputs(2, size, stride, dtype=dtype)
    own = deform_conv(**inputs, stride=stride)
    _assert_equal_with_gradients(own, _peer(**inputs, stride=stride), inputs, tolerance)


@pytest.mark.parametrize("stride", [1, 2])
def test_is_the_sum_written_as_loops(stride):
    inputs = {name: each.detach() for name, each in _inputs(2, (5, 4), stride).items()}
    own = deform_conv(**inputs, stride=stride)
    for index, image in enumerate(own):
        each = {name: inputs[name][index] for name in ("x", "offset", "mask")}
        expected = _by_hand(**each, weight=inputs["weight"], bias=inputs["bias"], stride=stride)
        torch.testing.assert_close(image, expected)


def test_without_offsets_it_is_a_convolution():
    inputs = _inputs(2, (6, 5), 1, far=0)
    inputs["mask"] = torch.ones_like(inputs["mask"])
    expected = F.conv2d(inputs["x"], inputs["weight"], inputs["bias"], padding=1)
    torch.testing.assert_close(deform_conv(**inputs), expected)


@pytest.mark.parametrize("map_size", [(1, 1), (4, 4), (4, 3), (7, 6), (6, 6)])
def test_a_map_of_another_size_is_resized_first(map_size):
    """Whether its products are sampled, or its samples multiplied."""
    inputs = _inputs(2, (7, 6), 1, map_size=map_size)
    own = Sampling(inputs["offset"], inputs["mask"], size=(7, 6)).conv(
        inputs["x"], inputs["weight"], inputs["bias"]
    )
    resized = F.interpolate(inputs["x"], size=(7, 6), mode="bilinear", align_corners=True)
    expected = _peer(**{**inputs, "x": resized})
    _assert_equal_with_gradients(own, expected, inputs, 1e-10)


@pytest.mark.parametrize("map_size", [(4, 5), (2, 3)])
@pytest.mark.parametrize("most", [1, 45, 60, 199])
def test_images_and_taps_in_several_parts_are_as_in_one(map_size, most, monkeypatch):
    """One image and tap at a time; two and one; one and three; nine images, but three taps."""
    inputs = _inputs(5, (4, 5), 1, map_size=map_size)

    def convolved():
        sampling = Sampling(inputs["offset"], inputs["mask"], size=(4, 5))
        return sampling.conv(inputs["x"], inputs["weight"], inputs["bias"])

    whole = convolved()
    monkeypatch.setattr(deformable, "_MOST_SAMPLES", most)
    _assert_equal_with_gradients(convolved(), whole, inputs, 1e-12)


@pytest.mark.parametrize("map_size", [(2, 3), (1, 2)])
def test_gradcheck(map_size):
    inputs = _inputs(1, (2, 3), 1, far=0.4, map_size=map_size, channels=1, out=1)

    def convolved(x, offset, mask, weight, bias):
        return Sampling(offset, mask, size=(2, 3)).conv(x, weight, bias)

    assert torch.autograd.gradcheck(convolved, tuple(inputs.values()))


def test_no_images():
    inputs = _inputs(0, (4, 6), 2)
    out = deform_conv(**inputs, stride=2)
    assert out.shape == (0, 7, 2, 3)
    gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(torch.equal(each, torch.zeros_like(each)) for each in gradients)


def test_without_a_graph():
    inputs = _inputs(2, (5, 7), 1)
    expected = deform_conv(**inputs)
    with torch.no_grad():
        assert torch.equal(deform_conv(**inputs), expected)
    with torch.inference_mode():
        assert torch.equal(deform_conv(**inputs), expected)


def test_far_outside_is_zero_and_no_number_stays_one():
    inputs = {name: each.detach() for name, each in _inputs(1, (3, 3), 1).items()}
    for far in (1e4, -1e30, math.inf):
        inputs["offset"] = torch.full_like(inputs["offset"], far)
        if math.isfinite(far):
            expected = inputs["bias"][:, None, None].expand(7, 3, 3)
            torch.testing.assert_close(deform_conv(**inputs)[0], expected)
    inputs["offset"] = torch.full_like(inputs["offset"], math.nan)
    assert deform_conv(**inputs).isnan().all()


@pytest.mark.parametrize("map_size", [(8, 8), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_products_alone(map_size, dtype):
    inputs = _inputs(1, (8, 8), 1, dtype=torch.float32, map_size=map_size)
    sampling = Sampling(inputs["offset"], inputs["mask"], size=(8, 8))
    exact = sampling.conv(inputs["x"], inputs["weight"])
    with torch.autocast("cpu", dtype=dtype):
        own = sampling.conv(inputs["x"], inputs["weight"])
    assert own.dtype == torch.float32
    ends = list(inputs.values())[:4]
    gradient = torch.randn_like(exact)
    pairs = [(own, exact)]
    # The backward pass is the same inside the context and outside.
    with torch.autocast("cpu", dtype=dtype):
        rounded = torch.autograd.grad(own, ends, gradient, retain_graph=True)
    expected = torch.autograd.grad(exact, ends, gradient, retain_graph=True)
    pairs += zip(rounded, expected, strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
    for ours, again in zip(rounded, torch.autograd.grad(own, ends, gradient), strict=True):
        assert torch.equal(ours, again)


def test_places_of_reduced_precision():
    """Offsets come out of a convolution under autocast."""
    inputs = _inputs(1, (5, 5), 1, dtype=torch.float32)
    coarse = {name: each.bfloat16() for name, each in inputs.items()}
    expected = deform_conv(**{name: each.float() for name, each in coarse.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = deform_conv(**coarse)
    assert (own - expected).norm() < 0.01 * expected.norm()
