"""The papers' protocols: a model and a set of images in, figures out (Florence 3.1 to 3.5)."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from unicl.data.hash_table import normalise
from unicl.data.image_sets import CaptionSet, ClassificationSet, ImageSet
from unicl.data.reader import Decode
from unicl.errors import UsageError
from unicl.evaluation.cache import (
    Setting,
    classifier,
    decoder_of,
    image_embeddings,
    texts_embeddings,
)
from unicl.evaluation.embeddings import device_of
from unicl.evaluation.few_shot import draw_episodes
from unicl.evaluation.few_shot import few_shot as train_heads
from unicl.evaluation.linear_probe import LinearProbe, Search, search
from unicl.evaluation.metrics import (
    bootstrap_interval,
    class_ranks,
    mean_average_precision,
    mean_interpolated_average_precision,
    mean_per_class,
    top_k_accuracy,
    wilson_interval,
)
from unicl.evaluation.results import Result
from unicl.evaluation.retrieval import rank_metrics, right_ranks
from unicl.evaluation.zero_shot import rank_classes
from unicl.towers.pretrained import Pretrained

# Of a training split without a validation split, this share chooses the regularisation.
_HELD_BACK = 0.2
_KS = (1, 5, 10)
# Images named right, and as many named wrong, that a report shows.
_EXAMPLES = 12

Figures = tuple[dict[str, float], tuple[float, float] | None]
"""Metrics by name, and the 95% interval of the headline where there is one."""


@dataclass(frozen=True)
class Example:
    """One image and what it was taken for."""

    index: int
    """Its number in the set."""
    truth: str
    """Its class."""
    guesses: tuple[tuple[str, float], ...]
    """The best classes and their probabilities, best first."""
    right: bool
    """Whether its class is the first guess."""


@dataclass(frozen=True)
class Answers:
    """What the images of a set with one class each were taken for."""

    class_names: tuple[str, ...]
    """Names of the classes."""
    confusion: Int64[np.ndarray, "num_classes num_classes"]
    """Images by their class and by the first guess."""
    examples: tuple[Example, ...]
    """Some named right and some named wrong, spread evenly over the set."""


def zero_shot(
    model: Pretrained,
    images: ClassificationSet,
    setting: Setting,
    *,
    templates: Sequence[str] | None = None,
) -> tuple[Result, Answers | None]:
    """Name images by the nearest prompt ensemble (Florence 3.1).

    Args:
        model: the model.
        images: the images, their class names and the metric of the set.
        setting: how to embed.
        templates: another prompt ensemble than the set's own.

    Returns:
        The result, and what the images were taken for, if each has one class.
    """
    start = time.perf_counter()
    templates = images.templates if templates is None else tuple(templates)
    embedded = image_embeddings(model, images, setting)
    classes = classifier(
        model,
        images.class_names,
        templates,
        setting,
        short_text_words=images.short_text_words,
    )
    rows = embedded.rows.numpy()
    answers = None
    if images.targets.ndim == 1:
        targets = torch.from_numpy(images.targets[rows])
        best, shares, ranks = rank_classes(
            embedded.embeddings,
            classes,
            targets,
            scale=model.model.scale().item(),
            twins=_twins(images.class_names),
        )
        figures = _of_ranks(ranks, targets, images)
        answers = Answers(
            images.class_names,
            _confusion(len(images.class_names), targets, best[:, 0]),
            _examples(images.class_names, rows, targets, best, shares, ranks),
        )
    else:
        figures = _of_scores(embedded.embeddings @ classes.T, images, rows)
    protocol = {"num_classes": len(images.class_names), "num_templates": len(templates)}
    skipped = _left_out(images, embedded.skipped)
    return (
        _result("zero_shot", model, images, setting, figures, len(rows), skipped, protocol, start),
        answers,
    )


def recognition(
    model: Pretrained, images: ClassificationSet, setting: Setting
) -> tuple[Result, Answers]:
    """Name samples by the model's own classification head (Florence 3.8, 3.9).

    Args:
        model: with a head; its probabilities are the mean over a sample's views.
        images: samples of one class each; the head must know the classes' names.
        setting: how to embed.

    Raises:
        UsageError: the model has no head, or another one's, or samples have several classes.
    """
    start = time.perf_counter()
    if not model.classes:
        raise UsageError(f"{model.name} has no classification head; ask for its zero-shot task")
    if images.targets.ndim == 2:
        raise UsageError(f"a head names one class per sample; {images} has several")
    numbers = {normalise(name): number for number, name in enumerate(model.classes)}
    unknown = [name for name in images.class_names if normalise(name) not in numbers]
    if unknown:
        raise UsageError(
            f"the head of {model.name} does not know {len(unknown)} of the "
            f"{len(images.class_names)} classes of {images}, such as {unknown[0]!r}: it was "
            "trained on another set"
        )
    own = np.array([numbers[normalise(name)] for name in images.class_names])
    embedded = image_embeddings(model, images, setting)
    rows, scores = embedded.rows.numpy(), embedded.embeddings
    targets = torch.from_numpy(own[images.targets[rows]])
    ranks = class_ranks(scores, targets)
    shares, best = scores.topk(min(5, scores.shape[1]))
    answers = Answers(
        model.classes,
        _confusion(len(model.classes), targets, best[:, 0]),
        _examples(model.classes, rows, targets, best, shares, ranks),
    )
    figures = _of_ranks(ranks, targets, images)
    protocol = {"num_classes": len(model.classes)}
    skipped = _left_out(images, embedded.skipped)
    return (
        _result("fine_tune", model, images, setting, figures, len(rows), skipped, protocol, start),
        answers,
    )


def linear_probe(
    model: Pretrained,
    train: ClassificationSet,
    validation: ClassificationSet | None,
    test: ClassificationSet,
    setting: Setting,
) -> tuple[Result, Search]:
    """Fit a logistic regression on frozen features, and test it (Florence 3.2; CLIP A.3).

    Args:
        model: the model.
        train: images to fit on.
        validation: images to choose the regularisation on; None holds a fifth of `train` back. The
            final probe is fitted on both.
        test: images to test on.
        setting: how to embed.

    Raises:
        UsageError: the parts have other classes.
    """
    start = time.perf_counter()
    for part in (validation, test):
        if part is not None and part.class_names != train.class_names:
            raise UsageError(
                f"{train} has {len(train.class_names)} classes, {part} has others or "
                f"{len(part.class_names)}: a probe needs the same classes in all parts"
            )
    features, targets, rows, skipped = _features(model, train, setting)
    if validation is None:
        kept = _kept(len(features))
        fitted_on, chosen_on = _parted(features, kept)
        parts = (fitted_on, targets[kept], chosen_on, targets[~kept])
        chosen_rows, chosen_from = rows[~kept.numpy()], train
    else:
        chosen_on, chosen_targets, chosen_rows, more = _features(model, validation, setting)
        parts = (features, targets, chosen_on, chosen_targets)
        chosen_from = validation
        skipped += more
    metric: Callable[..., float] = top_k_accuracy
    if train.targets.ndim == 2:
        metric = _precision_of(chosen_from, chosen_rows)
    device = device_of(model.model)
    found = search(
        *(part.to(device) for part in parts), num_classes=len(train.class_names), metric=metric
    )
    probe = replace(
        found.probe,
        weight=found.probe.weight.cpu(),
        bias=found.probe.bias.cpu(),
        names=train.class_names,
        model=model.fingerprint,
    )
    result = ask_probe(probe, model, test, setting)
    return (
        replace(
            result,
            protocol={
                **result.protocol,
                **({"skipped_in_train": dict(skipped)} if skipped else {}),
                "num_train": len(parts[0]) + len(parts[2]),
                "chosen_on": "a fifth of train" if validation is None else str(validation),
                "chosen_at": found.metric,
            },
            seconds=time.perf_counter() - start,
        ),
        replace(found, probe=probe),
    )


def ask_probe(
    probe: LinearProbe, model: Pretrained, test: ClassificationSet, setting: Setting
) -> Result:
    """Test a probe that was fitted before.

    Raises:
        UsageError: probe and set have other classes, or probe and model another width.
    """
    start = time.perf_counter()
    names = probe.names or test.class_names
    if len(probe.weight) != len(test.class_names) or names != test.class_names:
        raise UsageError(
            f"the probe has {len(probe.weight)} classes, {test} has others or "
            f"{len(test.class_names)}: fit one on this set"
        )
    if probe.model not in (None, model.fingerprint):
        raise UsageError(
            f"the probe was fitted on features of another model than {model.name}, or of other "
            "weights or a transform of it: fit one on this model"
        )
    embedded = image_embeddings(model, test, setting)
    rows = embedded.rows.numpy()
    figures = _of_scores(probe.scores(embedded.features), test, rows)
    protocol = {"strength": probe.strength, "width": embedded.features.shape[1]}
    skipped = _left_out(test, embedded.skipped)
    return _result(
        "linear_probe", model, test, setting, figures, len(rows), skipped, protocol, start
    )


def few_shot(
    model: Pretrained,
    images: ClassificationSet,
    setting: Setting,
    *,
    shots: Sequence[int] = (5, 20, 50),
    num_episodes: int = 600,
    seed: int = 0,
) -> Result:
    """Learn five classes from a few images each, again and again (Florence 3.4).

    Args:
        model: the model; it stays as it is, where the paper tunes it in each episode.
        images: a set with one class per image.
        setting: how to embed.
        shots: images to learn from per class.
        num_episodes: how often for each.
        seed: decides the episodes.

    Raises:
        UsageError: images have several classes, or too few classes have enough images.
    """
    start = time.perf_counter()
    if images.targets.ndim == 2:
        raise UsageError(f"few-shot episodes need one class per image; {images} has several")
    features, targets, _, skipped = _features(model, images, setting)
    mirrored = _features(_mirrored(model), images, setting)[0]
    views = torch.stack([features, mirrored]).to(device_of(model.model))
    metrics, intervals = {}, {}
    for shot in shots:
        episodes = draw_episodes(targets.numpy(), shot=shot, num_episodes=num_episodes, seed=seed)
        accuracies = train_heads(views, episodes, seed=seed)
        metrics[f"{shot}_shot"] = accuracies.mean
        intervals[f"{shot}_shot"] = accuracies.interval
    headline = next(iter(metrics))
    protocol = {
        "num_episodes": num_episodes,
        "seed": seed,
        "backbone": "frozen",
        "intervals": intervals,
    }
    figures = metrics, intervals[headline]
    result = _result(
        "few_shot", model, images, setting, figures, len(features), skipped, protocol, start
    )
    return replace(result, headline=headline)


def retrieval(model: Pretrained, images: CaptionSet, setting: Setting) -> Result:
    """Find texts by images and images by texts (Florence 3.5).

    Each caption asks by itself. Equal captions are one text, which is right for all their images:
    no model could tell them apart. The papers take a caption to be right for its own image only;
    the result says how many captions that concerns.
    """
    start = time.perf_counter()
    embedded = image_embeddings(model, images, setting)
    asked = CaptionPairs.of(images, embedded.rows.tolist())
    unique = texts_embeddings(model, asked.texts, setting)
    right = asked.right
    sides = {
        "i2t": right_ranks(embedded.embeddings, unique, right),
        "t2i": right_ranks(unique, embedded.embeddings, right.flip(1), asked.times),
    }
    # No interval: captions of one image do not fail or succeed independently.
    figures = recall_figures(sides), None
    num_images = len(embedded.rows)
    skipped = _left_out(images, embedded.skipped)
    return _result(
        "retrieval", model, images, setting, figures, num_images, skipped, asked.about, start
    )


def recall_figures(sides: Mapping[str, Int[Tensor, " num_ranks"]]) -> dict[str, float]:
    """Return the figures of retrieval, from the ranks of right items in each direction."""
    return {
        f"{side}_{name}": value
        for side, ranks in sides.items()
        for name, value in rank_metrics(ranks, _KS).items()
    }


@dataclass(frozen=True, kw_only=True)
class CaptionPairs:
    """The unique captions of a set's images, and which of them belong together."""

    texts: tuple[str, ...]
    """Unique captions."""
    right: Int[Tensor, "num_pairs 2"]
    """Number of the image and number of the text of each pair, without repetition."""
    times: Int[Tensor, " num_texts"]
    """How often each text asks."""

    @classmethod
    def of(cls, images: CaptionSet, rows: Sequence[int]) -> "CaptionPairs":
        """Find them among some of a set's images, which are numbered from 0 on."""
        captions = [images.captions[row] for row in rows]
        number = {text: 0 for texts in captions for text in texts}
        number = {text: place for place, text in enumerate(number)}
        asked = [(owner, number[text]) for owner, texts in enumerate(captions) for text in texts]
        times = torch.tensor([text for _, text in asked]).bincount()
        return cls(texts=tuple(number), right=torch.tensor(sorted(set(asked))), times=times)

    @property
    def about(self) -> dict[str, int]:
        """How many captions ask, and how many of them are right for several images."""
        shared = self.right[:, 1].bincount() > 1
        total = int(self.times.sum())
        return {"num_texts": total, "shared_captions": int(self.times[shared].sum())}


