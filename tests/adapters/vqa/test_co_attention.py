"""Co-attention against torch's own attention, and what masks, memory and checkpointing change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.vqa.co_attention import CoAttention
from benchmarks.co_attention import bridge_tower_layer

WIDTH, HEADS = 16, 4


def built(dropout=0.0, checkpointing=False, num_layers=3):
    torch.manual_seed(3)
    fusion = CoAttention(
        image_width=12,
        text_width=10,
        width=WIDTH,
        num_layers=num_layers,
        num_heads=HEADS,
        dropout=dropout,
        checkpointing=checkpointing,
    ).double()
    # BERT's small weights would let any order of steps give nearly the same.
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.4)
    return fusion


def tokens(batch=3, places=5, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, places, 12, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, length, 10, generator=generator, dtype=torch.float64)
    return image, text


def attend(attention, x, y, absent=None, causal=None):
    """Do what an attention does by torch's module."""
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        parts = (attention.q, attention.k, attention.v)
        plain.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        plain.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        plain.out_proj.weight.copy_(attention.proj.weight)
        plain.out_proj.bias.copy_(attention.proj.bias)
    return plain(x, y, y, key_padding_mask=absent, attn_mask=causal, need_weights=False)[0]


def plain_layer(layer, x, y, x_absent=None, y_absent=None):
    x = layer.norm1(x + attend(layer.self_attention, x, x, x_absent))
    x = layer.norm2(x + attend(layer.cross_attention, x, y, y_absent))
    return layer.norm3(x + layer.fc2(F.gelu(layer.fc1(x))))


def plain_fusion(fusion, image, text, image_mask=None, text_mask=None):
    x = fusion.image_projection(image) + fusion.modality_embedding[1]
    y = fusion.text_projection(text) + fusion.modality_embedding[0]
    x_absent = None if image_mask is None else ~image_mask
    y_absent = None if text_mask is None else ~text_mask
    for image_layer, text_layer in zip(fusion.image_layers, fusion.text_layers, strict=True):
        x, y = (
            plain_layer(image_layer, x, y, x_absent, y_absent),
            plain_layer(text_layer, y, x, y_absent, x_absent),
        )
    return x, y


