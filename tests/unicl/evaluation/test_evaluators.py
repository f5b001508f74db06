"""The evaluators on real shards, through the real loader, with real towers."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unicl.data.augment import EvalTransform
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import TEMPLATES, PromptSampler
from unicl.data.reader import ImageDecoder
from unicl.data.shard_writer import ShardWriter
from unicl.data.shards import ShardSet
from unicl.evaluation.embeddings import embed_images, embed_texts
from unicl.evaluation.retrieval import Retrieval
from unicl.evaluation.zero_shot import ZeroShot
from unicl.predictor import Predictor
from unicl.towers.image import ImageTower
from unicl.towers.pretrained import Pretrained
from unicl.towers.text import TextTower, tokenize
from unicl.towers.two_tower import TwoTower

SIZE = 32
TEXTS = ("cat", "dog", "red apple", "cat", "moon", "sun", "a star that shines", "dog")
TOKENIZE = functools.partial(tokenize, context_length=16)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder: Path = tmp_path_factory.mktemp("held-out")
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for number, text in enumerate(TEXTS):
            writer.write(f"image-{number}", png(number), "png", text)
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def loader(shards: ShardSet) -> Loader:
    return Loader(
        shards,
        SampleOrder(shards.shard_sizes, seed=0, window=1, shuffle=False),
        decode=ImageDecoder(EvalTransform(SIZE), 10_000),
        tokenize=TOKENIZE,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=5,
        num_workers=0,
        seed=0,
        max_skipped_share=0.0,
    )


@pytest.fixture(scope="module")
def model() -> TwoTower:
    torch.manual_seed(0)
    image = ImageTower("coswin_nano", embed_dim=8, image_size=SIZE)
    text = TextTower(
        width=32, num_layers=1, num_heads=2, context_length=16, embed_dim=8, vocabulary_size=49_408
    )
    return TwoTower(image, text, initial_scale=10.0)


def test_zero_shot_and_predictor_agree(shards: ShardSet, loader: Loader, model: TwoTower) -> None:
    table = shards.table()
    labels = [table.label(name, "") for name in table.texts]
    evaluator = ZeroShot(loader, table.texts, TEMPLATES["simple"], TOKENIZE, labels=labels)
    result = evaluator.predict(model)
    assert result.keys == tuple(f"image-{number}" for number in range(len(TEXTS)))
    assert result.truths == TEXTS
    assert result.num_classes == 6
    right = [guesses[0] == text for guesses, text in zip(result.guesses, TEXTS, strict=True)]
    assert evaluator(model)["zero_shot/top1"] == pytest.approx(np.mean(right))

    pretrained = Pretrained(
        name="small",
        model=model,
        tokenize=TOKENIZE,
        transform=EvalTransform(SIZE),
        image_size=SIZE,
        context_length=16,
        identity="small",
    )
    predictor = Predictor(pretrained, batch_size=3)
    images = [Image.open(io.BytesIO(shards.read(index).image)) for index in range(len(TEXTS))]
    predicted = predictor.classify(images, table.texts)
    for found, guesses, shares in zip(
        predicted, result.guesses, result.probabilities.tolist(), strict=True
    ):
        assert tuple(name for name, _ in found) == guesses
        assert [share for _, share in found] == pytest.approx(shares, abs=1e-4)


def test_retrieval_agrees_with_all_similarities(loader: Loader, model: TwoTower) -> None:
    metrics = Retrieval(loader, TOKENIZE)(model)
    names = list(dict.fromkeys(TEXTS))
    images, texts = embed_images(model, loader).embeddings, embed_texts(model, names, TOKENIZE)
    right = torch.tensor([[name == text for name in names] for text in TEXTS])
    for direction, scores, pairs in (
        ("i2t", images @ texts.T, right),
        ("t2i", texts @ images.T, right.T),
    ):
        best = scores.masked_fill(~pairs, -2).amax(dim=1, keepdim=True)
        ranks = (~pairs & (scores >= best)).sum(dim=1)
        for k in (1, 5, 10):
            expected = (ranks < k).double().mean().item()
            assert metrics[f"retrieval/{direction}_r{k}"] == pytest.approx(expected)
