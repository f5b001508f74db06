import pytest
import torch
import torch.nn.functional as F

from cosswin.embedding import ConvEmbedding, ConvShape

STEM = ConvShape((7, 7), (4, 4), (2, 2))
TUBES = ConvShape((3, 7, 7), (2, 4, 4), (1, 2, 2))


def test_is_convolution_then_norm():
    torch.manual_seed(0)
    embedding = ConvEmbedding(3, 8, shape=STEM)
    torch.nn.init.normal_(embedding.norm.weight)
    x = torch.randn(2, 3, 30, 23)
    y = F.conv2d(x, embedding.proj.weight, embedding.proj.bias, stride=4, padding=2)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (8,), embedding.norm.weight, embedding.norm.bias)
    torch.testing.assert_close(embedding(x), y)


@pytest.mark.parametrize(("size", "side"), [(224, 56), (384, 96), (512, 128), (48, 12)])
def test_stem_side(size, side):
    embedding = ConvEmbedding(3, 4, shape=STEM)
    assert embedding(torch.zeros(1, 3, size, 16)).shape == (1, side, 4, 4)


def test_time_is_padded_with_its_ends():
    torch.manual_seed(0)
    embedding = ConvEmbedding(3, 8, shape=TUBES)
    clip = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 6, -1, -1)
    y = embedding(clip)
    assert y.shape == (1, 3, 4, 4, 8)
    torch.testing.assert_close(y[:, 0], y[:, 1])
    torch.testing.assert_close(y[:, 2], y[:, 1])


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(
    "shape",
    [
        ConvShape((2, 7, 7), (2, 4, 4), (0, 2, 2)),
        ConvShape((4, 7, 7), (2, 4, 4), (1, 2, 2)),
        ConvShape((3, 7, 7), (4, 4, 4), (0, 2, 2)),
        ConvShape((3, 3, 3), (1, 2, 2), (1, 1, 1)),
        ConvShape((2, 3, 3), (1, 2, 2), (0, 1, 1)),
    ],
)
def test_every_stride_of_frames_gives_a_step(shape, frames):
    """Against frames that are chosen one by one, gradient included."""
    torch.manual_seed(1)
    kernel, stride, before = (numbers[0] for numbers in shape)
    embedding = ConvEmbedding(3, 8, shape=shape)
    x = torch.randn(2, 3, frames, 16, 12, requires_grad=True)
    steps = []
    for start in range(-before, frames - before, stride):
        taken = [min(max(start + tap, 0), frames - 1) for tap in range(kernel)]
        proj, padding = embedding.proj, (0, *shape.padding[1:])
        step = F.conv3d(x[:, :, taken], proj.weight, proj.bias, shape.stride, padding)
        steps.append(embedding.norm(step.movedim(1, -1)))
    expected, out = torch.cat(steps, 1), embedding(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    inputs = (x, embedding.proj.weight)
    grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_errors_name_the_shapes():
    embedding = ConvEmbedding(3, 8, shape=STEM)
    with pytest.raises(
        ValueError, match=r"expected \[n, 3, \*size\] with 2 axes .* \[1, 4, 9, 9\]"
    ):
        embedding(torch.zeros(1, 4, 9, 9))
    with pytest.raises(ValueError, match=r"expected \[n, 3, \*size\]"):
        embedding(torch.zeros(1, 3, 9, 9, 9))
    with pytest.raises(ValueError, match=r"size \(2, 9\) is too small for the kernel \(7, 7\)"):
        embedding(torch.zeros(1, 3, 2, 9))
    with pytest.raises(ValueError, match=r"size \(0, 9, 9\) is too small"):
        ConvEmbedding(3, 8, shape=TUBES)(torch.zeros(1, 3, 0, 9, 9))
    with pytest.raises(ValueError, match="2 or 3 numbers"):
        ConvEmbedding(3, 8, shape=ConvShape((7, 7), (4,), (2, 2)))
