"""Captions against plain loops and against all sentences that a tiny vocabulary has."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapters.vqa.config import VqaConfig
from adapters.vqa.meter import Meter
from adapters.vqa.speaking import Speaker, build_speaker
from adapters.vqa.tokens import ClipTokens
from unicl.data.order import mix
from unicl.evaluation.embeddings import evaluating
from unicl.models import load

START, END, PAD = 4, 5, 6
SIZE = 7


class Letters:
    """Four letters, a start, an end and padding."""

    size, start, end, specials, context_length = SIZE, START, END, (START, END, PAD), 77

    def __call__(self, texts):
        raise NotImplementedError

    def fits(self, text):
        raise NotImplementedError

    def words(self, tokens):
        raise NotImplementedError

    def decode(self, tokens):
        return "".join("abcd"[token] for token in tokens if token not in self.specials)


class Toy(Meter):
    """Says what a table of random numbers says, of the image and of all that was said before."""

    def __init__(self, sharpness=2.0, end=0.0):
        nn.Module.__init__(self)
        self.sharpness, self.end = sharpness, end
        self.fusion = SimpleNamespace(remember=self.remember)
        self.heads = {"words": nn.Identity()}

    def remember(self, image):
        memory = image[:, None]
        return [(memory, memory)]

    def logits(self, image, said):
        generator = torch.Generator().manual_seed(mix(image, *said) >> 1)
        logits = torch.randn(SIZE, generator=generator) * self.sharpness
        logits[END] += self.end
        return logits

    def speak(self, tokens, memory):
        images = memory[0][0][:, 0, 0, 0].int().tolist()
        rows = [
            self.logits(image, said) for image, said in zip(images, tokens.tolist(), strict=True)
        ]
        return torch.stack(rows)[:, None].expand(-1, tokens.shape[1], -1).clone()

    def log_shares(self, image, said):
        """Return what may follow, a letter or the end, and how likely it is."""
        logits = self.logits(image, (START, *said)).tolist()
        allowed = [*range(4), END]
        whole = math.log(sum(math.exp(logits[token]) for token in allowed))
        return {token: logits[token] - whole for token in allowed}


def images_of(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)


def spoken(toy, images, *, numbers=None, **how):
    speaker = Speaker(toy, Letters(), **how)
    return speaker.captions(images_of(*images), numbers if numbers is not None else images)


def greedy(toy, image, most):
    said = ()
    while len(said) < most:
        shares = toy.log_shares(image, said)
        best = max(shares, key=shares.get)
        if best == END:
            break
        said = (*said, best)
    return Letters().decode(said)


def beam_search(toy, image, beams, most):
    found = [(0.0, ())]
    for _ in range(most):
        grown = []
        for score, said in found:
            if said[-1:] == (END,):
                grown.append((score, said))
                continue
            shares = toy.log_shares(image, said)
            grown += [(score + share, (*said, token)) for token, share in shares.items()]
        found = sorted(grown, reverse=True)[:beams]
    _, said = max((score / len(said), said) for score, said in found)
    return Letters().decode(said)


def best_of_all(toy, image, most):
    """Try every sentence: of fewer than `most` letters with an end, or of as many without."""
    found = []
    for length in range(most + 1):
        for said in itertools.product(range(4), repeat=length):
            whole = said if length == most else (*said, END)
            score = sum(
                toy.log_shares(image, said[:place])[token] for place, token in enumerate(whole)
            )
            found.append((score / len(whole), said))
    return Letters().decode(max(found)[1])


@pytest.mark.parametrize("most", [1, 3, 12])
def test_one_beam_is_greedy(most):
    toy, images = Toy(), list(range(30))
    found = spoken(toy, images, num_beams=1, max_words=most)
    assert found == [greedy(toy, image, most) for image in images]
    assert len(set(found)) > 2


@pytest.mark.parametrize("beams", [2, 3, 7])
@pytest.mark.parametrize("end", [0.0, 2.0])
def test_beams_are_those_of_a_plain_search(beams, end):
    toy, images = Toy(1.0, end), list(range(30))
    found = spoken(toy, images, num_beams=beams, max_words=6)
    assert found == [beam_search(toy, image, beams, 6) for image in images]
    assert found != spoken(toy, images, num_beams=1, max_words=6)


@pytest.mark.parametrize("end", [0.0, 2.0])
def test_enough_beams_find_the_best_of_all(end):
    toy, images = Toy(1.0, end), list(range(8))
    # Of three letters at most there are 64, and 21 shorter ones.
    found = spoken(toy, images, num_beams=85, max_words=3)
    assert found == [best_of_all(toy, image, 3) for image in images]
    assert found != spoken(toy, images, num_beams=1, max_words=3)


def test_captions_do_not_depend_on_the_batch():
    toy = Toy(1.0)
    for how in ({"num_beams": 3}, {"top_p": 0.9}):
        whole = spoken(toy, range(12), max_words=6, **how)
        assert [spoken(toy, [image], max_words=6, **how)[0] for image in range(12)] == whole
        assert spoken(toy, range(11, -1, -1), max_words=6, **how) == whole[::-1]


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 4}, {"top_p": 0.95}])
def test_captions_are_no_longer_than_wanted(how):
    for most in (1, 2, 5):
        found = spoken(Toy(1.0, -9.0), range(20), max_words=most, **how)
        assert {len(each) for each in found} == {most}
    tokens = Letters()
    tokens.context_length = 6
    speaker = Speaker(Toy(1.0, -9.0), tokens, max_words=30, **how)
    # With the start and an end.
    assert {len(each) for each in speaker.captions(images_of(*range(5)), range(5))} == {4}


def test_a_caption_may_be_empty():
    for how in ({"num_beams": 1}, {"num_beams": 4}, {"top_p": 0.5}):
        assert spoken(Toy(0.1, 50.0), [1, 2], **how) == ["", ""]


def nucleus(shares, top_p):
    """Return the fewest likeliest tokens that have this probability together."""
    kept, total = [], 0.0
    for token in sorted(shares, key=shares.get, reverse=True):
        kept.append(token)
        total += math.exp(shares[token])
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_only_the_nucleus_is_drawn(top_p):
    toy, seen = Toy(1.0), set()
    for image in range(10):
        found = spoken(toy, [image] * 50, numbers=range(50), top_p=top_p, max_words=4)
        for caption in found:
            said = tuple("abcd".index(letter) for letter in caption)
            for place, token in enumerate([*said, END][:4]):
                assert token in nucleus(toy.log_shares(image, said[:place]), top_p)
        seen |= {(image, caption) for caption in found}
    assert len(seen) > 10, "some are drawn in several ways"


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.999])
def test_draws_of_the_nucleus_are_as_likely_as_the_model_says(top_p):
    toy, count = Toy(1.0), 3000
    found = Counter(spoken(toy, [5] * count, numbers=range(count), top_p=top_p, max_words=1))
    shares = toy.log_shares(5, ())
    kept = nucleus(shares, top_p)
    assert set(found) == {Letters().decode([token]) for token in kept}
    total = sum(math.exp(shares[token]) for token in kept)
    for token in kept:
        share = math.exp(shares[token]) / total
        deviation = math.sqrt(share * (1 - share) / count)
        assert abs(found[Letters().decode([token])] / count - share) <= 5 * deviation


def test_the_smallest_nucleus_is_greedy():
    toy, images = Toy(), list(range(30))
    assert spoken(toy, images, top_p=1e-6) == spoken(toy, images, num_beams=1)


def test_draws_follow_the_seed_and_the_number_alone():
    toy, numbers = Toy(1.0), [9, 2**40, 0, 7]
    first = spoken(toy, [1] * 4, numbers=numbers, top_p=0.9)
    torch.manual_seed(3)
    assert spoken(toy, [1] * 2, numbers=[7, 9], top_p=0.9) == [first[3], first[0]]
    assert len(set(first)) > 1
    assert spoken(toy, [1] * 4, numbers=numbers, top_p=0.9, seed=1) != first


class Watched(ClipTokens):
    """Remembers what was decoded."""

    def __init__(self, context_length):
        super().__init__(context_length)
        self.decoded = []

    def decode(self, tokens):
        self.decoded.append(list(tokens))
        return super().decode(tokens)


@pytest.fixture(scope="module")
def captioner(runs):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    return load(str(runs / "captions"), device="cpu").model, images


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}, {"top_p": 0.9}])
def test_a_run_says_words_only(captioner, how):
    (model, images), tokens = captioner, Watched(24)
    with evaluating(model):
        captions = Speaker(model, tokens, max_words=7, **how).captions(model.look(images), range(5))
    for said, caption in zip(tokens.decoded, captions, strict=True):
        assert said[0] == tokens.start
        words = list(itertools.takewhile(lambda token: token != tokens.end, said[1:]))
        assert set(said[1 + len(words) :]) <= {tokens.end}
        assert tokens.start not in words
        assert len(words) <= 7
        assert caption == ClipTokens(24).decode(words)
        assert "<" not in caption


def test_a_run_says_what_is_likeliest_after_what_was_said(captioner):
    (model, images), tokens = captioner, Watched(24)
    with evaluating(model):
        seen = model.look(images[:1])
        Speaker(model, tokens, num_beams=1, max_words=7).captions(seen, [0])
        said = [tokens.start]
        while len(said) < 8 and said[-1] != tokens.end:
            memory = model.fusion.remember(seen)
            logits = model.heads["words"](model.speak(torch.tensor([said]), memory))[0, -1]
            said.append(int(logits[: tokens.start].argmax()))
            if logits[tokens.end] > logits[said[-1]]:
                said[-1] = tokens.end
    assert tokens.decoded == [said]


def test_a_configuration_decides_how_it_is_said():
    config = VqaConfig(objective="captions", num_beams=5, top_p=0.4, max_words=9)
    speaker = build_speaker(Toy(), Letters(), config)
    assert (speaker.num_beams, speaker.top_p, speaker.max_words) == (5, 0.4, 9)
