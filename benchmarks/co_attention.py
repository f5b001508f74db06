"""How fast is co-attention, beside the one that METER's authors have in transformers?

And what a step of pretraining takes: an image is encoded once for the three texts it meets, where
METER encodes it for each; where the time goes; what activation checkpointing saves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.vqa.co_attention import CoAttention, CoAttentionLayer
from adapters.vqa.config import VqaConfig
from adapters.vqa.meter import Meter
from adapters.vqa.objectives import VisionLanguagePretraining
from adapters.vqa.text_encoder import TowerEncoder
from benchmarks.harness import Timing, compare, peak_memory, ratio
from benchmarks.record import Bar, Result
from unicl.engine.precision import autocast
from unicl.towers.image import ImageTower

_WIDTH, _NUM_HEADS, _NUM_LAYERS = 768, 12, 6
_PLACES, _LENGTH = 144, 50  # of an image of 384 pixels, and METER's texts


def measure(*, quick: bool) -> Result:
    """Time the stacks of METER, and steps of pretraining on CoSwin-T; one minute on 2 cores."""
    rounds, batch = (1, 1) if quick else (5, 4)
    stacks = {p: _stacks(p, rounds, batch, quick=quick) for p in ("fp32", "bf16")}
    sizes = {"batch": batch, "quick": quick}
    steps = _steps(1 if quick else 3, **sizes)
    memory = {
        name: peak_memory("benchmarks.co_attention:memory_case", checkpointing=on, **sizes)
        for name, on in (("kept", False), ("checkpointing", True))
    }
    saved = memory["checkpointing"].extra / memory["kept"].extra
    shares = _profile(**sizes)
    bars = [
        _faster(f"two stacks of 6 layers, forward and backward, {name}", sides)
        for name, sides in stacks.items()
    ]
    bars += [
        _faster("step of pretraining, image once for three texts, over METER's way", steps),
        Bar("memory of a step with activation checkpointing", saved, None, "x", "at most"),
    ]
    return Result(
        bars=bars,
        tables={
            "Where the time of a step goes": [
                {"part": part, "share": f"{share:.0%}"} for part, share in shares.items()
            ],
            "Memory of a step on top of model and batch, MiB": [
                {"activations": name, "MiB": round(each.extra)} for name, each in memory.items()
            ],
        },
        facts={"places": _PLACES, "length": _LENGTH, **sizes, "threads": torch.get_num_threads()},
    )


def bridge_tower_layer(
    layer: CoAttentionLayer, *, width: int, num_heads: int, attention: str = "sdpa"
) -> nn.Module:
    """Return the layer of transformers' BridgeTower with the weights of one of ours."""
    from transformers import BridgeTowerConfig
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

    config: Any = BridgeTowerConfig(
        hidden_size=width,
        num_attention_heads=num_heads,
        intermediate_size=layer.fc1.out_features,
        layer_norm_eps=1e-12,
    )
    # What the layer asks for and this configuration does not have.
    config.chunk_size_feed_forward = 0
    config.is_decoder, config.add_cross_attention = False, True
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = layer.dropout
    config._attn_implementation = attention
    theirs = BridgeTowerBertCrossLayer(config).to(layer.fc1.weight)
    own, other = layer.self_attention, layer.cross_attention
    names: dict[str, nn.Module] = {
        "intermediate.dense": layer.fc1,
        "output.dense": layer.fc2,
        "output.LayerNorm": layer.norm3,
    }
    for name, part, norm in (
        ("attention", own, layer.norm1),
        ("crossattention", other, layer.norm2),
    ):
        for word in ("query", "key", "value"):
            names[f"{name}.self.{word}"] = getattr(part, word[0])
        names |= {f"{name}.output.dense": part.proj, f"{name}.output.LayerNorm": norm}
    weights = {
        f"{name}.{kind}": getattr(part, kind)
        for name, part in names.items()
        for kind in ("weight", "bias")
    }
    theirs.load_state_dict(weights)
    return theirs


def _stacks(precision: str, rounds: int, batch: int, *, quick: bool) -> dict[str, Timing]:
    """Time both stacks on the same inputs, whose texts differ in length."""
    ours = CoAttention(
        image_width=_WIDTH,
        text_width=_WIDTH,
        num_layers=1 if quick else _NUM_LAYERS,
        dropout=0.0,
    )
    stacks = (ours.image_layers, ours.text_layers)
    theirs = [
        [bridge_tower_layer(layer, width=_WIDTH, num_heads=_NUM_HEADS) for layer in stack]
        for stack in stacks
    ]
    image, text = torch.randn(batch, _PLACES, _WIDTH), torch.randn(batch, _LENGTH, _WIDTH)
    there = torch.arange(_LENGTH) < torch.linspace(10, _LENGTH, batch)[:, None]

    def run_ours() -> None:
        _backward(precision, lambda: ours(image, text, text_mask=there))

    def run_theirs() -> None:
        hide = torch.zeros(batch, 1, 1, _LENGTH).masked_fill(~there[:, None, None], -1e30)
        show = torch.zeros(batch, 1, 1, _PLACES)

        def forward() -> tuple[Tensor, Tensor]:
            x, y = ours._project_image(image), ours._project_text(text)
            for image_layer, text_layer in zip(*theirs, strict=True):
                x, y = (
                    image_layer(x, y, attention_mask=show, encoder_attention_mask=hide)[0],
                    text_layer(y, x, attention_mask=hide, encoder_attention_mask=show)[0],
                )
            return x, y

        _backward(precision, forward)

    return compare({"ours": run_ours, "theirs": run_theirs}, repeats=rounds)


