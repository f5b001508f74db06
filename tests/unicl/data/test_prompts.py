from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from unicl.data.prompts import TEMPLATES, PromptSampler, fill
from unicl.errors import UsageError


def test_templates_are_those_of_the_lineage():
    assert TEMPLATES["clip"] == ("{}.", *(make("{}") for make in OPENAI_IMAGENET_TEMPLATES))
    assert TEMPLATES["simple"] == tuple(make("{}") for make in SIMPLE_IMAGENET_TEMPLATES)
    assert len(TEMPLATES["clip"]) == 81
    assert TEMPLATES["none"] == ("{}",)


@given(st.text())
def test_any_text_fits_any_template(text):
    assert fill("a photo of a {}.", text) == f"a photo of a {text}."


def test_short_texts_get_one_template_and_long_ones_none():
    sampler = PromptSampler("clip", short_text_words=2, seed=0)
    prompt = sampler("grinning face", 5)
    assert prompt in {fill(template, "grinning face") for template in TEMPLATES["clip"]}
    assert sampler("face with tears", 5) == "face with tears"


def test_a_position_always_draws_the_same_template():
    one, two = (PromptSampler("clip", short_text_words=2, seed=3) for _ in range(2))
    forward = [one("cat", position) for position in range(50)]
    assert forward == [two("cat", position) for position in reversed(range(50))][::-1]
    other = PromptSampler("clip", short_text_words=2, seed=4)
    assert forward != [other("cat", position) for position in range(50)]


def test_templates_are_drawn_equally_often():
    sampler = PromptSampler("simple", short_text_words=1, seed=0)
    counts = Counter(sampler("cat", position) for position in range(7000))
    assert len(counts) == 7
    # Chi-square of 6 degrees of freedom, p = 0.001.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 22.5


def test_draws_never_change_silently():
    sampler = PromptSampler("clip", short_text_words=2, seed=0)
    assert [sampler("cat", position) for position in (0, 1, 10**12)] == [
        "a tattoo of the cat.",
        "a painting of the cat.",
        "a cartoon cat.",
    ]


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_empty_texts_stay_empty(text):
    assert PromptSampler("clip", short_text_words=2, seed=0)(text, 0) == text


def test_the_second_stage_has_no_templates():
    assert PromptSampler("none", short_text_words=2, seed=0)("cat", 0) == "cat"


def test_unknown_templates_are_a_usage_error():
    with pytest.raises(UsageError, match=r"'klip'.*clip"):
        PromptSampler("klip", short_text_words=2, seed=0)
