from dataclasses import replace

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch.nn.functional import normalize

from tests.unicl.evaluation.toys import (
    NAMES,
    TEMPLATES,
    KnowingModel,
    ToyModel,
    ToySamples,
    every_name,
    tokenize,
)
from unicl.data.hash_table import text_label
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.zero_shot import ZeroShot, class_embeddings, rank_classes


def zero_shot(samples: ToySamples, names: tuple[str, ...] = NAMES, **options) -> ZeroShot:
    return ZeroShot(samples, names, ("{}",), tokenize, **options)


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_class_embedding_is_the_normalised_mean_of_unit_embeddings(batch_size: int) -> None:
    model = ToyModel().eval()
    found = class_embeddings(model, NAMES, TEMPLATES, tokenize, batch_size=batch_size)
    for name, embedding in zip(NAMES, found, strict=True):
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        expected = normalize(model.encode_text(tokenize(prompts)).mean(dim=0), dim=0)
        torch.testing.assert_close(embedding, expected.detach())


def test_classes_in_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = class_embeddings(ToyModel(), NAMES, TEMPLATES, tokenize)
    monkeypatch.setattr("unicl.evaluation.zero_shot._PROMPTS_AT_ONCE", 7)
    torch.testing.assert_close(class_embeddings(ToyModel(), NAMES, TEMPLATES, tokenize), whole)


def test_equal_prompts_are_encoded_once() -> None:
    model = ToyModel()
    class_embeddings(model, NAMES, ("{}", "a {}", "{}"), tokenize)
    assert sum(len(tokens) for tokens in model.text_batches) == 2 * len(NAMES)


def test_long_names_can_stay_as_they_are() -> None:
    model = ToyModel().eval()
    found = class_embeddings(model, NAMES, TEMPLATES, tokenize, short_text_words=2)
    bare = class_embeddings(model, NAMES, ("{}",), tokenize)
    filled = class_embeddings(model, NAMES, TEMPLATES, tokenize)
    long = NAMES.index("a very long name of a thing")
    torch.testing.assert_close(found[long], bare[long])
    short = [row for row in range(len(NAMES)) if row != long]
    torch.testing.assert_close(found[short], filled[short])


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ((), TEMPLATES, "at least one"),
        (NAMES, (), "at least one"),
    ],
)
def test_unusable_classes(names: tuple[str, ...], templates: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        class_embeddings(ToyModel(), names, templates, tokenize)


@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_ranks_give_the_accuracy_of_scikit_learn(
    num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicl.evaluation.zero_shot._IMAGES_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(num_classes)
    images = normalize(torch.randn(53, 6, generator=generator), dim=1)
    classifier = normalize(torch.randn(num_classes, 6, generator=generator), dim=1)
    classes = torch.randint(num_classes, (53,), generator=generator)
    _, _, ranks = rank_classes(images, classifier, classes, scale=20.0)
    scores = (images @ classifier.T).numpy()
    if num_classes == 2:
        scores = scores[:, 1] - scores[:, 0]  # the oracle's form for two classes
    for k in (1, 5):
        expected = (
            top_k_accuracy_score(classes.numpy(), scores, k=k, labels=range(num_classes))
            if k < num_classes
            else 1.0
        )
        assert (ranks < k).double().mean().item() == pytest.approx(expected)


def test_probabilities_are_a_softmax_over_all_classes() -> None:
    images, classifier = torch.eye(3, 5), torch.eye(4, 5)
    best, probabilities, _ = rank_classes(
        images, classifier, torch.tensor([0, 1, 2]), scale=3.0, num_guesses=4
    )
    expected = (3.0 * images @ classifier.T).softmax(dim=1).gather(1, best)
    torch.testing.assert_close(probabilities, expected)
    assert best[:, 0].tolist() == [0, 1, 2]


def test_ties_count_as_lost() -> None:
    same = normalize(torch.ones(9, 4), dim=1)
    _, _, ranks = rank_classes(same, same, torch.arange(9), scale=1.0)
    assert ranks.tolist() == [8] * 9


def test_a_model_that_knows_all_names() -> None:
    assert zero_shot(every_name())(KnowingModel()) == {"zero_shot/top1": 1.0, "zero_shot/top5": 1.0}


def test_mistakes_show_in_accuracy_and_guesses() -> None:
    model = KnowingModel(mistakes={0: 1})
    evaluator = zero_shot(every_name(), prefix="tones")
    result = evaluator.predict(model)
    assert evaluator(model)["tones/top1"] == pytest.approx(5 / 6)
    assert result.truths == NAMES * 2
    assert [row[0] for row in result.guesses[:3]] == ["dog", "dog", "red apple"]
    assert result.probabilities.shape == (12, 5)
    assert result.rows(right=False, count=9) == [0, 6]
    assert result.rows(right=True, count=2) == [1, 7]
    assert result.chance(1) == pytest.approx(1 / 6)


def test_one_split_of_a_result() -> None:
    result = zero_shot(every_name()).predict(KnowingModel(mistakes={0: 1}))
    split = result.where(lambda key: key in ("key0", "key1"))
    assert split.keys == ("key0", "key1")
    assert split.truths == ("cat", "dog")
    assert split.top(1) == 0.5
    with pytest.raises(UsageError, match="none of the 12 images"):
        result.where(lambda key: False)


def test_embeddings_are_used_again() -> None:
    model = KnowingModel(mistakes={0: 1})
    embedded = embed_images(model, every_name())
    evaluator = zero_shot(ToySamples([]))  # would raise if it embedded its own images
    assert evaluator(model, embedded)["zero_shot/top1"] == pytest.approx(5 / 6)


def test_fewer_names_than_guesses() -> None:
    samples = ToySamples([(0, "cat", 0), (1, "dog", 0)])
    result = zero_shot(samples, ("cat", "dog")).predict(KnowingModel())
    assert result.probabilities.shape == (2, 2)
    assert result.top(5) == result.chance(5) == 1.0


def test_images_without_a_text_are_left_out_and_counted() -> None:
    samples = ToySamples([(0, "cat", 0), (1, "", 0), (2, "  ", 0)])
    result = zero_shot(samples).predict(KnowingModel())
    assert result.keys == ("key0",)
    assert result.num_unnamed == 2
    with pytest.raises(UniclError, match="no image of the evaluation set has a text"):
        zero_shot(ToySamples([(1, "", 0)])).predict(KnowingModel())


def test_a_text_outside_the_names_is_an_error() -> None:
    with pytest.raises(UsageError, match="text 'whale' of image 'key1' is not among the 6"):
        zero_shot(ToySamples([(0, "cat", 0), (1, "whale", 0)]))(KnowingModel())


def test_labels_of_collided_names_are_honoured() -> None:
    samples = replace(every_name(1), labels=[10, 11, 12, 13, 14, 15])
    evaluator = zero_shot(samples, labels=[10, 11, 12, 13, 14, 15])
    assert evaluator(KnowingModel())["zero_shot/top1"] == 1.0
    with pytest.raises(UsageError, match="6 class names but 1 labels"):
        zero_shot(samples, labels=[text_label("cat", "")])
