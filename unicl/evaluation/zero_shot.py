"""Zero-shot classification with prompt ensembles (Florence 3.1; the UniCL release's protocol)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from unicl.data.hash_table import text_label
from unicl.data.loader import Tokenize
from unicl.data.prompts import fill
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import (
    Embedded,
    Samples,
    TwoTowers,
    count_before,
    embed_images,
    embed_texts,
)

# Prompts whose embeddings exist at one time while a classifier is built.
_PROMPTS_AT_ONCE = 16_384

# Images whose scores against all classes exist at one time.
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """What a zero-shot classifier said about each image."""

    keys: tuple[str, ...]
    """Keys of the images inside their shards."""
    truths: tuple[str, ...]
    """The right class name of each image."""
    guesses: tuple[tuple[str, ...], ...]
    """The best class names of each image, best first."""
    probabilities: Float[Tensor, "num_images num_guesses"]
    """Softmax over all classes of scale times similarity, for the guesses."""
    ranks: Int[Tensor, " num_images"]
    """Number of wrong classes that score at least as high as the right one; ties count as lost."""
    num_classes: int
    """Class names to choose from."""
    num_unnamed: int
    """Images left out because their text is empty, so that they have no right class."""

    def top(self, k: int) -> float:
        """Share of the images whose right class is among the best k, in 0..1."""
        return (self.ranks < k).float().mean().item()

    def rows(self, *, right: bool, count: int) -> list[int]:
        """Up to `count` rows whose first guess is right, or wrong, spread evenly over the set."""
        rows = [row for row, rank in enumerate(self.ranks.tolist()) if (rank < 1) == right]
        count = min(count, len(rows))
        return [rows[number * len(rows) // count] for number in range(count)]

    def chance(self, k: int) -> float:
        """What guessing k classes at random would score."""
        return min(k, self.num_classes) / self.num_classes

    def where(self, keep: Callable[[str], bool]) -> "ZeroShotResult":
        """The same for the images whose key satisfies `keep`: one split of a held-out set.

        Raises:
            UsageError: no key satisfies it.
        """
        rows = [row for row, key in enumerate(self.keys) if keep(key)]
        if not rows:
            raise UsageError(f"none of the {len(self.keys)} images belongs to this split")
        return replace(
            self,
            keys=tuple(self.keys[row] for row in rows),
            truths=tuple(self.truths[row] for row in rows),
            guesses=tuple(self.guesses[row] for row in rows),
            probabilities=self.probabilities[rows],
            ranks=self.ranks[rows],
        )


def class_embeddings(
    model: TwoTowers,
    names: Sequence[str],
    templates: Sequence[str],
    tokenize: Tokenize,
    *,
    short_text_words: int | None = None,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """One unit-length embedding per class: the mean over the templates, normalised again.

    Args:
        model: the two towers.
        names: the classes; equal prompts are encoded once.
        templates: the prompt ensemble, each with one `{}`.
        tokenize: texts to token numbers.
        short_text_words: names of more words stay as they are, as in training; None fills the
            templates with every name.
        batch_size: prompts per forward pass.
        autocast: type of the towers' arithmetic; None computes in the parameters' own.

    Raises:
        UsageError: there are no names or no templates, or a template has no single place for one.
    """
    if not names or not templates:
        raise UsageError("a zero-shot classifier needs at least one class name and one template")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1:
            raise UsageError(f"the template {template!r} must have {{}} once, for the class name")
    names_at_once = max(1, _PROMPTS_AT_ONCE // len(templates))
    means = []
    for start in range(0, len(names), names_at_once):
        chunk = names[start : start + names_at_once]
        prompts = [
            fill(template, name)
            if short_text_words is None or len(name.split()) <= short_text_words
            else name
            for name in chunk
            for template in templates
        ]
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        unique = embed_texts(model, list(place), tokenize, batch_size, autocast=autocast)
        ensemble = unique[[place[prompt] for prompt in prompts]]
        means.append(ensemble.unflatten(0, (len(chunk), len(templates))).mean(dim=1))
    return normalize(torch.cat(means), dim=1)


def require_unique(names: Sequence[str]) -> None:
    """Refuse class names of which one occurs twice, where the name is the answer."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"the class name {twice!r} occurs twice: name each class once")


