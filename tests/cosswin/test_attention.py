import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torchvision.models.swin_transformer import SwinTransformerBlock as TorchvisionBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from cosswin.attention import WindowAttention, _attend_fused, _ExplicitAttention
from cosswin.stage import Block

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def _randomise(module):
    """Draw weights large enough for the bias, the mask and the norms to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5 if parameter.ndim > 1 else 1.0)
    return module


def _assert_same(ours, theirs, x):
    """Compare results, input gradients and weight gradients, in float64."""
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    y1, y2 = ours(x1), theirs(x2)
    torch.testing.assert_close(y1, y2, **EXACT)
    weight = torch.randn_like(y1)
    (y1 * weight).mean().backward()
    (y2 * weight).mean().backward()
    torch.testing.assert_close(x1.grad, x2.grad, **EXACT)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[_their_name(name, expected)].grad, **EXACT
        )


def _their_name(name, names):
    renamed = name.replace("fc1", "0").replace("fc2", "3")
    return name if name in names else renamed


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (4, 8)])
def test_block_equals_timm_swin(size, shifted):
    torch.manual_seed(0)
    block = _randomise(Block(16, num_heads=4, window_size=(4, 4), shifted=shifted))
    oracle = SwinTransformerBlock(16, size, 4, window_size=4, shift_size=2 if shifted else 0)
    oracle.load_state_dict(block.state_dict())
    _assert_same(block, oracle, torch.randn(2, *size, 16))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("window", "size"),
    [
        ((2, 4, 4), (4, 8, 4)),
        ((2, 4, 4), (2, 4, 8)),
        ((2, 4, 4), (6, 8, 12)),
        ((4, 4, 2), (8, 4, 6)),
        ((8, 4, 4), (16, 8, 8)),
        # The window is shrunk to the clip; torchvision's bias is wrong where it shrinks on the map.
        ((4, 4, 4), (3, 8, 8)),
        ((8, 4, 4), (1, 8, 4)),
        ((8, 3, 5), (5, 6, 10)),
    ],
)
def test_block_equals_torchvision_swin3d(window, size, shifted):
    torch.manual_seed(1)
    block = _randomise(Block(16, num_heads=2, window_size=window, shifted=shifted))
    oracle = TorchvisionBlock(
        16,
        2,
        window_size=list(window),
        shift_size=[side // 2 if shifted else 0 for side in window],
        attn_layer=ShiftedWindowAttention3d,
    )
    renamed = {_their_name(k, oracle.state_dict()): v for k, v in block.state_dict().items()}
    buffer = {"attn.relative_position_index": oracle.attn.relative_position_index}
    oracle.load_state_dict({**renamed, **buffer})
    _assert_same(block, oracle, torch.randn(2, *size, 16))


def _dense_attention(attention, x):
    """Attend token by token, straight from the definition."""
    n, height, width, c = x.shape
    heads, window, shift = attention.num_heads, attention.window_size, attention.shift
    sides = [min(s, w) for s, w in zip((height, width), window, strict=True)]
    steps = [0 if s <= w else d for s, w, d in zip((height, width), window, shift, strict=True)]
    q, k, v = attention.qkv(x).reshape(n, height, width, 3, heads, -1).unbind(3)
    out = torch.zeros(n, height, width, heads, c // heads)
    places = [(i, j) for i in range(height) for j in range(width)]

    def cell(place):
        return [(p - d) // s for p, s, d in zip(place, sides, steps, strict=True)]

    for i, j in places:
        keys = [place for place in places if cell(place) == cell((i, j))]
        logits = torch.stack(
            [
                (q[:, i, j] * k[:, a, b]).sum(-1) * (c // heads) ** -0.5
                + attention.relative_position_bias_table[
                    (i - a + window[0] - 1) * (2 * window[1] - 1) + j - b + window[1] - 1
                ]
                for a, b in keys
            ],
            -1,
        )
        values = torch.stack([v[:, a, b] for a, b in keys], -2)
        out[:, i, j] = torch.einsum("nhk,nhkd->nhd", logits.softmax(-1), values)
    return attention.proj(out.flatten(3))


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (3, 8), (2, 2), (9, 3), (1, 7)])
def test_any_map_equals_the_definition(size, shift):
    """No size divides by chance: padding, clamped windows and their bias follow the definition."""
    torch.manual_seed(2)
    attention = _randomise(WindowAttention(8, num_heads=2, window_size=(4, 3), shift=shift))
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(attention(x), _dense_attention(attention, x), **EXACT)


def test_no_maps_give_no_maps():
    attention = WindowAttention(8, num_heads=2, window_size=(4, 4), shift=(2, 2))
    x = torch.zeros(0, 8, 8, 8, requires_grad=True)
    out = attention(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_gradient_equals_differences(size):
    torch.manual_seed(3)
    attention = WindowAttention(4, num_heads=2, window_size=(4, 4), shift=(2, 2)).double()
    x = torch.randn(1, *size, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(attention, x, fast_mode=True)


@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
@pytest.mark.parametrize("windows", [1, 3])
def test_explicit_attention_equals_the_fused_one(windows, heads_at_once, monkeypatch):
    """The CPU's path and every other device's are one function, gradients included."""
    monkeypatch.setattr("cosswin.attention._WINDOWS_AT_ONCE", 6 * heads_at_once)
    torch.manual_seed(4)
    qkv = torch.randn(6, 9, 3 * 12, requires_grad=True)
    bias = torch.randn(windows, 3, 9, 9, requires_grad=True)
    weight = torch.randn(6, 9, 12)
    results = []
    for attend in (_attend_fused, _ExplicitAttention.apply):
        out = attend(qkv, bias)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (qkv, bias))))
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(explicit, fused, **EXACT)


def test_bfloat16_stays_close():
    torch.manual_seed(5)
    attention = WindowAttention(32, num_heads=2, window_size=(4, 4), shift=(2, 2))
    x = torch.randn(2, 8, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = attention(x)
    high = attention(x)
    torch.testing.assert_close(low.float(), high, rtol=0.02, atol=0.005)
    table = attention.relative_position_bias_table
    ((low_grad,), (high_grad,)) = (
        torch.autograd.grad(out.float().square().sum(), table) for out in (low, high)
    )
    assert (low_grad - high_grad).norm() < 0.02 * high_grad.norm()


def test_bias_gradient_is_deterministic():
    torch.manual_seed(4)
    attention = WindowAttention(8, num_heads=2, window_size=(4, 4), shift=(2, 2))
    x = torch.randn(8, 16, 16, 8)
    torch.use_deterministic_algorithms(True)
    try:
        table = attention.relative_position_bias_table
        grads = [torch.autograd.grad(attention(x).square().sum(), table)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_maps_of_a_batch_do_not_see_each_other():
    torch.manual_seed(5)
    attention = _randomise(WindowAttention(8, num_heads=2, window_size=(4, 4), shift=(2, 2)))
    x = torch.randn(3, 6, 10, 8)
    single = torch.cat([attention(image[None]) for image in x])
    torch.testing.assert_close(attention(x), single, **EXACT)


def test_layout_made_in_inference_mode_serves_training():
    attention = WindowAttention(8, num_heads=2, window_size=(3, 3), shift=(1, 1))
    x = torch.randn(1, 11, 13, 8)
    with torch.inference_mode():
        attention(x)
    attention(x).sum().backward()
    assert attention.qkv.weight.grad is not None


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        WindowAttention(8, num_heads=3, window_size=(4, 4), shift=(0, 0))
