"""Each protocol on equal embeddings beside CLIP_benchmark and scikit-learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor

from tests.unicl.evaluation.toys import ToyModel, tokenize, toy
from unicl.data.image_sets import CaptionSet, ClassificationSet, open_image_set
from unicl.data.image_sets.images import PixelArray
from unicl.errors import UsageError
from unicl.evaluation import protocols
from unicl.evaluation.cache import Setting, classifier, image_embeddings
from unicl.evaluation.linear_probe import LinearProbe, Search, search
from unicl.evaluation.protocols import (
    ask_probe,
    few_shot,
    linear_probe,
    recognition,
    retrieval,
    zero_shot,
)
from unicl.evaluation.results import read_results, save_result, to_csv
from unicl.towers.pretrained import Pretrained


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return toy()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(batch_size=100, num_workers=0, cache=tmp_path_factory.mktemp("cache"))


def digits(split: str = "test") -> ClassificationSet:
    opened = open_image_set("digits", split=split, root=Path())
    assert isinstance(opened, ClassificationSet)
    return opened


class Peer:
    """What CLIP_benchmark takes for a model: images are numbers of what is embedded already."""

    def __init__(self, model: Pretrained, embeddings: Tensor) -> None:
        self.model, self.embeddings = model.model, embeddings

    def encode_image(self, numbers: Tensor) -> Tensor:
        return self.embeddings[numbers]

    def encode_text(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.encode_text(tokens)


def peer_zero_shot(
    model: Pretrained, images: ClassificationSet, embeddings: Tensor
) -> dict[str, float]:
    """CLIP_benchmark's logits, and what scikit-learn makes of them.

    Its own `accuracy` turns an array of one element into a number, which NumPy 2.4 refuses.
    """
    peer, names = Peer(model, embeddings), list(images.class_names)
    templates = [template.replace("{}", "{c}") for template in images.templates]
    classes = zeroshot_classification.zero_shot_classifier(
        peer, tokenize, names, templates, "cpu", False
    )
    targets = torch.from_numpy(images.targets)
    batches = zip(torch.arange(len(targets)).split(64), targets.split(64), strict=True)
    logits, truth = zeroshot_classification.run_classification(peer, classes, batches, "cpu", False)
    top1, top5 = (
        top_k_accuracy_score(truth, logits, k=k, labels=range(len(names))) for k in (1, 5)
    )
    balanced = balanced_accuracy_score(truth, logits.argmax(dim=1))
    return {"acc1": top1, "acc5": top5, "mean_per_class_recall": balanced}


def test_zero_shot_is_clip_benchmarks(model: Pretrained, setting: Setting) -> None:
    images = digits()
    result, answers = zero_shot(model, images, setting)
    embeddings = image_embeddings(model, images, setting).embeddings
    theirs = peer_zero_shot(model, images, embeddings)
    assert result.to_json()["metrics"] == pytest.approx(theirs, abs=1e-6)
    assert result.interval[0] < result.metrics["top1"] < result.interval[1]
    assert answers.confusion.sum() == 500
    assert answers.confusion.trace() == pytest.approx(500 * result.metrics["top1"])
    np.testing.assert_array_equal(answers.confusion.sum(axis=1), np.bincount(images.targets))
    for example in answers.examples:
        assert example.truth == images.class_names[images.targets[example.index]]
        assert (example.guesses[0][0] == example.truth) == example.right
    assert len(answers.examples) == 24


def test_of_classes_of_one_name_the_first_is_the_answer(
    model: Pretrained, setting: Setting
) -> None:
    names = ("zero", "one", "two", "three", "zero", "five", "six", "two", "eight", "nine")
    images = replace(digits(), class_names=names)
    result, _ = zero_shot(model, images, setting)
    without = [number for number in range(10) if number not in (4, 7)]
    first = np.array([0, 1, 2, 3, 0, 4, 5, 2, 6, 7])[images.targets]
    merged = replace(images, class_names=tuple(names[number] for number in without), targets=first)
    _, answers = zero_shot(model, merged, setting)
    second = np.isin(images.targets, (4, 7))
    right = answers.confusion.trace() - _right(model, merged, setting, second)
    assert result.metrics["top1"] == pytest.approx(right / 500)


def _right(model: Pretrained, images: ClassificationSet, setting: Setting, rows: np.ndarray) -> int:
    embedded = image_embeddings(model, images, setting).embeddings[rows]
    classes = classifier(model, images.class_names, images.templates, setting)
    return int(((embedded @ classes.T).argmax(dim=1).numpy() == images.targets[rows]).sum())


def test_several_classes_per_image(model: Pretrained, setting: Setting) -> None:
    images = digits()
    shown = np.random.default_rng(0).random((500, 10)) < 0.2
    counted = np.random.default_rng(1).random((500, 10)) < 0.9
    several = replace(images, targets=shown, metric="map11")
    result, answers = zero_shot(model, several, setting)
    assert answers is None
    assert set(result.metrics) == {"map11", "map"}
    assert 0 < result.metrics["map11"] < 1
    embedded = image_embeddings(model, several, setting).embeddings
    scores = embedded @ classifier(model, images.class_names, images.templates, setting).T
    theirs = zeroshot_classification.average_precision_per_class(scores, torch.from_numpy(shown))
    assert result.metrics["map"] == pytest.approx(theirs.mean().item(), abs=1e-6)
    fewer, _ = zero_shot(model, replace(several, counted=counted), setting)
    assert fewer.metrics["map11"] != result.metrics["map11"]
    with pytest.raises(UsageError, match="few-shot episodes need one class per image"):
        few_shot(model, several, setting)


def test_the_probe_is_scikit_learns(model: Pretrained, setting: Setting, tmp_path: Path) -> None:
    train, validation, test = digits("train"), digits("val"), digits()
    result, found = linear_probe(model, train, validation, test, setting)
    x, targets = [], []
    for part in (train, validation):
        x.append(image_embeddings(model, part, setting).features.numpy())
        targets.append(part.targets)
    # To the end: with its own tolerance it stops early on features of bytes.
    peer = LogisticRegression(C=found.strength, max_iter=10_000, tol=1e-8)
    peer.fit(np.concatenate(x), np.concatenate(targets))
    asked = image_embeddings(model, test, setting).features.numpy()
    accuracy = peer.score(asked, test.targets)
    assert result.metrics["top1"] == pytest.approx(accuracy, abs=0.002 + 1e-9)
    balanced = balanced_accuracy_score(test.targets, peer.predict(asked))
    assert result.metrics["mean_per_class"] == pytest.approx(balanced, abs=0.004)
    assert result.protocol["num_train"] == 1297
    assert result.to_json()["metrics"]["lp_acc1"] == result.metrics["top1"]
    found.probe.save(tmp_path / "probe.safetensors")
    again = ask_probe(LinearProbe.load(tmp_path / "probe.safetensors"), model, test, setting)
    assert again.metrics == result.metrics


def test_a_probe_without_a_validation_split_holds_images_back(
    model: Pretrained, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Tensor] = []

    def spy(*given: Tensor, **options: object) -> Search:
        parts.extend(given)
        return search(*given, **options)

    monkeypatch.setattr(protocols, "search", spy)
    train, test = (
        replace(digits(split), skipped={"broken link": count})
        for split, count in (("train", 3), ("test", 2))
    )
    result, _ = linear_probe(model, train, None, test, setting)
    assert result.left_out == "2 (broken link: 2), 3 of train (broken link: 3)"
    # The fifth that a seed draws, each side in its order, and no copy of what is fitted on.
    features = image_embeddings(model, digits("train"), setting).features
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200]
    held_back = torch.zeros(1000, dtype=torch.bool).index_fill(0, drawn, value=True)
    for found, expected in zip(
        parts[::2], (features[~held_back], features[held_back]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert parts[0].untyped_storage().data_ptr() == parts[2].untyped_storage().data_ptr()
    assert result.protocol["num_train"] == 1000
    assert result.protocol["chosen_on"] == "a fifth of train"
    assert result.metrics["top1"] > 0.7


def test_a_probe_of_other_classes(model: Pretrained, setting: Setting) -> None:
    other = replace(digits(), class_names=(*digits().class_names[:-1], "ten"))
    with pytest.raises(UsageError, match=r"digits \(train\) has 10 classes, digits \(test\) has"):
        linear_probe(model, digits("train"), None, other, setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another"}, "fitted on features of another model than toy"),
        ({"names": None, "weight": torch.ones(3, 48), "bias": torch.ones(3)}, "has 3 classes"),
        ({"weight": torch.ones(10, 9)}, "features of width 9, these are 48 wide"),
    ],
)
def test_a_probe_that_does_not_belong_here(
    model: Pretrained, setting: Setting, changes: dict[str, object], message: str
) -> None:
    names = digits().class_names
    fields = {"weight": torch.ones(10, 48), "bias": torch.ones(10), "names": names, **changes}
    with pytest.raises(UsageError, match=message):
        ask_probe(LinearProbe(strength=1.0, **fields), model, digits(), setting)


def test_a_score_that_is_no_number_is_no_right_answer(model: Pretrained, setting: Setting) -> None:
    probe = LinearProbe(weight=torch.full((10, 48), torch.nan), bias=torch.ones(10), strength=1.0)
    assert ask_probe(probe, model, digits(), setting).metrics["top1"] == 0


def test_few_shot_names_its_difference(model: Pretrained, setting: Setting) -> None:
    result = few_shot(model, digits("train"), setting, shots=(5, 20), num_episodes=4)
    assert result.headline == "5_shot"
    assert result.metrics["20_shot"] > 0.4
    assert result.protocol["backbone"] == "frozen"
    assert result.protocol["intervals"]["20_shot"][1] > result.metrics["20_shot"]


@pytest.fixture(scope="module")
def captioned() -> CaptionSet:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3), np.uint8)
    letters = np.random.default_rng(1).integers(97, 123, (60, 5, 12), np.uint8)
    captions = tuple(
        tuple(text.tobytes().decode() for text in letters[row, : 1 + row % 5]) for row in range(60)
    )
    return CaptionSet(
        name="noise", split="test", splits=("test",), images=PixelArray(pixels, "noise"),
        captions=captions,
    )  # fmt: skip


def test_retrieval_is_clip_benchmarks(
    model: Pretrained, setting: Setting, captioned: CaptionSet
) -> None:
    result = retrieval(model, captioned, setting)
    embeddings = image_embeddings(model, captioned, setting).embeddings
    batches = [
        (torch.arange(start, start + 20), captioned.captions[start : start + 20])
        for start in range(0, 60, 20)
    ]
    theirs = zeroshot_retrieval.evaluate(
        Peer(model, embeddings), batches, tokenize, "cpu", False, recall_k_list=[1, 5, 10]
    )
    ours = result.to_json()["metrics"]
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert ours.keys() - theirs.keys() == {
        f"{side}_{kind}_rank" for side in ("i2t", "t2i") for kind in ("median", "mean")
    }
    assert result.protocol["num_texts"] == sum(map(len, captioned.captions))
    assert result.protocol["shared_captions"] == 0


def test_equal_captions_are_right_for_all_their_images(setting: Setting) -> None:
    class Blind(ToyModel):
        """Embeds every image of one text where the text is."""

        def encode_image(self, images: Tensor) -> Tensor:
            return self.encode_text(tokenize(["ab", "cd"]))[(images[:, 0, 0, 0] > 127).long()]

    pixels = np.repeat(np.array([[0], [255]] * 20, np.uint8), 48, axis=1).reshape(40, 4, 4, 3)
    images = CaptionSet(
        name="two",
        split="",
        splits=(),
        images=PixelArray(pixels, "two"),
        captions=(("ab",), ("cd",)) * 20,
    )
    result = retrieval(toy(Blind()), images, setting)
    assert result.metrics["i2t_r1"] == result.metrics["t2i_r1"] == 1
    assert result.protocol["num_texts"] == result.protocol["shared_captions"] == 40


def test_results_come_back_from_disk(
    model: Pretrained, setting: Setting, captioned: CaptionSet, tmp_path: Path
) -> None:
    results = [zero_shot(model, digits(), setting)[0], retrieval(model, captioned, setting)]
    for result in (*results, *results):  # measured anew, they take each other's place
        save_result(tmp_path, result)
    found = read_results(tmp_path)
    assert [result.task for result in found] == ["retrieval", "zero_shot"]
    assert found[1] == results[0]
    header, *lines = to_csv(found).splitlines()
    assert header.startswith("dataset,model,pretrained,task,language,model_fullname,acc1,acc5,")
    assert len(lines) == 2


class Head(ToyModel):
    """Gives the probabilities of ten classes, drawn once for each sum of pixels."""

    def encode_image(self, images: Tensor) -> Tensor:
        logits = super().encode_image(images)[:, :10]
        return (3 * logits).softmax(-1)


def with_head(names: tuple[str, ...]) -> Pretrained:
    return replace(toy(Head()), classes=names, identity="head")


def test_recognition_is_scikit_learns(setting: Setting) -> None:
    """The head has the set's classes in an order of its own."""
    images = digits()
    names = (*images.class_names[5:], *images.class_names[:5])
    model = with_head(names)
    result, answers = recognition(model, images, setting)
    scores = image_embeddings(model, images, setting).embeddings.numpy()
    truth = [names.index(images.class_names[number]) for number in images.targets]
    for k in (1, 5):
        expected = top_k_accuracy_score(truth, scores, k=k, labels=range(10))
        assert result.metrics[f"top{k}"] == pytest.approx(expected)
    assert result.protocol["num_classes"] == 10
    assert answers.class_names == names
    assert answers.confusion.trace() == round(result.metrics["top1"] * len(truth))


def test_recognition_needs_a_head_that_knows_the_classes(
    model: Pretrained, setting: Setting
) -> None:
    images = digits()
    with pytest.raises(UsageError, match="toy has no classification head"):
        recognition(model, images, setting)
    with pytest.raises(UsageError, match=r"does not know 1 of the 10 classes of digits .*nine"):
        recognition(with_head((*images.class_names[:9], "ten")), images, setting)
    several = replace(images, targets=np.zeros((images.num_samples, 10), bool))
    with pytest.raises(UsageError, match=r"names one class per sample; .* has several"):
        recognition(with_head(images.class_names), several, setting)