def _result(
    task: Any,
    model: Pretrained,
    images: ImageSet,
    setting: Setting,
    figures: Figures,
    num_images: int,
    skipped: Mapping[str, int],
    protocol: Mapping[str, Any],
    start: float,
) -> Result:
    metrics, interval = figures
    return Result(
        task=task,
        dataset=images.name,
        model=model.name,
        metrics=metrics,
        headline=images.metric if isinstance(images, ClassificationSet) else "t2i_r1",
        interval=interval,
        num_images=num_images,
        skipped=dict(skipped),
        protocol={
            "split": images.split,
            "image_size": model.image_size,
            "precision": "fp32" if setting.autocast is None else str(setting.autocast)[6:],
            **model.reading,
            **({"mark": model.mark} if model.mark else {}),
            **protocol,
        },
        seconds=time.perf_counter() - start,
    )


def _features(
    model: Pretrained, images: ClassificationSet, setting: Setting
) -> tuple[
    Float[Tensor, "num_images width"],
    Int[Tensor, " num_images"] | Bool[Tensor, "num_images num_classes"],
    Int64[np.ndarray, " num_images"],
    Counter[str],
]:
    embedded = image_embeddings(model, images, setting)
    rows = embedded.rows.numpy()
    targets = torch.from_numpy(images.targets[rows])
    return embedded.features, targets, rows, _left_out(images, embedded.skipped)


