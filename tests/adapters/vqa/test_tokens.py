"""Vocabularies against splitting plain texts on spaces, and at the borders of the context."""

import numpy as np
import pytest

from adapters.vqa.tokens import ClipTokens, RobertaTokens, Tokens

CAPTIONS = (
    "a red circle, a blue square and a green cross",
    "a man riding a horse.",
    "two men's bikes; one isn't red!",
    "is there a zebra?",
    "it's late: who's there?",
)
PLAIN = (
    "a red circle",
    "skateboarding xylophonists photograph unbelievable zyzzyvas",
    "dog",
    "a a a",
)


@pytest.fixture(params=["clip", "roberta"])
def build(request, roberta):
    def build(context_length=64):
        if request.param == "clip":
            return ClipTokens(context_length)
        return RobertaTokens(roberta, context_length)

    return build


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_come_back(build, caption):
    tokens = build()
    assert isinstance(tokens, Tokens)
    (row,) = tokens([caption]).tolist()
    assert row[0] == tokens.start
    assert tokens.end in row
    assert tokens.decode(row[: row.index(tokens.end) + 1]) == caption


def test_decoding_is_not_disturbed_by_what_stands_around_the_words(build):
    tokens = build()
    (row,) = tokens(["a dog"]).tolist()
    inner = row[1 : row.index(tokens.end)]
    assert tokens.decode([tokens.start, *inner, *[tokens.end] * 5]) == "a dog"
    assert tokens.decode([]) == tokens.decode([tokens.start, tokens.end]) == ""


@pytest.mark.parametrize("text", [*CAPTIONS, *PLAIN, "", "!"])
def test_a_text_fits_up_to_the_context(build, text):
    whole = build()([text])[0].tolist()
    length = whole.index(build().end) + 1
    for context in range(max(3, length - 2), length + 3):
        tokens = build(context)
        assert tokens.context_length == context
        assert tokens.fits(text) == (context >= length)
        found = tokens([text])
        assert found.shape == (1, context)
        # What is cut still ends.
        assert tokens.end in found[0].tolist()
        if context >= length:
            assert found[0, :length].tolist() == whole[:length]


def test_words_are_those_between_spaces(build):
    tokens = build()
    numbers = tokens(PLAIN).numpy()
    for row, found, text in zip(numbers, tokens.words(numbers), PLAIN, strict=True):
        written = [
            tokens.decode(row[found == number].tolist()) for number in range(found.max() + 1)
        ]
        assert written == text.split()
        length = row.tolist().index(tokens.end)
        assert (found[1:length] >= 0).all()
        assert (np.diff(found[1:length]) >= 0).all()
        assert found[0] == -1
        assert (found[length:] == -1).all()
    longest = tokens.words(numbers)[1]
    assert np.bincount(longest[longest >= 0]).max() > 1, "some words are of several pieces"


def test_a_text_without_words_has_none(build):
    tokens = build()
    assert (tokens.words(tokens([""]).numpy()) == -1).all()


def test_words_of_a_text_that_is_cut(build):
    tokens = build(5)
    numbers = tokens([PLAIN[1]]).numpy()
    found = tokens.words(numbers)[0]
    assert found[0] == found[4] == -1
    assert (found[1:4] >= 0).all()


def test_specials_are_no_words(build):
    tokens = build()
    assert {tokens.start, tokens.end} <= set(tokens.specials)
    assert max(tokens.specials) < tokens.size
    for text in (*CAPTIONS, *PLAIN):
        numbers = tokens([text]).numpy()
        inner = numbers[tokens.words(numbers) >= 0]
        assert not np.isin(inner, tokens.specials).any()
        assert len(inner)


def test_roberta_has_its_own_specials(roberta):
    tokens = RobertaTokens(roberta, 8)
    assert (tokens.start, tokens.end) == (0, 2)
    assert tokens.specials == (0, 1, 2, 3, 4)
    assert tokens(["a"])[0, 3:].tolist() == [1] * 5


def test_what_has_the_number_of_clips_padding_is_part_of_a_word():
    tokens = ClipTokens(8)
    numbers = tokens(["!$ a", ""]).numpy()
    assert numbers[0, 1] == numbers[0, 7] == 0
    assert tokens.words(numbers).tolist() == [[-1, 0, 0, 1, *[-1] * 4], [-1] * 8]
