import functools

import open_clip
import pytest
import torch
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

from unicl.errors import UsageError
from unicl.towers.text import (
    TextTower,
    _attend,
    _attend_on_cpu,
    _up_to,
    deduplicate,
    from_open_clip,
    tokenize,
    trim,
)

CAPTIONS = [
    "a photo of a cat.",
    "!",
    "a cat",
    "!!",
    "two dogs that chase a small red ball",
    "a cat",
]


def small_tower(seed=0, **changes):
    torch.manual_seed(seed)
    options = {"width": 32, "num_layers": 2, "num_heads": 4, "embed_dim": 16}
    return TextTower(**options | changes)


def open_clip_tower(**changes):
    torch.manual_seed(1)
    return TextTransformer(width=64, heads=1, layers=3, output_dim=24, **changes)


def gradients(tower, features):
    weight = torch.linspace(-1, 1, features.numel()).view_as(features)
    return torch.autograd.grad((features * weight).sum(), list(tower.parameters()))


def test_equals_open_clip_on_equal_weights():
    theirs = open_clip_tower()
    ours = from_open_clip(theirs.state_dict())
    tokens = tokenize(CAPTIONS)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


def test_bidirectional_equals_open_clip_where_its_mask_hides_the_padding_alone():
    theirs = open_clip_tower(no_causal_mask=True, use_pad_mask=True, proj_type="none")
    theirs.text_projection = torch.nn.Parameter(torch.randn(64, 24) / 8)
    ours = from_open_clip(theirs.state_dict(), causal=False, num_heads=1)
    tokens = tokenize([text for text in CAPTIONS if "!" not in text])  # "!" is token 0
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [open_clip.model.CLIP, open_clip.model.CustomTextCLIP])
def test_takes_the_text_tower_out_of_a_whole_open_clip_model(make):
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=16)
    text = open_clip.model.CLIPTextCfg(width=64, heads=1, layers=2)
    model = make(24, vision, text)
    tokens = tokenize(CAPTIONS)
    ours = from_open_clip(model.state_dict())
    torch.testing.assert_close(ours(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "norm_eps"), [("gelu", 1e-5), ("quick_gelu", 1e-5), ("quick_gelu", 0.1)]
)
def test_other_activations_and_norms_are_open_clips(activation, norm_eps):
    theirs = open_clip_tower(
        act_layer={"gelu": torch.nn.GELU, "quick_gelu": QuickGELU}[activation],
        norm_layer=functools.partial(LayerNorm, eps=norm_eps),
    )
    tokens = tokenize(CAPTIONS)
    ours = from_open_clip(theirs.state_dict(), activation=activation, norm_eps=norm_eps)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)
    other = from_open_clip(
        theirs.state_dict(),
        activation={"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation],
        norm_eps=norm_eps,
    )
    assert (other(tokens) - theirs(tokens)).abs().max() > 1e-3


def test_weights_of_something_else_are_refused():
    with pytest.raises(UsageError, match="'positional_embedding' is missing"):
        from_open_clip(torch.nn.Linear(2, 2).state_dict())
    weights = open_clip_tower().state_dict()
    del weights["transformer.resblocks.1.ln_2.bias"]
    with pytest.raises(UsageError, match=r"'blocks.1.norm2.bias' is missing"):
        from_open_clip(weights)


@pytest.mark.parametrize("causal", [True, False])
def test_economies_change_neither_features_nor_gradients(causal):
    tower = small_tower(causal=causal).double()
    tokens = tokenize(CAPTIONS)
    unique, inverse = deduplicate(trim(tokens))
    assert unique.shape == (5, 10)
    full, short = tower(tokens), tower(unique)[inverse]
    torch.testing.assert_close(short, full, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(tower, short), gradients(tower, full), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_causal_tokens_see_only_those_before_them():
    tokens = tokenize(["a cat that"])
    changed = tokens.clone()
    changed[0, 1] += 1
    for causal in (True, False):
        tower = small_tower(causal=causal, num_layers=1)
        norms = []
        hook = tower.blocks[0].register_forward_hook(lambda _, __, x, into=norms: into.append(x))
        tower(tokens), tower(changed)
        hook.remove()
        start = (norms[0] - norms[1])[0, 0].abs().max()
        assert (start == 0) == causal


def test_trim_keeps_the_longest_text_whole():
    tokens = tokenize(["cat", "a cat and a dog"])
    assert torch.equal(trim(tokens), tokens[:, :7])
    assert trim(tokens[:0]).shape == (0, 77)


def test_deduplicate_gives_every_text_its_row():
    tokens = tokenize(CAPTIONS)
    unique, inverse = deduplicate(tokens)
    assert len(unique) == len(set(CAPTIONS))
    assert torch.equal(unique[inverse], tokens)


def test_checkpointing_changes_nothing_but_memory():
    tower = small_tower()
    tokens = trim(tokenize(CAPTIONS))
    plain = gradients(tower, tower(tokens))
    kept = []
    tower.set_grad_checkpointing()

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = tower(tokens)
    assert len(kept) < 20
    for a, b in zip(gradients(tower, features), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_equals_the_fused_kernel(causal):
    q, k, v = torch.randn(3, 6, 4, 5, 8)
    mask = None if causal else _up_to(torch.tensor([0, 1, 2, 3, 4, 4]), 5)
    torch.testing.assert_close(_attend_on_cpu(q, k, v, mask), _attend(q, k, v, mask))


@pytest.mark.parametrize(
    ("options", "without", "projected"),
    [
        ({"width": 512, "num_heads": 8, "embed_dim": 512}, 63_165_952, 63_428_096),
        ({"width": 768, "num_heads": 12, "embed_dim": 512}, 123_060_480, 123_453_696),
        ({"width": 1024, "num_heads": 16, "embed_dim": 1024}, 201_829_376, 202_877_952),
        (
            {"width": 1152, "num_heads": 18, "mlp_width": 4864, "embed_dim": 1024},
            255_372_672,
            256_552_320,
        ),
    ],
)
def test_parameter_counts_of_the_published_sizes(options, without, projected):
    with torch.device("meta"):
        tower = TextTower(**options)
    count = sum(parameter.numel() for parameter in tower.parameters())
    assert (count - tower.projection.weight.numel(), count) == (without, projected)


def test_initial_weights_are_distributed_as_open_clips():
    theirs = from_open_clip(open_clip_tower().state_dict()).state_dict()
    torch.manual_seed(2)
    ours = TextTower(width=64, num_heads=1, num_layers=3, embed_dim=24).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight.std(), theirs[name].std(), rtol=0.3, atol=1e-6, msg=name)


def test_tokens_are_open_clips():
    texts = [*CAPTIONS, "", "Zwölf Boxkämpfer 😀", "long " * 100]
    for context in (77, 8):
        expected = open_clip.tokenizer.SimpleTokenizer()(texts, context_length=context)
        assert torch.equal(tokenize(texts, context), expected)
        assert torch.equal(tokenize(texts[0], context), expected[:1])


def test_text_longer_than_the_context_is_refused():
    with pytest.raises(UsageError, match="texts of 77 tokens exceed the context of 8"):
        small_tower(context_length=8)(tokenize(["a cat"]))
    with pytest.raises(UsageError, match="num_heads must divide the width 32, got 5"):
        small_tower(num_heads=5)


@pytest.mark.parametrize("causal", [True, False])
def test_states_are_what_features_are_made_of(causal):
    tower, tokens = small_tower(causal=causal), tokenize(CAPTIONS)
    ends = tokens.argmax(1)
    states = tower.norm(tower.states(tower.embed(tokens), None if causal else ends))
    rows = torch.arange(len(tokens))
    torch.testing.assert_close(tower.projection(states[rows, ends]), tower(tokens))
    assert states.shape == (len(CAPTIONS), 77, 32)