def _precision_of(
    images: ClassificationSet, rows: Int64[np.ndarray, " num_images"]
) -> Callable[..., float]:
    """Return the set's own mean precision, of what counts in these rows."""
    precision = mean_average_precision
    if images.metric == "map11":
        precision = mean_interpolated_average_precision
    if images.counted is None:
        return precision
    counted = torch.from_numpy(images.counted[rows])
    return lambda scores, targets: precision(scores, targets, counted.to(scores.device))


def _left_out(images: ImageSet, unread: Mapping[str, int]) -> Counter[str]:
    return Counter(images.skipped) + Counter(unread)


def _kept(num_images: int) -> Bool[Tensor, " num_images"]:
    """Say which images of a training split are fitted on; the others choose."""
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(num_images, dtype=torch.bool)
    kept[shuffled[: max(1, round(_HELD_BACK * num_images))]] = False
    return kept


def _parted(
    features: Float[Tensor, "num_images width"], kept: Bool[Tensor, " num_images"]
) -> tuple[Float[Tensor, "num_kept width"], Float[Tensor, "num_others width"]]:
    """Part the rows in place, each side in its order: a large set does not fit twice."""
    others = features[~kept]
    end = 0
    # Rows only move up, so that none is overwritten before it has moved.
    for places in kept.nonzero()[:, 0].split(8192):
        start, end = end, end + len(places)
        features[start:end] = features[places]
    features[end:] = others
    return features[:end], features[end:]


