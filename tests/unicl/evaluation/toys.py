"""A two-tower model and a data set small enough to know all answers by heart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unicl.data.augment import EvalTransform
from unicl.data.hash_table import text_label
from unicl.data.loader import Batch
from unicl.distributed import ALONE
from unicl.towers.pretrained import Pretrained
from unicl.towers.two_tower import TwoTower

CONTEXT = 48
NAMES = ("cat", "dog", "red apple", "a very long name of a thing", "tree", "moon")
TEMPLATES = ("{}", "a photo of a {}.", "art of the {}.")


def tokenize(texts: Sequence[str]) -> Tensor:
    """Bytes as tokens, padded with 0."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in enumerate(texts):
        data = torch.tensor(list(text.encode()[:CONTEXT]), dtype=torch.int64)
        tokens[row, : len(data)] = data
    return tokens


class ToyModel(TwoTower):
    """Random projections of pixels and of letter counts, with dropout that must be off."""

    def __init__(self, size: int = 4, dim: int = 16) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        generator = torch.Generator().manual_seed(0)
        self.pixels = nn.Linear(3 * size * size, dim)
        self.letters = nn.Embedding(256, dim)
        for parameter in (*self.pixels.parameters(), *self.letters.parameters()):
            nn.init.normal_(parameter, generator=generator)
        self.dropout = nn.Dropout(0.5)
        self.text_batches: list[Tensor] = []
        self.autocast: list[bool] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        features = self.pixels(images.flatten(1).float() / 255 - 0.5)
        return normalize(self.dropout(features).float(), dim=1)

    def encode_image_twice(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(images), images.flatten(1).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.text_batches.append(tokens)
        features = (self.letters(tokens) * (tokens != 0)[..., None]).sum(dim=1)
        return normalize(self.dropout(features).float(), dim=1)

    def scale(self) -> Tensor:
        return torch.tensor(10.0)


def toy(model: ToyModel | None = None) -> Pretrained:
    return Pretrained(
        name="toy",
        model=(ToyModel() if model is None else model).eval(),
        tokenize=tokenize,
        transform=EvalTransform(4),
        image_size=4,
        context_length=CONTEXT,
        identity="toy",
    )


class KnowingModel(ToyModel):
    """Embeds an image of class n, whose first pixel is n, exactly where it embeds the class's name.

    Args:
        mistakes: classes by the class that they are taken for.
    """

    def __init__(
        self, names: Sequence[str] = NAMES, mistakes: dict[int, int] | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.mistakes = mistakes or {}

    def encode_image(self, images: Tensor) -> Tensor:
        seen = [int(image[0, 0, 0]) for image in images]
        return self.encode_text(tokenize([self.names[self.mistakes.get(n, n)] for n in seen]))


@dataclass(frozen=True)
class ToySamples:
    """Samples (class, text, variant): class and variant are the image's first two pixels."""

    samples: Sequence[tuple[int, str, int]]
    batch_size: int = 4
    skipped: dict[str, int] = field(default_factory=dict)
    labels: Sequence[int] | None = None

    ranks = ALONE

    def epoch(self) -> Iterator[Batch]:
        for start in range(0, len(self.samples), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.samples)))
            chosen = [self.samples[row] for row in rows]
            images = torch.zeros(len(chosen), 3, 4, 4, dtype=torch.uint8)
            for image, (number, _, variant) in zip(images, chosen, strict=True):
                image[0, 0, 0], image[0, 0, 1] = number, variant
            texts = [text for _, text, _ in chosen]
            labels = [
                text_label(text, f"key{row}") if self.labels is None else self.labels[row]
                for row, text in zip(rows, texts, strict=True)
            ]
            yield Batch(
                images=images,
                tokens=tokenize(texts),
                labels=torch.tensor(labels),
                keys=tuple(f"key{row}" for row in rows),
                texts=tuple(texts),
                consumed=rows[-1] + 1,
                skipped=self.skipped if start == 0 else {},
            )


def every_name(repeats: int = 2) -> ToySamples:
    """Each class `repeats` times, as different images of one text."""
    return ToySamples([(n, name, v) for v in range(repeats) for n, name in enumerate(NAMES)])
