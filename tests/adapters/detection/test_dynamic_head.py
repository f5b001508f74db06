import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from adapters.detection.dynamic_head import DynamicHead, DynamicHeadBlock
from unicl.errors import UsageError

CHANNELS = 32
EVEN = [(8, 12), (4, 6), (2, 3)]
ODD = [(9, 7), (5, 4), (3, 2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _levels(sizes, n=2, dtype=torch.float32):
    return [torch.randn(n, CHANNELS, *size, dtype=dtype, requires_grad=True) for size in sizes]


def _drawn(module):
    """Draw weights with which offsets are wide, and attention differs from one map to the next."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.15 if "offset" in name else 0.4)
    return module


def _reference(block, levels, released):
    """The block in plain torch and torchvision, image by image."""
    images = [
        [_level(block, [level[i : i + 1] for level in levels], k, released)[0] for i in range(n)]
        for k, n in enumerate([len(levels[0])] * len(levels))
    ]
    return [torch.stack(each) for each in images]


def _level(block, levels, k, released):
    state = {name: value for name, value in block.named_parameters()}
    x = levels[k]
    raw = F.conv2d(x, state["offset.weight"], state["offset.bias"], padding=1)
    offset, mask = raw[:, :18], raw[:, 18:].sigmoid()

    def deformed(number, source, stride=1, offset=offset, mask=mask):
        weight, bias = (state[f"DyConv.{number}.conv.{part}"] for part in ("weight", "bias"))
        out = deform_conv2d(source, offset, weight, bias, stride=stride, padding=1, mask=mask)
        parts = (state[f"DyConv.{number}.bn.{part}"] for part in ("weight", "bias"))
        return F.group_norm(out, 16, *parts)

    def resized(source):
        return F.interpolate(source, size=x.shape[2:], mode="bilinear", align_corners=True)

    sources = [deformed(1, x)]
    if k > 0:
        sources.append(deformed(2, levels[k - 1], stride=2))
    if k < len(levels) - 1:
        coarse = levels[k + 1]
        if released:
            h, w = coarse.shape[2:]
            first = offset.flatten(1)[:, : 18 * h * w].view(-1, 18, h, w)
            gains = mask.flatten(1)[:, : 9 * h * w].view(-1, 9, h, w)
            sources.append(resized(deformed(0, coarse, offset=first, mask=gains)))
        else:
            sources.append(deformed(0, resized(coarse)))
    total = 0
    for source in sources:
        attention = F.conv2d(
            F.adaptive_avg_pool2d(source, 1), state["AttnConv.1.weight"], state["AttnConv.1.bias"]
        )
        total = total + source * F.relu6(F.relu(attention) + 3) / 6
    mean = total / len(sources)
    hidden = F.relu(F.linear(mean.mean((2, 3)), state["relu.fc.0.weight"], state["relu.fc.0.bias"]))
    y = F.linear(hidden, state["relu.fc.2.weight"], state["relu.fc.2.bias"])
    y = (F.relu6(y + 3) / 6)[..., None, None]
    a1, b1, a2, b2 = y.split(x.shape[1], dim=1)
    a1, b1, a2, b2 = 2 * (a1 - 0.5) + 1, b1 - 0.5, 2 * (a2 - 0.5), b2 - 0.5
    return torch.max(a1 * mean + b1, a2 * mean + b2)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("sizes", [EVEN, ODD, [(3, 3)], [(2, 1), (1, 1)]])
def test_a_block_is_the_plain_one_with_its_gradients(sizes, released):
    block = _drawn(DynamicHeadBlock(CHANNELS, released_offsets=released)).double()
    levels = _levels(sizes, dtype=torch.float64)
    ends = [*levels, *block.parameters()]
    own, expected = block(levels), _reference(block, levels, released)
    gradients = [torch.randn_like(level) for level in expected]
    for ours, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    found = [
        torch.autograd.grad(each, ends, gradients, allow_unused=True) for each in (own, expected)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("sizes", [EVEN, ODD])
def test_a_block_in_single_precision(sizes):
    block = DynamicHeadBlock(CHANNELS)
    levels = _levels(sizes)
    for ours, theirs in zip(block(levels), _reference(block, levels, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_released_offsets_differ():
    levels = _levels(ODD)
    block = _drawn(DynamicHeadBlock(CHANNELS))
    natural = block(levels)
    block.released_offsets = True
    released = block(levels)
    assert not torch.allclose(natural[0], released[0], atol=0.01)
    # The coarsest level reads no coarser one.
    assert torch.equal(natural[-1], released[-1])


def test_names_are_those_of_the_released_code():
    names = set(DynamicHead(CHANNELS, 1).state_dict())
    modules = [
        *(f"DyConv.{k}.{part}" for k in range(3) for part in ("conv", "bn")),
        *("AttnConv.1", "relu.fc.0", "relu.fc.2", "offset"),
    ]
    parts = ("weight", "bias")
    assert names == {f"dyhead_tower.0.{name}.{part}" for name in modules for part in parts}


@pytest.mark.parametrize("released", [False, True])
def test_gradients_reach_every_parameter(released):
    head = DynamicHead(CHANNELS, 2, released_offsets=released)
    levels = _levels(ODD)
    sum(level.square().sum() for level in head(levels)).backward()
    for name, parameter in [*head.named_parameters(), *((str(x.shape), x) for x in levels)]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("released", [False, True])
def test_checkpointing_changes_nothing(released):
    head = DynamicHead(CHANNELS, 2, released_offsets=released)
    levels = _levels(ODD, n=3)
    found = []
    for checkpointing in (False, True):
        head.set_grad_checkpointing(checkpointing)
        head.zero_grad()
        outputs = head(levels)
        sum(level.square().sum() for level in outputs).backward()
        found.append([*outputs, *(parameter.grad for parameter in head.parameters())])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed)


def test_images_in_parts_with_checkpointing():
    """As a step in chunks goes: first without a graph, then part by part with one."""
    head = DynamicHead(CHANNELS, 2, checkpointing=True)
    levels = [level.detach() for level in _levels(ODD, n=3)]
    whole = head(levels)
    sum(level.square().sum() for level in whole).backward()
    expected = [parameter.grad for parameter in head.parameters()]
    head.zero_grad()
    with torch.no_grad():
        seen = head(levels)
    for part in (slice(0, 2), slice(2, 3)):
        outputs = head([level[part] for level in levels])
        products = zip(outputs, seen, strict=True)
        sum((own * 2 * of_all[part]).sum() for own, of_all in products).backward()
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * scale)


def test_autocast():
    head = DynamicHead(CHANNELS, 2)
    levels = _levels(ODD)
    expected = head(levels)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        outputs = head(levels)
    sum(level.float().square().sum() for level in outputs).backward()
    for ours, exact in zip(outputs, expected, strict=True):
        assert (ours - exact).norm() < 0.03 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_no_images():
    head = DynamicHead(CHANNELS, 2)
    outputs = head(_levels(ODD, n=0))
    assert [tuple(level.shape) for level in outputs] == [(0, CHANNELS, *size) for size in ODD]
    sum(level.sum() for level in outputs).backward()
    assert all(not parameter.grad.any() for parameter in head.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="multiple of 16 channels, got 40"):
        DynamicHead(40)
    with pytest.raises(ValueError, match=r"\(9, 7\) is followed by one of \(4, 4\), not of \(5"):
        DynamicHead(CHANNELS, 1)(_levels([(9, 7), (4, 4)]))