def _of_scores(
    scores: Float[Tensor, "num_images num_classes"],
    images: ClassificationSet,
    rows: Int64[np.ndarray, " num_images"],
) -> Figures:
    targets = torch.from_numpy(images.targets[rows])
    if images.targets.ndim == 1:
        return _of_ranks(class_ranks(scores, targets), targets, images)
    counted = torch.ones_like(targets)
    if images.counted is not None:
        counted = torch.from_numpy(images.counted[rows])
    tables = (scores, targets, counted)
    kinds = {"map11": mean_interpolated_average_precision, "map": mean_average_precision}
    interval = bootstrap_interval(kinds[images.metric], *tables, num_draws=200)
    return {name: kind(*tables) for name, kind in kinds.items()}, interval


def _of_ranks(
    ranks: Int[Tensor, " num_images"],
    targets: Int[Tensor, " num_images"],
    images: ClassificationSet,
) -> Figures:
    right = (ranks < 1).double()
    metrics = {
        "top1": right.mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "mean_per_class": mean_per_class(right, targets),
    }
    if images.metric == "mean_per_class":
        return metrics, bootstrap_interval(mean_per_class, right, targets)
    return metrics, wilson_interval(metrics["top1"], len(ranks))


def _twins(names: Sequence[str]) -> Int[Tensor, " num_classes"]:
    """Return for each class the first one that has its name."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(name, number) for number, name in enumerate(names)])


def _confusion(
    num_classes: int, targets: Tensor, guesses: Tensor
) -> Int64[np.ndarray, "num_classes num_classes"]:
    cells = (targets * num_classes + guesses).bincount(minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).numpy()


def _examples(
    names: Sequence[str],
    rows: Int64[np.ndarray, " num_images"],
    targets: Tensor,
    best: Tensor,
    shares: Tensor,
    ranks: Tensor,
) -> tuple[Example, ...]:
    """Choose images spread evenly over the set, so that nobody picks the pretty ones."""
    chosen = []
    for right in (True, False):
        places = ((ranks < 1) == right).nonzero()[:, 0]
        count = min(_EXAMPLES, len(places))
        chosen += [(int(places[n * len(places) // count]), right) for n in range(count)]
    return tuple(
        Example(
            index=int(rows[place]),
            truth=names[int(targets[place])],
            guesses=tuple(
                (names[number], share)
                for number, share in zip(best[place].tolist(), shares[place].tolist(), strict=True)
            ),
            right=right,
        )
        for place, right in chosen
    )


@dataclass(frozen=True)
class _Mirror:
    """Decodes what another decoder does, mirrored, left to right."""

    decode: Decode

    def __call__(self, encoded: bytes, seed: int) -> Tensor:
        return self.decode(encoded, seed).flip(-1)

    def empty(self) -> Tensor:
        return self.decode.empty()


def _mirrored(model: Pretrained) -> Pretrained:
    return replace(model, decode=_Mirror(decoder_of(model)), identity=f"{model.identity}, mirrored")