class ZeroShot:
    """Evaluator: how often an image's own class name is the best of all, or in the best five.

    Args:
        loader: the held-out images, one text each.
        names: the class names to choose from; for a whole set, all unique texts of its hash table.
        templates: the prompt ensemble, each with one `{}`.
        tokenize: texts to token numbers.
        short_text_words: names of more words stay as they are; None fills templates with all.
        batch_size: prompts per forward pass.
        autocast: type of the towers' arithmetic; None computes in the parameters' own.
        labels: the names' labels, where the hash table had to record a collision.
        prefix: first part of the metrics' names.
    """

    def __init__(
        self,
        loader: Samples,
        names: Sequence[str],
        templates: Sequence[str],
        tokenize: Tokenize,
        *,
        labels: Sequence[int] | None = None,
        short_text_words: int | None = None,
        batch_size: int = 256,
        autocast: torch.dtype | None = None,
        prefix: str = "zero_shot",
    ) -> None:
        require_unique(names)
        if labels is None:
            labels = [text_label(name, "") for name in names]
        if len(labels) != len(names):
            raise UsageError(f"there are {len(names)} class names but {len(labels)} labels")
        self.loader = loader
        self.names = tuple(names)
        self.templates = tuple(templates)
        self.tokenize = tokenize
        self.short_text_words = short_text_words
        self.batch_size = batch_size
        self.autocast = autocast
        self.prefix = prefix
        self._class_of = {label: number for number, label in enumerate(labels)}

    def __call__(self, model: TwoTowers, embedded: Embedded | None = None) -> dict[str, float]:
        """Top-1 and top-5 accuracy in 0..1; `embedded` saves embedding the images once more."""
        result = self.predict(model, embedded)
        return {f"{self.prefix}/top{k}": result.top(k) for k in (1, 5)}

    def predict(
        self, model: TwoTowers, embedded: Embedded | None = None, *, num_guesses: int = 5
    ) -> ZeroShotResult:
        """The best guesses for each image.

        Raises:
            UsageError: an image's text is not among the class names.
            UniclError: no image has a text.
        """
        if embedded is None:
            embedded = embed_images(model, self.loader, autocast=self.autocast)
        classes, named = self._truth(embedded)
        classifier = class_embeddings(
            model,
            self.names,
            self.templates,
            self.tokenize,
            short_text_words=self.short_text_words,
            batch_size=self.batch_size,
            autocast=self.autocast,
        )
        rows = named.nonzero()[:, 0].tolist()
        best, probabilities, ranks = rank_classes(
            embedded.embeddings[rows],
            classifier,
            classes[rows],
            scale=model.scale().item(),
            num_guesses=num_guesses,
        )
        return ZeroShotResult(
            keys=tuple(embedded.keys[row] for row in rows),
            truths=tuple(self.names[number] for number in classes[rows].tolist()),
            guesses=tuple(tuple(self.names[number] for number in row) for row in best.tolist()),
            probabilities=probabilities,
            ranks=ranks,
            num_classes=len(self.names),
            num_unnamed=len(embedded.keys) - len(rows),
        )

    def _truth(
        self, embedded: Embedded
    ) -> tuple[Int[Tensor, " num_samples"], Bool[Tensor, " num_samples"]]:
        classes = [self._class_of.get(label, -1) for label in embedded.labels.tolist()]
        for number, text, key in zip(classes, embedded.texts, embedded.keys, strict=True):
            if number < 0 and text.strip():
                raise UsageError(
                    f"the text {text!r} of image {key!r} is not among the {len(self.names)} class "
                    "names: take the names from the hash table of this data set"
                )
        truth = torch.tensor(classes)
        if not (truth >= 0).any():
            raise UniclError("no image of the evaluation set has a text, so none has a right class")
        return truth, truth >= 0


def rank_classes(
    images: Float[Tensor, "num_images dim"],
    classifier: Float[Tensor, "num_classes dim"],
    classes: Int[Tensor, " num_images"],
    *,
    scale: float,
    num_guesses: int = 5,
    twins: Int[Tensor, " num_classes"] | None = None,
) -> tuple[
    Int[Tensor, "num_images num_guesses"],
    Float[Tensor, "num_images num_guesses"],
    Int[Tensor, " num_images"],
]:
    """The best classes, their probabilities, and how many wrong classes stand before the right one.

    A wrong class that scores as high as the right one stands before it: a collapsed model scores
    zero, not by luck. The scores of at most 256 images against all classes exist at one time.

    Args:
        images: unit-length embeddings.
        classifier: one unit-length embedding per class.
        classes: number of each image's class.
        scale: factor of the similarities.
        num_guesses: best classes to return.
        twins: for each class the first one of the same name, where names repeat (ImageNet's do):
            nobody could tell them apart, so the first is the answer, as everywhere else.
    """
    if twins is not None:
        classifier = classifier[twins]  # alike to the last bit
    parts = []
    for chunk, truth in zip(
        images.split(_IMAGES_AT_ONCE), classes.split(_IMAGES_AT_ONCE), strict=True
    ):
        scores = chunk @ classifier.T
        listed = torch.arange(len(classifier)).expand_as(scores)
        spared = None
        if twins is not None:
            spared = (twins == twins[truth][:, None]) & (listed > truth[:, None])
        right = listed == truth[:, None]
        ranks = count_before(scores, right, chunk, classifier, listed, spared)
        guesses = scores.topk(min(num_guesses, len(classifier)), dim=1)
        total = (scale * scores).logsumexp(dim=1, keepdim=True)
        parts.append((guesses.indices, (scale * guesses.values - total).exp(), ranks))
    best, probabilities, ranks = (torch.cat(part) for part in zip(*parts, strict=True))
    return best, probabilities, ranks
