"""Captions as a training batch of the demo has them: emoji names, drawn as often as pictured."""

import random

from torch import Tensor

from unicl.data.prompts import PromptSampler
from unicl.data.twemoji import read_catalogue
from unicl.towers.text import deduplicate, tokenize, trim

# The demo's recipe: a skin tone has half as many training images as the emoji itself.
_TEMPLATES, _SHORT_TEXT_WORDS = "simple", 4


def draw_captions(count: int, *, seed: int = 0) -> list[str]:
    """Draw the texts of one batch, most of them in a template."""
    names = [
        emoji.name for emoji in read_catalogue().emoji for _ in range(2 + len(emoji.variants[::2]))
    ]
    prompts = PromptSampler(_TEMPLATES, short_text_words=_SHORT_TEXT_WORDS, seed=seed)
    drawn = random.Random(seed).choices(names, k=count)
    return [prompts(name, position) for position, name in enumerate(drawn)]


def draw_tokens(count: int, *, seed: int = 0) -> Tensor:
    """Draw the texts of one batch as tokens [count, 77]."""
    return tokenize(draw_captions(count, seed=seed))


def describe(tokens: Tensor) -> dict[str, object]:
    """Say what the economies of the text tower find in a batch."""
    unique, _ = deduplicate(tokens)
    return {
        "texts": len(tokens),
        "unique_texts": len(unique),
        "tokens_of_the_longest_text": trim(tokens).shape[1],
        "mean_tokens": float((tokens.argmax(dim=1) + 1).float().mean()),
        "context": tokens.shape[1],
    }