def _backward(precision: str, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
    with autocast(precision, torch.device("cpu")):
        x, y = forward()
    (x.float().square().mean() + y.float().square().mean()).backward()


def _steps(rounds: int, *, batch: int, quick: bool) -> dict[str, Timing]:
    model, pairs = build_model(quick=quick), _pairs(batch, quick=quick)

    def once() -> None:
        VisionLanguagePretraining.encode_with(model, pairs).sum().backward()

    def each_time() -> None:
        images = pairs["images"]
        matched = [model.match(model.look(images), pairs[name]) for name in ("tokens", "others")]
        losses, _ = model.hidden_words(model.look(images), pairs["hidden"], pairs["targets"])
        (sum(each.sum() for each in matched) + losses.sum()).backward()

    return compare({"ours": once, "theirs": each_time}, repeats=rounds)


def build_model(*, quick: bool, checkpointing: bool = False) -> Meter:
    """Build METER on CoSwin-T of 384 pixels and a text tower of 12 layers; small ones if quick."""
    image = ImageTower(
        "coswin_nano" if quick else "coswin_tiny",
        embed_dim=64,
        image_size=64 if quick else 384,
        window_size=None if quick else 12,
        checkpointing=checkpointing,
    )
    text = TowerEncoder(width=64 if quick else 512, num_layers=1 if quick else 12, embed_dim=64)
    text.set_grad_checkpointing(checkpointing)
    config = VqaConfig(
        objective="pretraining",
        num_layers=1 if quick else _NUM_LAYERS,
        dropout=0.0,
        checkpointing=checkpointing,
    )
    return Meter(image, text, config, num_tokens=49408, initial_scale=10.0, max_scale=100.0)


def _pairs(batch: int, *, quick: bool) -> dict[str, Tensor]:
    side = 64 if quick else 384
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40_000, (batch, _LENGTH), generator=generator)
    for row, length in enumerate(torch.linspace(10, _LENGTH - 1, batch).long().tolist()):
        tokens[row, length], tokens[row, length + 1 :] = 49407, 0
    hidden = torch.rand(tokens.shape, generator=generator) < 0.15
    hidden &= torch.arange(_LENGTH) < tokens.argmax(1, keepdim=True)
    return {
        "images": torch.randint(0, 256, (batch, 3, side, side), generator=generator).byte(),
        "tokens": tokens,
        "others": tokens.roll(1, 0),
        "hidden": tokens.masked_fill(hidden, -1),
        "targets": tokens.masked_fill(~hidden, -1),
    }


def memory_case(*, checkpointing: bool, batch: int, quick: bool) -> Callable[[], object]:
    """Return a step of pretraining, for a process of its own."""
    model = build_model(quick=quick, checkpointing=checkpointing)
    pairs = _pairs(batch, quick=quick)

    def step() -> None:
        for parameter in model.parameters():  # gradients are there with and without
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        VisionLanguagePretraining.encode_with(model, pairs).sum().backward()

    return step


def _profile(*, batch: int, quick: bool) -> Mapping[str, float]:
    """Return the share of a step's time, forward and backward, of each part of the model."""
    model, pairs = build_model(quick=quick), _pairs(batch, quick=quick)
    image = model.look(pairs["images"]).detach()
    texts = torch.cat([pairs[name] for name in ("tokens", "others", "hidden")])
    there = torch.arange(_LENGTH) < model.text.lengths(texts)[:, None]
    words = model.text.encode(texts).detach()
    states = torch.randn(int((pairs["targets"] >= 0).sum()), _WIDTH)

    def fuse() -> Tensor:
        return model.fusion(image.repeat(3, 1, 1), words, text_mask=there)[1]

    parts: dict[str, Callable[[], Tensor]] = {
        "image tower": lambda: model.look(pairs["images"]),
        "text encoder": lambda: model.text.encode(texts),
        "co-attention": fuse,
        "hidden words": lambda: F.log_softmax(model.heads["words"](states), -1),
    }

    def timed(part: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: part().sum().backward()

    found = compare({name: timed(part) for name, part in parts.items()}, repeats=1 if quick else 2)
    total = sum(each.median for each in found.values())
    return {name: each.median / total for name, each in found.items()}


def _faster(what: str, sides: Mapping[str, Timing]) -> Bar:
    """Return how much faster ours is."""
    found = ratio(sides["theirs"], sides["ours"])
    return Bar(what, found.median, 1.0, "x", "at least", (found.low, found.high))
