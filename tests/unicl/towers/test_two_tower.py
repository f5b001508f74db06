import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import normalize

from unicl.errors import UsageError
from unicl.loss import unicl_loss
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower, tokenize
from unicl.towers.two_tower import TwoTower

CAPTIONS = ["a photo of a cat.", "a cat", "a photo of a cat.", "dog"]


def small_model(**options):
    torch.manual_seed(0)
    image = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    text = TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8)
    return TwoTower(image, text, **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_embeddings_are_unit_length_in_fp32(dtype):
    model = small_model()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        images, texts, scale = model(torch.randn(3, 3, 2, 2), tokenize(CAPTIONS))
    for embeddings, number in ((images, 3), (texts, 4)):
        assert embeddings.shape == (number, 8)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(number))
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("deduplicated", [False, True])
def test_economies_change_no_gradient(deduplicated):
    model = small_model()
    captions = sorted(set(CAPTIONS)) if deduplicated else CAPTIONS
    images, tokens = torch.randn(len(captions), 3, 2, 2), tokenize(captions)
    labels = torch.tensor([captions.index(text) for text in captions])

    def gradients(**options):
        texts = model.encode_text(tokens, **options)
        loss = unicl_loss(model.encode_image(images), texts, labels, model.scale())
        return torch.autograd.grad(loss, list(model.parameters()))

    economical = gradients(deduplicated=deduplicated)
    for ours, plain in zip(economical, gradients(economies=False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_equal_texts_are_encoded_once_and_without_their_padding():
    model = small_model()
    shapes = []
    model.text.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    tokens = tokenize(CAPTIONS)
    model.encode_text(tokens)
    model.encode_text(tokens[1:], deduplicated=True)
    model.encode_text(tokens, economies=False)
    assert shapes == [(3, 8), (3, 8), (4, 77)]


def test_scale_starts_where_asked():
    torch.testing.assert_close(small_model().scale(), torch.tensor(1 / 0.07))
    torch.testing.assert_close(small_model(initial_scale=3.0).scale(), torch.tensor(3.0))
    assert small_model(initial_scale=100.0).scale() <= 100


@pytest.mark.parametrize(("initial", "maximum"), [(0.0, 100.0), (101.0, 100.0)])
def test_scale_outside_its_range_is_refused(initial, maximum):
    with pytest.raises(UsageError, match=r"initial_scale must lie in \(0, 100.0\]"):
        small_model(initial_scale=initial, max_scale=maximum)


@pytest.mark.parametrize("value", [2.0, 4.6052, 4.7])
@pytest.mark.parametrize("pull", [1.0, -1.0])
def test_only_gradients_that_lead_down_pass_at_the_limit(value, pull):
    model = small_model()
    nn.init.constant_(model.logit_scale, value)
    scale = model.scale()
    assert scale <= 100
    (pull * scale).backward()
    passes = value < 4 or pull > 0
    expected = pull * scale.detach()[None] if passes else torch.tensor([0.0])
    torch.testing.assert_close(model.logit_scale.grad, expected)


def test_scale_that_was_carried_over_the_limit_returns_at_once():
    model = small_model(initial_scale=99.0)
    optimizer = torch.optim.AdamW([model.logit_scale], lr=0.01, weight_decay=0)
    seen = []
    for step in range(400):
        scale = model.scale()
        seen.append(scale.item())
        (-scale if step < 300 else scale).div(100).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(seen) <= 100
    assert model.scale() < 50


def test_a_locked_tower_neither_learns_nor_draws():
    model = TwoTower(
        ImageTower("coswin_nano", embed_dim=8, image_size=24, drop_path_rate=0.9),
        TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8),
    )
    images = torch.randn(4, 3, 24, 24)
    assert not torch.equal(model.encode_image(images), model.encode_image(images))
    model.lock("image")
    for mode in (model, model.train(), model.eval().train()):
        assert torch.equal(mode.encode_image(images), mode.encode_image(images))
        assert mode.training
        assert mode.text.training
    assert not model.encode_image(images).requires_grad
    assert model.encode_text(tokenize(CAPTIONS)).requires_grad


def test_state_has_three_parts_and_survives_safetensors():
    model = TwoTower(
        ImageTower("test_resnet", embed_dim=8, image_size=32),
        TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8),
    ).eval()
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"image", "text", "logit_scale"}
    other = TwoTower(
        ImageTower("test_resnet", embed_dim=8, image_size=32),
        TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8),
        initial_scale=2.0,
    ).eval()
    other.load_state_dict(load(save(state)))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for ours, theirs in zip(
        model(images, tokenize(CAPTIONS)), other(images, tokenize(CAPTIONS)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_normalises_in_fp32_even_after_half_precision_features():
    model = small_model()
    model.image = nn.Flatten()
    features = torch.randn(5, 3, 2, 2).bfloat16()
    expected = normalize(features.flatten(1).float(), dim=1)
    assert torch.equal(model.encode_image(features), expected)