def test_equals_torch_attention_in_parallel_steps():
    fusion, (image, text) = built(), tokens()
    for found, expected in zip(fusion(image, text), plain_fusion(fusion, image, text), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_stack_that_steps_after_the_other_is_another_one():
    fusion, (image, text) = built(), tokens()
    x = fusion.image_projection(image) + fusion.modality_embedding[1]
    y = fusion.text_projection(text) + fusion.modality_embedding[0]
    for image_layer, text_layer in zip(fusion.image_layers, fusion.text_layers, strict=True):
        x = plain_layer(image_layer, x, y)
        y = plain_layer(text_layer, y, x)
    assert (fusion(image, text)[1] - y).abs().max() > 0.01


def masks():
    image_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    text_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    return image_mask, text_mask


def test_masks_equal_torch_attention():
    fusion, (image, text), (image_mask, text_mask) = built(), tokens(), masks()
    found = fusion(image, text, image_mask=image_mask, text_mask=text_mask)
    expected = plain_fusion(fusion, image, text, image_mask, text_mask)
    for own, other, mask in zip(found, expected, (image_mask, text_mask), strict=True):
        torch.testing.assert_close(own[mask], other[mask], rtol=1e-9, atol=1e-9)


def test_padding_changes_nothing():
    fusion, (image, text), (image_mask, text_mask) = built(), tokens(), masks()
    x, y = fusion(image, text, image_mask=image_mask, text_mask=text_mask)
    pooled = fusion.pool(x, y, image_mask)
    image[~image_mask], text[~text_mask] = 99.0, -99.0
    other_x, other_y = fusion(image, text, image_mask=image_mask, text_mask=text_mask)
    torch.testing.assert_close(x[image_mask], other_x[image_mask])
    torch.testing.assert_close(y[text_mask], other_y[text_mask])
    torch.testing.assert_close(pooled, fusion.pool(other_x, other_y, image_mask))
    for row in range(3):
        places, words = int(image_mask[row].sum()), int(text_mask[row].sum())
        alone = fusion(image[row : row + 1, :places], text[row : row + 1, :words])
        torch.testing.assert_close(x[row, :places], alone[0][0])
        torch.testing.assert_close(y[row, :words], alone[1][0])
        torch.testing.assert_close(pooled[row : row + 1], fusion.pool(*alone))


def test_words_are_said_knowing_those_before_and_the_image():
    fusion, (image, text) = built(), tokens()
    states = fusion.speak(text, fusion.remember(image))
    x = fusion.image_projection(image) + fusion.modality_embedding[1]
    y = fusion.text_projection(text) + fusion.modality_embedding[0]
    hidden = torch.ones(4, 4).triu(1).bool()
    for image_layer, layer in zip(fusion.image_layers, fusion.text_layers, strict=True):
        y = layer.norm1(y + attend(layer.self_attention, y, y, causal=hidden))
        y = layer.norm2(y + attend(layer.cross_attention, y, x))
        y = layer.norm3(y + layer.fc2(F.gelu(layer.fc1(y))))
        x = image_layer.norm1(x + attend(image_layer.self_attention, x, x))
        x = image_layer.norm3(x + image_layer.fc2(F.gelu(image_layer.fc1(x))))
    torch.testing.assert_close(states, y, rtol=1e-9, atol=1e-9)
    changed = text.clone()
    changed[:, 2] += 1
    other = fusion.speak(changed, fusion.remember(image))
    torch.testing.assert_close(states[:, :2], other[:, :2])
    assert (states[:, 2:] - other[:, 2:]).abs().amin(-1).max() > 0
    other = fusion.speak(text, fusion.remember(image + 1))
    assert (states - other).abs().amax((0, 2)).min() > 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient(dropout):
    found = []
    for checkpointing in (False, True):
        fusion, (image, text) = built(dropout, checkpointing), tokens()
        torch.manual_seed(0)
        x, y = fusion(image, text, text_mask=masks()[1])
        fusion.pool(x, y).square().sum().backward()
        torch.manual_seed(0)
        fusion.speak(text, fusion.remember(image)).square().sum().backward()
        found.append({name: p.grad for name, p in fusion.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_dropout_is_for_training_only():
    fusion, (image, text) = built(dropout=0.5), tokens()
    assert (fusion(image, text)[0] - fusion(image, text)[0]).abs().max() > 0
    fusion.eval()
    torch.testing.assert_close(fusion(image, text)[0], fusion(image, text)[0], rtol=0, atol=0)


def test_the_stacks_of_meter_have_113_million_parameters():
    with torch.device("meta"):
        fusion = CoAttention(image_width=2048, text_width=768)
    stacks = [*fusion.image_layers.parameters(), *fusion.text_layers.parameters()]
    assert sum(p.numel() for p in stacks) == 113_421_312  # METER: 113.4M


def test_a_layer_equals_that_of_bridge_tower():
    fusion, (image, text), (image_mask, text_mask) = built(), tokens(), masks()
    layer = fusion.text_layers[0]
    x, y = fusion.image_projection(image), fusion.text_projection(text)
    seen = layer.cross_attention.keys_values(x)
    found = layer(y, seen, text_mask[:, None, None], image_mask[:, None, None])
    hide = [torch.zeros(m.shape).masked_fill(~m, -1e30)[:, None, None] for m in masks()]
    expected = bridge_tower_layer(layer, width=WIDTH, num_heads=HEADS, attention="eager")(
        y, x, attention_mask=hide[1].double(), encoder_attention_mask=hide[0].double()
    )[0]
    torch.testing.assert_close(found[text_mask], expected[text_mask], rtol=1e-9, atol=1e-9)
