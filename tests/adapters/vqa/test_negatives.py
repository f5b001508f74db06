"""Texts that do not match: never an own one, as likely as the towers say, embedded once."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from adapters.vqa.data import captions_of, open_pairs
from adapters.vqa.negatives import FOLDER, DrawnNegatives, Embeddings, Negatives, embed_all
from unicl.data.prompts import PromptSampler
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import Setting, decoder_of
from unicl.models import load

TEXTS = tuple(f"text {number}" for number in range(6))
AS_THEY_ARE = PromptSampler("none", short_text_words=0, seed=0)


def no_others(_):
    return ()


def drawn(texts=TEXTS, *, own=no_others, prompts=AS_THEY_ARE, pool=1, seed=0, embed=None):
    return DrawnNegatives(texts, own=own, prompts=prompts, pool=pool, seed=seed, embed=embed)


def embedded(tmp_path, *, pool, scale):
    """Return negatives of six texts by embeddings of two images."""
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 4)), rng.normal(size=(6, 4))
    both = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts)]
    embeddings = Embeddings(*(each.astype(np.float16) for each in both), scale)
    negatives = drawn(pool=pool, embed=lambda _: embeddings)
    negatives.prepare(tmp_path)
    return negatives, embeddings


@pytest.mark.parametrize("pool", [1, 4])
def test_never_an_own_text_nor_another_caption_of_the_image(tmp_path, pool):
    negatives = drawn(own=lambda sample: (TEXTS[0], TEXTS[sample % 6]), pool=pool)
    assert isinstance(negatives, Negatives)
    seen = Counter()
    for consumed in range(60):
        samples = list(range(6))
        texts = [TEXTS[(sample + 1) % 6] for sample in samples]
        for sample, text in zip(samples, negatives.choose(samples, texts, consumed), strict=True):
            assert text not in (TEXTS[0], TEXTS[sample], TEXTS[(sample + 1) % 6])
            seen[text] += 1
    assert seen.keys() == set(TEXTS[1:])


def test_texts_that_differ_in_white_space_are_the_same():
    negatives = drawn(("a dog", "a cat"))
    found = negatives.choose([0] * 20, ["  a \n dog"] * 20, 4)
    assert set(found) == {"a cat"}


def test_captions_of_a_set_match_their_image(runs, monkeypatch):
    monkeypatch.setattr("adapters.vqa.data.ROOT", runs)
    samples = open_pairs("coco")
    for index in range(samples.num_samples):
        texts = captions_of(samples, index)
        assert samples.read(index).text.decode() in texts
        assert len(texts) == 2
    assert captions_of(open_pairs(str(runs / "pairs")), 0) == ()


def test_a_choice_follows_from_seed_sample_and_place():
    samples, texts = list(range(40)), ["other"] * 40
    chosen = drawn().choose(samples, texts, 7)
    assert drawn().choose(samples, texts, 7) == chosen
    order = [5, 39, 0]
    assert drawn().choose(order, texts[:3], 7) == [chosen[row] for row in order]
    assert drawn().choose(samples, texts, 8) != chosen
    assert drawn(seed=1).choose(samples, texts, 7) != chosen
    assert len(set(chosen)) == 6


def test_without_embeddings_all_are_as_likely():
    count = 3000
    found = Counter(drawn(pool=5).choose(range(count), [TEXTS[2]] * count, 0))
    assert found.keys() == set(TEXTS) - {TEXTS[2]}
    for text in found:
        assert abs(found[text] / count - 0.2) < 5 * np.sqrt(0.16 / count)


def test_similar_texts_are_taken_as_often_as_the_softmax_says(tmp_path):
    count, scale = 3000, 5.0
    negatives, embeddings = embedded(tmp_path, pool=2, scale=scale)
    own = 3
    rest = [number for number in range(6) if number != own]
    for sample in range(2):
        found = Counter(
            negatives.choose([sample], [TEXTS[own]], consumed)[0] for consumed in range(count)
        )
        similarities = embeddings.texts.astype(np.float64) @ embeddings.images[sample]
        weights = np.exp(scale * similarities)
        # Two are drawn of six; what is drawn twice, or is the own one, counts that way.
        expected = np.zeros(6)
        for pair in ((a, b) for a in range(6) for b in range(6)):
            left = [number for number in pair if number != own]
            for number in left:
                expected[number] += weights[number] / weights[left].sum() / 35
        assert expected.sum() == pytest.approx(1)
        for number in rest:
            share = expected[number]
            deviation = np.sqrt(share * (1 - share) / count)
            assert abs(found[TEXTS[number]] / count - share) < 5 * deviation
        best = max(rest, key=lambda number: similarities[number])
        assert found.most_common(1)[0][0] == TEXTS[best]


def test_a_great_scale_takes_the_most_similar(tmp_path):
    negatives, embeddings = embedded(tmp_path, pool=200, scale=1e5)
    similarities = embeddings.texts.astype(np.float64) @ embeddings.images[1]
    best = TEXTS[int(similarities.argmax())]
    for consumed in range(20):
        assert negatives.choose([1], ["other"], consumed) == [best]


def test_prompts_are_put_around_short_texts():
    found = drawn(prompts=PromptSampler("clip", short_text_words=5, seed=0)).choose(
        range(60), ["other"] * 60, 0
    )
    assert all(any(text in each for text in TEXTS) for each in found)
    assert len({each.replace(text, "{}") for each in found for text in TEXTS}) > 10
    plain = drawn().choose(range(60), ["other"] * 60, 0)
    assert all(text in each for text, each in zip(plain, found, strict=True))


def test_data_with_one_text_are_refused():
    with pytest.raises(UsageError, match="texts that differ, and the data have 1; train on more"):
        drawn(("a dog",))
    negatives = drawn(("a dog", "a cat"), own=lambda _: ("a cat",))
    with pytest.raises(UsageError, match="found no text that is not 'a dog'"):
        negatives.choose([0], ["a dog"], 0)


@pytest.fixture
def embed(runs):
    """Return what embeds the pairs into a folder, and counts how often the towers were loaded."""
    samples = open_pairs(str(runs / "pairs"))
    loaded = []

    def load_towers():
        loaded.append(1)
        return load(str(runs / "towers"), device="cpu")

    def embed(folder, digest="one", batch_size=5):
        return embed_all(
            folder,
            samples,
            samples.table().texts,
            load=load_towers,
            setting=Setting(batch_size=batch_size, num_workers=0),
            digest=digest,
        )

    embed.samples, embed.loaded = samples, loaded
    return embed


def test_embeddings_are_those_of_the_towers(runs, embed, tmp_path):
    folder = tmp_path / FOLDER
    found = embed(folder)
    model = load(str(runs / "towers"), device="cpu")
    decode = decoder_of(model)
    read = [embed.samples.read(index) for index in range(embed.samples.num_samples)]
    with torch.no_grad():
        images = model.model.encode_image(torch.stack([decode(each.image, 0) for each in read]))
        texts = model.model.encode_text(model.tokenize(embed.samples.table().texts))
    for name, expected in (("images", images), ("texts", texts)):
        written = np.load(folder / f"{name}.npy")
        assert written.dtype == np.float16
        np.testing.assert_allclose(written, expected, atol=1e-3)
        np.testing.assert_array_equal(getattr(found, name), written)
    assert found.scale == pytest.approx(model.model.scale().item())
    assert len(read) == 12


def test_what_is_there_is_not_made_again(embed, tmp_path):
    first = embed(tmp_path)
    second = embed(tmp_path)
    assert len(embed.loaded) == 1
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.texts, second.texts)
    assert first.scale == second.scale


def lose(path):
    path.unlink()


def damage(path):
    path.write_text("{")


def write_list(path):
    path.write_text("[]")


@pytest.mark.parametrize("spoil", [lose, damage, write_list])
def test_what_is_not_whole_is_made_again(embed, tmp_path, spoil):
    first = np.array(embed(tmp_path).images)
    np.save(tmp_path / "images.npy", np.zeros_like(first))
    spoil(tmp_path / "done.json")
    np.testing.assert_array_equal(embed(tmp_path).images, first)
    assert len(embed.loaded) == 2


def test_other_data_are_embedded_anew(embed, tmp_path):
    embed(tmp_path)
    embed(tmp_path, digest="two")
    assert len(embed.loaded) == 2
    assert json.loads((tmp_path / "done.json").read_text())["digest"] == "two"
    embed(tmp_path, digest="two")
    assert len(embed.loaded) == 2


def test_an_interruption_leaves_nothing_that_looks_whole(embed, tmp_path, monkeypatch):
    first = np.array(embed(tmp_path).images)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.vqa.negatives._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(tmp_path, digest="two")
    np.save(tmp_path / "images.npy", np.zeros_like(first))
    np.testing.assert_array_equal(embed(tmp_path).images, first)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["images.npy", "texts.npy"])
def test_a_lost_array_is_made_again(embed, tmp_path, name):
    first = embed(tmp_path)
    expected = np.array(getattr(first, name[:-4]))
    (tmp_path / name).unlink()
    np.testing.assert_array_equal(getattr(embed(tmp_path), name[:-4]), expected)


def test_batches_change_nothing(embed, tmp_path):
    first, second = (embed(tmp_path / str(size), batch_size=size) for size in (1, 12))
    np.testing.assert_allclose(first.images, second.images, atol=1e-3)
    np.testing.assert_allclose(first.texts, second.texts, atol=1e-3)


def test_a_folder_that_cannot_be_written_is_one_line(embed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UniclError, match=r"cannot write .*file") as caught:
        embed(tmp_path / "file" / FOLDER)
    assert "\n" not in str(caught.value)
    (tmp_path / FOLDER / "images.npy").mkdir(parents=True)
    with pytest.raises(UniclError, match=r"cannot write .*images\.npy: Is a directory") as caught:
        embed(tmp_path / FOLDER)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_takes_no_others_place(runs, embed, tmp_path):
    whole = embed(tmp_path / "whole")
    samples = embed.samples

    class Lossy:
        num_samples, shard_sizes = samples.num_samples, samples.shard_sizes
        digest, locate, label = samples.digest, samples.locate, samples.label

        def read(self, index):
            sample = samples.read(index)
            return sample if index != 4 else type(sample)(sample.key, b"no image", sample.text)

    found = embed_all(
        tmp_path / "lossy",
        Lossy(),
        samples.table().texts,
        load=lambda: load(str(runs / "towers"), device="cpu"),
        setting=Setting(batch_size=5, num_workers=0),
        digest="three",
    )
    others = np.arange(12) != 4
    np.testing.assert_array_equal(found.images[others], whole.images[others])
    assert not found.images[4].any()
