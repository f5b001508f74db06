"""The whole model: its size with Florence's towers, what it trains, and its heads by plain code."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import RobertaConfig

from adapters.vqa.building import build_model, build_tokens
from adapters.vqa.config import VqaConfig
from adapters.vqa.meter import Meter
from adapters.vqa.text_encoder import MASK, RobertaEncoder
from tests.adapters.vqa.roberta import write_roberta
from tests.adapters.vqa.runs import recipe_of
from unicl.config import OptimizerConfig, parse_recipe
from unicl.engine.optimizer import parameter_groups
from unicl.models import build_image_tower

OBJECTIVES = ("pretraining", "answers", "captions")
TEXTS = ("a red circle", "dog", "a blue square and a green cross")


def count(*parts):
    """Return the number of parameters, in millions."""
    return sum(p.numel() for part in parts for p in part.parameters()) / 1e6


def test_florences_model_has_878_million_parameters():
    given = {"image_tower.model": "coswin_huge", "image_tower.image_size": "384"}
    recipe = parse_recipe("", {**given, "image_tower.window_size": "12"})
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = Meter(
            build_image_tower(recipe, start=False),
            RobertaEncoder(config, mask_token=50264),
            VqaConfig(objective="captions"),
            num_tokens=50265,
            initial_scale=10.0,
            max_scale=100.0,
        )
    stacks = (model.fusion.image_layers, model.fusion.text_layers)
    parts = {
        "backbone": count(model.image.backbone),
        "roberta": count(model.text),
        "stacks": count(*stacks),
        "rest of the co-attention": count(model.fusion) - count(*stacks),
    }
    assert sum(parts.values()) == pytest.approx(878, rel=0.002), parts
    assert parts["roberta"] == pytest.approx(124.1, abs=0.06), parts
    assert sum(parts.values()) == pytest.approx(
        count(model) - count(model.heads, model.image.projection) - 1e-6
    )


@pytest.fixture(scope="module", params=["tower", "roberta"])
def encoder(request, tmp_path_factory):
    if request.param == "tower":
        return {}
    folder = write_roberta(tmp_path_factory.mktemp("roberta"))
    return {"vqa__text_encoder": f"roberta:{folder}"}


def tiny(objective, encoder=None, **overrides):
    """Build a model in eval mode whose parts all have something to say; return its tokens, too."""
    given = {"vqa__answers": "red,blue,2"} if objective == "answers" else {}
    recipe = recipe_of(Path("nowhere"), objective, **given, **(encoder or {}), **overrides)
    tokens = build_tokens(recipe)
    torch.manual_seed(2)
    model = build_model(recipe, tokens, start=False).eval()
    for part in (model.fusion, model.heads, model.text):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    if hasattr(model.text, "mask_embedding"):
        nn.init.normal_(model.text.mask_embedding)
    return model, tokens


def seen(model, number=3):
    generator = torch.Generator().manual_seed(4)
    size = (number, 3, 32, 32)
    return model.look(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))


def one_by_one(model, image, tokens):
    """Go through pairs one by one, each text without its padding."""
    for one, text, length in zip(image, tokens, model.text.lengths(tokens).tolist(), strict=True):
        yield one[None], text[None, :length]


@torch.no_grad()
def test_match_equals_plain_code(encoder):
    model, tokens = tiny("pretraining", encoder)
    image, texts = seen(model), tokens(TEXTS)
    found = model.match(image, texts)
    head = model.heads["matching"]
    for logit, (one, text) in zip(found, one_by_one(model, image, texts), strict=True):
        x, y = model.fusion(one, model.text.encode(text))
        pooled = torch.cat([y[:, 0] @ model.fusion.text_pooler.weight.T, x.mean(1)], 1)
        text_half, image_mean = pooled.chunk(2, 1)
        text_half = torch.tanh(text_half + model.fusion.text_pooler.bias)
        image_half = torch.tanh(model.fusion.image_pooler(image_mean))
        shares = head(torch.cat([text_half, image_half], 1)).softmax(1)[0]
        torch.testing.assert_close(logit.sigmoid(), shares[1], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


@torch.no_grad()
def test_answers_equal_plain_code(encoder):
    model, tokens = tiny("answers", encoder)
    image, texts = seen(model), tokens(TEXTS)
    found = model.answer(image, texts)
    assert found.shape == (3, 3)
    head = model.heads["answers"]
    for logits, (one, text) in zip(found, one_by_one(model, image, texts), strict=True):
        pooled = model.fuse(one, text).pooled
        expected = head.fc2(F.gelu(head.norm(head.fc1(pooled))))[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert found.std(0).min() > 0.01


@torch.no_grad()
def test_hidden_words_equal_plain_code(encoder):
    model, tokens = tiny("pretraining", encoder)
    image, texts = seen(model), tokens(TEXTS)
    targets = torch.full_like(texts, -1)
    places = torch.tensor([[0, 1], [0, 2], [2, 2], [2, 4]])
    targets[places[:, 0], places[:, 1]] = texts[places[:, 0], places[:, 1]]
    hidden = texts.masked_fill(targets >= 0, MASK)
    losses, guessed = model.hidden_words(image, hidden, targets)
    rows = zip(targets, one_by_one(model, image, hidden), strict=True)
    for row, (target, (one, text)) in enumerate(rows):
        states = model.fuse(one, text).text[0]
        logits = model.heads["words"](states)
        loss, right = torch.zeros(()), 0
        for place in (target >= 0).nonzero()[:, 0].tolist():
            loss -= logits[place].log_softmax(0)[target[place]]
            right += int(logits[place].argmax() == target[place])
        torch.testing.assert_close(losses[row], loss, rtol=1e-4, atol=1e-4)
        assert guessed[row] == right
    assert losses[1] == 0
    assert losses[0] > 0


@torch.no_grad()
def test_next_words_equal_plain_code(encoder):
    model, tokens = tiny("captions", encoder)
    image, texts = seen(model), tokens(TEXTS)
    losses, guessed, counts = model.next_words(image, texts)
    for row, (one, text) in enumerate(one_by_one(model, image, texts)):
        memory = model.fusion.remember(one)
        loss, right = torch.zeros(()), 0
        for place in range(1, text.shape[1]):
            states = model.speak(text[:, :place], memory)
            logits = model.heads["words"](states)[0, -1]
            loss -= logits.log_softmax(0)[text[0, place]]
            right += int(logits.argmax() == text[0, place])
        torch.testing.assert_close(losses[row], loss, rtol=1e-4, atol=1e-4)
        assert guessed[row] == right
        assert counts[row] == text.shape[1] - 1


@torch.no_grad()
def test_what_is_guessed_is_counted():
    model, tokens = tiny("captions")
    image, texts = seen(model), tokens(TEXTS)
    head = model.heads["words"].decoder
    nn.init.zeros_(head.weight)
    head.bias[tokens.end] = 9.0
    guessed, counts = model.next_words(image, texts)[1:]
    assert guessed.tolist() == [1, 1, 1]
    assert counts.tolist() == (model.text.lengths(texts) - 1).tolist()


@torch.no_grad()
def test_padding_of_texts_changes_nothing(encoder):
    for objective, use in (
        ("pretraining", lambda model, image, texts: [model.match(image, texts)]),
        ("answers", lambda model, image, texts: [model.answer(image, texts)]),
        ("captions", lambda model, image, texts: model.next_words(image, texts)),
    ):
        model, tokens = tiny(objective, encoder)
        image, texts = seen(model), tokens(TEXTS)
        longest = int(model.text.lengths(texts).max())
        whole, trimmed = (use(model, image, each) for each in (texts, texts[:, :longest]))
        alone = [use(model, one, text) for one, text in one_by_one(model, image, texts)]
        for place, values in enumerate(whole):
            torch.testing.assert_close(values, trimmed[place])
            joined = torch.cat([each[place] for each in alone])
            torch.testing.assert_close(values, joined, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_places_of_an_image_that_are_not_there_change_nothing():
    model, tokens = tiny("answers", image_tower__image_size="64")
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    image, texts = model.look(pixels), tokens(TEXTS)
    assert image.shape[1] == 4
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    fused = model.fuse(image, texts, image_mask=mask)
    changed = image.masked_fill(~mask[..., None], 99.0)
    again = model.fuse(changed, texts, image_mask=mask)
    torch.testing.assert_close(fused.pooled, again.pooled)
    torch.testing.assert_close(fused.text, again.text)
    torch.testing.assert_close(fused.image[mask], again.image[mask])
    for row, places in enumerate(mask.sum(1).tolist()):
        alone = model.fuse(image[row : row + 1, :places], texts[row : row + 1])
        torch.testing.assert_close(fused.pooled[row], alone.pooled[0], rtol=1e-4, atol=1e-5)
    assert (model.fuse(changed, texts).pooled - fused.pooled)[:2].abs().amax(1).min() > 1e-3


def locked(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def below(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_an_objective_does_not_use_is_locked(objective, encoder):
    model, _ = tiny(objective, encoder)
    expected = below(model, "logit_scale", "image.projection.", "text.projection.")
    if objective != "pretraining":
        expected |= below(model, "text.mask_embedding")
    if objective == "captions":
        last = len(model.fusion.image_layers) - 1
        expected |= below(model, "fusion.image_pooler.", "fusion.text_pooler.")
        expected |= below(model, f"fusion.image_layers.{last}.")
        for layer in range(last):
            parts = ("cross_attention", "norm2")
            expected |= below(model, *(f"fusion.image_layers.{layer}.{part}." for part in parts))
    assert locked(model) == expected


def backward(model, objective, texts):
    image = seen(model, len(texts))
    if objective == "pretraining":
        targets = torch.where(torch.arange(texts.shape[1]) == 1, texts, -1)
        hidden = texts.masked_fill(targets >= 0, MASK)
        losses, _ = model.hidden_words(image, hidden, targets)
        found = losses.sum() + model.match(image, texts).sum()
    elif objective == "answers":
        found = model.answer(image, texts).sum()
    else:
        found = model.next_words(image, texts)[0].sum()
    found.backward()
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whatever_is_not_locked_has_a_gradient(objective, encoder):
    model, tokens = tiny(objective, encoder)
    backward(model.train(), objective, tokens(TEXTS))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_zeros_give_finite_numbers(objective, encoder):
    # What a rank without samples computes, so that the others need not wait.
    model, tokens = tiny(objective, encoder)
    texts = torch.zeros(2, tokens.context_length, dtype=torch.int64)
    assert backward(model.train(), objective, texts).isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_where_nothing_is_hidden_the_head_has_a_gradient_of_zeros():
    model, tokens = tiny("pretraining")
    texts = tokens(TEXTS)
    losses, guessed = model.hidden_words(seen(model), texts, torch.full_like(texts, -1))
    assert losses.tolist() == guessed.tolist() == [0, 0, 0]
    losses.sum().backward()
    for parameter in model.heads["words"].parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_heads_are_those_of_the_objective(objective):
    model, tokens = tiny(objective)
    expected = {
        "pretraining": {"words", "matching"},
        "answers": {"answers"},
        "captions": {"words"},
    }
    assert set(model.heads) == expected[objective]
    if "words" in model.heads:
        assert model.heads["words"].decoder.out_features == tokens.size
    assert model.rates == {"fusion": 5.0, "heads": 50.0}


def test_embeddings_of_texts_and_modalities_do_not_decay():
    model, _ = tiny("pretraining")
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decaying}
    assert "fusion.modality_embedding" not in names
    assert not any("embedding" in name or name.endswith("bias") for name in names)
    assert {"fusion.image_projection.weight", "heads.words.decoder.weight"} <= names
