"""What is hidden follows BERT's shares, and neither it nor what does not match depends on ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.vqa.building import build_model, build_tokens
from adapters.vqa.negatives import DrawnNegatives
from adapters.vqa.objectives import VisionLanguagePretraining, hide_words
from adapters.vqa.text_encoder import MASK
from adapters.vqa.tokens import ClipTokens, RobertaTokens
from tests.adapters.vqa.runs import recipe_of
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Batch
from unicl.distributed import ALONE, whole_means

TEXTS = (
    "a skateboarding xylophonist photographs an unbelievable zyzzyva",
    "dog",
    "",
    "a red circle, a blue square and a green cross on a white table near the yellow moon",
)


@pytest.fixture(params=["clip", "roberta"])
def vocabulary(request, roberta):
    return ClipTokens(64) if request.param == "clip" else RobertaTokens(roberta, 64)


def hidden_of(vocabulary, texts, *, share=0.15, seeds=None):
    tokens = vocabulary(texts).numpy()
    seeds = range(len(texts)) if seeds is None else seeds
    return tokens, *hide_words(tokens, vocabulary, share=share, seeds=list(seeds))


def test_targets_are_what_was_there(vocabulary):
    texts = TEXTS * 50
    tokens, hidden, targets = hidden_of(vocabulary, texts, share=0.5)
    chosen = targets >= 0
    assert (targets[chosen] == tokens[chosen]).all()
    assert (targets[~chosen] == -1).all()
    assert (hidden[~chosen] == tokens[~chosen]).all()
    assert (hidden[chosen] == MASK).any()
    np.testing.assert_array_equal(tokens, vocabulary(texts).numpy())


def test_whole_words_are_hidden_and_nothing_else(vocabulary):
    tokens, _, targets = hidden_of(vocabulary, TEXTS * 50)
    words = vocabulary.words(tokens)
    for row, chosen in zip(words, targets >= 0, strict=True):
        assert not (chosen & (row < 0)).any()
        for word in range(row.max() + 1):
            assert len(set(chosen[row == word])) == 1
    assert not np.isin(targets, vocabulary.specials).any()


@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_the_share_of_words_is_the_nearest_but_at_least_one(share):
    vocabulary = ClipTokens(64)
    texts = [" ".join(["dog"] * count) for count in range(1, 40)]
    _, _, targets = hidden_of(vocabulary, texts, share=share)
    found = (targets >= 0).sum(1)
    wanted = share * np.arange(1, 40)
    np.testing.assert_array_less(np.abs(found - np.maximum(wanted, 1)), 0.5 + 1e-9)


def test_a_text_without_words_stays(vocabulary):
    tokens, hidden, targets = hidden_of(vocabulary, ["", "dog"])
    assert (hidden[0] == tokens[0]).all()
    assert (targets[0] == -1).all()
    assert (targets[1] >= 0).any()


def test_eight_of_ten_are_masked_one_replaced_one_left(vocabulary):
    count = 3000
    tokens, hidden, targets = hidden_of(vocabulary, TEXTS[3:] * count, share=0.3)
    chosen = targets >= 0
    total = chosen.sum()
    masked, left = hidden == MASK, chosen & (hidden == tokens)
    replaced = chosen & ~masked & ~left
    by_chance = 0.1 / (vocabulary.size - len(vocabulary.specials))
    shares = {0.8: masked, 0.1 + by_chance: left, 0.1 - by_chance: replaced}
    for share, places in shares.items():
        deviation = np.sqrt(share * (1 - share) / total)
        assert abs(places.sum() / total - share) < 5 * deviation
    drawn = hidden[replaced]
    assert not np.isin(drawn, vocabulary.specials).any()
    assert drawn.min() >= 0
    assert drawn.max() < vocabulary.size
    # Uniform: the mean of the numbers lies in the middle.
    deviation = vocabulary.size / np.sqrt(12 * len(drawn))
    assert abs(drawn.mean() - vocabulary.size / 2) < 5 * deviation
    assert len(set(drawn.tolist())) > 0.7 * min(len(drawn), vocabulary.size)


def test_every_word_is_hidden_as_often():
    vocabulary, count = ClipTokens(64), 2000
    text = " ".join(["dog"] * 10)
    _, _, targets = hidden_of(vocabulary, [text] * count, share=0.2)
    found = (targets >= 0).mean(0)[1:11]
    np.testing.assert_allclose(found, 0.2, atol=5 * np.sqrt(0.16 / count))


def test_the_seed_alone_decides(vocabulary):
    seeds = [3, 2**64 - 1, 5, 8]
    _, hidden, targets = hidden_of(vocabulary, TEXTS, seeds=seeds)
    np.random.seed(1)  # noqa: NPY002
    for order in ([2, 0, 3, 1], [3], [1, 0]):
        again = hidden_of(
            vocabulary, [TEXTS[row] for row in order], seeds=[seeds[row] for row in order]
        )
        np.testing.assert_array_equal(again[1], hidden[order])
        np.testing.assert_array_equal(again[2], targets[order])
    many = hidden_of(vocabulary, TEXTS[3:] * 50)[2]
    assert len({row.tobytes() for row in many}) > 30


def own_texts(_):
    return ()


@pytest.fixture(scope="module")
def task():
    recipe = recipe_of(Path("nowhere"), "pretraining")
    tokens = build_tokens(recipe)
    negatives = DrawnNegatives(
        [f"a photo of {number} dogs" for number in range(40)],
        own=own_texts,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        pool=3,
        seed=1,
    )
    model = build_model(recipe, tokens, start=False)
    return VisionLanguagePretraining(model, tokens, negatives, mask_share=0.4, seed=7)


def batch_of(task, rows, consumed=600):
    """Return some rows of a batch of eight."""
    texts = [f"a photo of {number} dogs" for number in range(8)]
    return Batch(
        images=torch.arange(8, dtype=torch.uint8)[rows, None, None, None].expand(-1, 3, 32, 32),
        tokens=task.tokens(texts)[rows],
        labels=torch.arange(100, 108)[rows],
        keys=tuple(str(row) for row in rows),
        texts=tuple(texts[row] for row in rows),
        consumed=consumed,
        skipped={},
    )


def test_inputs_do_not_depend_on_how_ranks_share_a_batch(task):
    whole = task.inputs(batch_of(task, list(range(8))))
    for cut in (0, 1, 3, 7, 8):
        parts = [task.inputs(batch_of(task, list(range(*ends)))) for ends in ((0, cut), (cut, 8))]
        for name, value in whole.towers["pairs"].items():
            joined = torch.cat([part.towers["pairs"][name] for part in parts])
            assert torch.equal(joined, value), name
        counts = torch.cat([part.context["num_hidden"] for part in parts])
        assert torch.equal(counts, whole.context["num_hidden"])


def test_another_place_of_the_stream_hides_other_words(task):
    rows = list(range(8))
    first, second = (
        task.inputs(batch_of(task, rows, consumed)).towers["pairs"] for consumed in (600, 608)
    )
    assert torch.equal(first["tokens"], second["tokens"])
    for name in ("hidden", "targets", "others"):
        assert not torch.equal(first[name], second[name])


def test_inputs_are_the_texts_others_and_hidden_ones(task):
    batch = batch_of(task, list(range(8)))
    inputs = task.inputs(batch)
    pairs = inputs.towers["pairs"]
    assert torch.equal(pairs["images"], batch.images)
    assert torch.equal(pairs["tokens"], batch.tokens)
    assert not (pairs["others"] == batch.tokens).all(1).any()
    assert torch.equal(inputs.context["num_hidden"], (pairs["targets"] >= 0).sum(1))
    chosen = pairs["targets"] >= 0
    assert torch.equal(pairs["targets"][chosen], batch.tokens[chosen])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_the_loss_is_the_weighted_sum_of_two_means(task, weights):
    weighted = VisionLanguagePretraining(
        task.model,
        task.tokens,
        task.negatives,
        matching_weight=weights[0],
        words_weight=weights[1],
    )
    # Own text, other text, words' loss, words guessed.
    rows = torch.tensor([[2.0, -1.0, 3.0, 1.0], [-0.5, 0.3, 0.0, 0.0], [1.0, -4.0, 5.0, 2.0]])
    context = {"num_hidden": torch.tensor([2, 0, 3])}
    loss, metrics = weighted.loss({"pairs": rows}, context)
    own, other = rows[:, 0].sigmoid(), rows[:, 1].sigmoid()
    matching = -torch.cat([own.log(), (1 - other).log()]).mean()
    words = torch.tensor(8.0 / 5)
    torch.testing.assert_close(loss, weights[0] * matching + weights[1] * words)
    torch.testing.assert_close(metrics["loss/matching"], matching)
    torch.testing.assert_close(metrics["loss/words"], words)
    assert metrics["matching/accuracy"] == pytest.approx(4 / 6)
    assert metrics["words/accuracy"] == pytest.approx(3 / 5)


def test_a_process_alone_computes_plain_means():
    sums = torch.tensor([6.0, 0.0], requires_grad=True)
    counts, others = torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0])
    means, shares = whole_means(sums, counts, ALONE, others)
    assert means.tolist() == [1.5, 0.0]
    assert shares.tolist() == [0.5, 0.0]
    means.sum().backward()
    assert sums.grad.tolist() == [0.25, 1.0]


def test_the_empty_part_of_a_rank_has_inputs(task):
    inputs = task.inputs(replace(batch_of(task, []), skipped={"unreadable": 3}))
    rows = inputs.towers["pairs"]
    assert {len(value) for value in rows.values()} == {0}
    assert inputs.context["num_hidden"].tolist() == []
