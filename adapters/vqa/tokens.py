"""Texts to token numbers and back, and which tokens are a word together."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from adapters.vqa.text_encoder import load_tokenizer
from unicl.towers.text import VOCABULARY_SIZE, tokenize


@runtime_checkable
class Tokens(Protocol):
    """A vocabulary in use."""

    size: int
    """Number of tokens."""
    start: int
    """What every text begins with."""
    end: int
    """What every text ends with."""
    specials: tuple[int, ...]
    """Tokens that are no part of a word, these two among them."""
    context_length: int
    """Longest text in tokens, with start and end."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers [texts, context_length]; longer texts are cut."""

    def fits(self, text: str) -> bool:
        """Say whether a text is no longer than the context."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without what is no word."""

    def words(self, tokens: np.ndarray) -> np.ndarray:
        """Return the number of each token's word [texts, length]; -1 where it is of none."""


class ClipTokens:
    """CLIP's byte pairs, as the text tower knows them.

    Args:
        context_length: Longest text in tokens, with start and end.
    """

    size = VOCABULARY_SIZE
    start = VOCABULARY_SIZE - 2
    end = VOCABULARY_SIZE - 1
    specials: tuple[int, ...] = (start, end)

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> Int64[Tensor, "texts context"]:
        """Return token numbers; longer texts are cut."""
        return tokenize(texts, self.context_length)

    def fits(self, text: str) -> bool:
        """Say whether a text is no longer than the context."""
        # One that is cut has its end in the last place.
        return int(tokenize([text], self.context_length + 1)[0, -1]) != self.end

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without what is no word."""
        kept = [token for token in tokens if token not in self.specials]
        text = " ".join(_byte_pairs().decode(kept).split())
        return re.sub(r" (?=[,.;:!?']|n't\b)", "", text)

    def words(self, tokens: Int64[np.ndarray, "texts length"]) -> Int64[np.ndarray, "texts length"]:
        """Return the number of each token's word; its last token says that a word ends there."""
        places = np.arange(tokens.shape[1])
        inner = (places > 0) & (places < tokens.argmax(1)[:, None])
        ends = _ends_of_words()[tokens] & inner
        return np.where(inner, ends.cumsum(1) - ends, -1)


@functools.cache
def _byte_pairs() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # reads its vocabulary: late, and once

    return SimpleTokenizer()


@functools.cache
def _ends_of_words() -> np.ndarray:
    decoder = _byte_pairs().decoder
    return np.array([decoder[number].endswith("</w>") for number in range(VOCABULARY_SIZE)])


class RobertaTokens:
    """RoBERTa's byte pairs, by the library transformers.

    Args:
        name: What `load_tokenizer` takes.
        context_length: Longest text in tokens, with start and end.
    """

    def __init__(self, name: str, context_length: int) -> None:
        self._tokenizer = load_tokenizer(name)
        self.context_length = context_length
        self.size: int = len(self._tokenizer)
        self.start: int = self._tokenizer.bos_token_id
        self.end: int = self._tokenizer.eos_token_id
        self.specials: tuple[int, ...] = tuple(sorted(self._tokenizer.all_special_ids))

    def __call__(self, texts: Sequence[str]) -> Int64[Tensor, "texts context"]:
        """Return token numbers; longer texts are cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return encoded["input_ids"]

    def fits(self, text: str) -> bool:
        """Say whether a text is no longer than the context."""
        return len(self._tokenizer(text, verbose=False)["input_ids"]) <= self.context_length

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without what is no word."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def words(self, tokens: Int64[np.ndarray, "texts length"]) -> Int64[np.ndarray, "texts length"]:
        """Return the number of each token's word, which begins with a space before it."""
        inner = ~np.isin(tokens, self.specials)
        first = inner & ~np.pad(inner, ((0, 0), (1, 0)))[:, :-1]
        begins = first | (self._begins[tokens] & inner)
        return np.where(inner, begins.cumsum(1) - 1, -1)

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        texts = self._tokenizer.convert_ids_to_tokens(range(self.size))
        return np.array([text.startswith("\u0120") for text in texts])  # how it writes a space
