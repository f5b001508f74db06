"""Embed a data set or a list of texts with a model's two towers; every evaluator starts here."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unicl.data.loader import Batch, Tokenize
from unicl.distributed import Ranks
from unicl.errors import UniclError, UsageError

NEAR = 1e-6
"""Similarities that differ by less may owe their order to fp32's rounding."""
# Equal embeddings need not give equal sums to the last bit of fp64.
_EQUAL = 1e-12
# So many near ones are no coincidence: the model embeds them alike.
_MOST_NEAR = 64

# Texts are sorted by length inside blocks of this many batches: long enough that every batch holds
# texts of one length (the text tower trims a batch to its longest), short enough to stay in memory.
_BATCHES_PER_BLOCK = 64

_NONE = torch.empty(0, 0)
_NO_LABELS = torch.empty(0, dtype=torch.int64)


@runtime_checkable
class TwoTowers(Protocol):
    """What an evaluator needs of a model; `unicl.towers.two_tower.TwoTower` has it."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-length fp32 embeddings [batch, dim] of images."""

    def encode_image_twice(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the fp32 features [batch, width] that they are projected from."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit-length fp32 embeddings [batch, dim] of token numbers."""

    def scale(self) -> Tensor:
        """The factor that turns similarities into logits."""

    def modules(self) -> Iterator[nn.Module]:
        """Every module of the model, itself first."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the model."""


@runtime_checkable
class Samples(Protocol):
    """A data set that can be passed over once; `unicl.data.loader.Loader` is one."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share the data set."""

    def epoch(self) -> Iterator[Batch]:
        """This rank's batches of one pass, in order."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The images of a data set as embeddings, and what belongs to each of them, row by row."""

    embeddings: Float[Tensor, "num_samples dim"]
    """Unit-length fp32 image embeddings, on the CPU."""
    features: Float[Tensor, "num_samples width"]
    """What they are projected from, in fp32; of no width unless it was asked for."""
    labels: Int[Tensor, " num_samples"]
    """Labels from the text hash table."""
    texts: tuple[str, ...]
    """Texts, before any template."""
    keys: tuple[str, ...]
    """Keys of the samples inside their shards."""
    contents: tuple[bytes, ...]
    """Digests of the pixels, if asked for: samples with equal digests show one image."""
    skipped: dict[str, int]
    """Samples that could not be read, counted by reason."""


@contextmanager
def evaluating(model: TwoTowers) -> Iterator[None]:
    """Put a model into eval mode without gradients; each module gets its own mode back."""
    # A model in eval mode is left as it is, so that several threads can use it.
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True


def embed_images(
    model: TwoTowers,
    loader: Samples,
    *,
    features: bool = False,
    contents: bool = True,
    empty: bool = False,
    autocast: torch.dtype | None = None,
) -> Embedded:
    """Embed every image of one pass over a data set; ranks share the work, and all get the result.

    Args:
        model: the two towers.
        loader: the data set.
        features: keep what the embeddings are projected from, too.
        contents: digest the pixels: 0.4 ms for 224 x 224, as long as a GPU takes to embed them.
        empty: return no rows where no sample can be read, instead of raising.
        autocast: type of the towers' arithmetic; None computes in the parameters' own.

    Raises:
        UniclError: no sample could be read, or an embedding is not finite.
    """
    ranks = loader.ranks
    own = ranks.together(lambda: _embed_own(model, loader, features, contents, autocast))
    shapes = ranks.gather_numbers(*own.embeddings.shape, own.features.shape[1])
    sizes, dims, widths = zip(*shapes, strict=True)
    bare = dataclasses.replace(own, embeddings=_NONE, features=_NONE, labels=_NO_LABELS)
    parts = ranks.gather_objects(bare)
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    if not any(sizes) and not empty:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise UniclError(f"there is no readable sample to evaluate on ({reasons or 'empty set'})")
    embedded = ranks.gather_rows(own.embeddings.view(len(own.labels), max(dims)), sizes)
    keys = tuple(key for part in parts for key in part.keys)
    _require_finite(embedded, keys, "image")
    return Embedded(
        embeddings=embedded,
        features=ranks.gather_rows(own.features.view(len(own.labels), max(widths)), sizes),
        labels=ranks.gather_rows(own.labels, sizes),
        texts=tuple(text for part in parts for text in part.texts),
        keys=keys,
        contents=tuple(content for part in parts for content in part.contents),
        skipped=dict(skipped),
    )


def _embed_own(
    model: TwoTowers,
    loader: Samples,
    with_features: bool,
    with_contents: bool,
    autocast: torch.dtype | None,
) -> Embedded:
    """Embed what of a data set is this rank's; that may be nothing."""
    device = device_of(model)
    embeddings, features, labels = [], [], [_NO_LABELS]
    texts: list[str] = []
    keys: list[str] = []
    contents: list[bytes] = []
    skipped: Counter[str] = Counter()
    with evaluating(model), computing_in(device, autocast):
        for batch in loader.epoch():
            skipped.update(batch.skipped)
            if not batch.keys:
                continue
            images = batch.images.to(device)
            if with_features:
                embedded, projected_from = model.encode_image_twice(images)
                features.append(projected_from.float().cpu())
            else:
                embedded = model.encode_image(images)
            embeddings.append(embedded.float().cpu())
            labels.append(batch.labels.cpu())
            texts.extend(batch.texts)
            keys.extend(batch.keys)
            if with_contents:
                contents.extend(_digest(image) for image in batch.images)
    return Embedded(
        embeddings=torch.cat(embeddings or [_NONE]),
        features=torch.cat(features) if features else torch.empty(len(keys), 0),
        labels=torch.cat(labels),
        texts=tuple(texts),
        keys=tuple(keys),
        contents=tuple(contents),
        skipped=dict(skipped),
    )


def embed_texts(
    model: TwoTowers,
    texts: Sequence[str],
    tokenize: Tokenize,
    batch_size: int = 256,
    *,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "num_texts dim"]:
    """Embed texts, in the order they are given; unit-length fp32, on the CPU.

    Raises:
        UniclError: there is no text, or an embedding is not finite.
    """
    if not texts:
        raise UniclError("there is no text to embed")
    device = device_of(model)
    embedded = []
    with evaluating(model), computing_in(device, autocast):
        for start in range(0, len(texts), _BATCHES_PER_BLOCK * batch_size):
            tokens = tokenize(texts[start : start + _BATCHES_PER_BLOCK * batch_size])
            order = (tokens != 0).sum(dim=1).argsort(stable=True)
            rows = [
                model.encode_text(tokens[chosen].to(device)).float().cpu()
                for chosen in order.split(batch_size)
            ]
            embedded.append(torch.cat(rows)[order.argsort()])
    embeddings = torch.cat(embedded)
    _require_finite(embeddings, texts, "text")
    return embeddings


def count_before(
    similarities: Float[Tensor, "num_queries num_listed"],
    right: Bool[Tensor, "num_queries num_listed"],
    queries: Float[Tensor, "num_queries dim"],
    items: Float[Tensor, "num_items dim"],
    listed: Int[Tensor, "num_queries num_listed"],
    spared: Bool[Tensor, "num_queries num_listed"] | None = None,
) -> Int[Tensor, " num_queries"]:
    """How many wrong items are at least as similar to each query as its most similar right one.

    Exact, as in fp64: what fp32 cannot tell apart is computed again. A tie counts against the
    right item, so that a model that embeds everything alike scores zero, not by luck.

    Args:
        similarities: in fp32, of the items that are listed for each query.
        right: which of them are right; each query must have one.
        queries: unit-length embeddings of what is asked.
        items: unit-length embeddings of what is searched.
        listed: number of each listed item.
        spared: wrong items that do not count.
    """
    counts = ~right if spared is None else ~(right | spared)
    best = similarities.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    before = (counts & (similarities >= best + NEAR)).sum(dim=1)
    near = (similarities > best - NEAR) & (similarities < best + NEAR)
    for row in (near & counts).any(dim=1).nonzero()[:, 0].tolist():
        columns = near[row].nonzero()[:, 0]
        wrong = counts[row, columns]
        if len(columns) <= _MOST_NEAR:
            exact = items[listed[row, columns]].double() @ queries[row].double()
            wrong &= exact >= exact[right[row, columns]].amax() - _EQUAL
        before[row] += wrong.sum()
    return before


def device_of(model: TwoTowers) -> torch.device:
    """Where the model's parameters lie."""
    return next(iter(model.parameters())).device


def autocast_of(precision: str) -> torch.dtype | None:
    """Return the autocast type that a precision is called by; None is fp32's.

    Raises:
        UsageError: there is no such precision.
    """
    types = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in types:
        raise UsageError(f"precision must be one of {', '.join(types)}, got {precision!r}")
    return types[precision]


def computing_in(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Compute in a type where it is safe; None leaves all as it is."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _digest(image: Tensor) -> bytes:
    return blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest()


def _require_finite(embeddings: Float[Tensor, "n dim"], names: Sequence[str], kind: str) -> None:
    # A NaN compares as false with everything, so that it would count as a right answer further on.
    wrong = (~embeddings.isfinite().all(dim=1)).nonzero()
    if len(wrong):
        raise UniclError(
            f"the embedding of {kind} {names[int(wrong[0])]!r} is not finite "
            f"({len(wrong)} of {len(embeddings)}): the weights diverged, take an older checkpoint"
        )
