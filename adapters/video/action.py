"""Action recognition with a classification head (Florence 3.8, 3.9)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.video.towers import VideoClassifier
from unicl.data.loader import Loader
from unicl.distributed import ALONE, Ranks, whole_means
from unicl.engine.task import TaskInputs
from unicl.errors import UsageError
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.metrics import class_ranks


class ActionRecognition:
    """Clips and their classes into the cross-entropy of a head, with label smoothing.

    Args:
        model: Clips into logits.
        labels: Label of each class, in the order of the head's outputs.
        label_smoothing: Share of the target that all classes divide among them.
        ranks: The processes that share a batch.
    """

    def __init__(
        self,
        model: VideoClassifier,
        labels: Sequence[int],
        *,
        label_smoothing: float = 0.1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.label_smoothing = label_smoothing
        self.ranks = ranks
        self._classes = Classes(labels)

    def inputs(self, batch: Any) -> TaskInputs:
        """Lay out clips and the numbers of their classes."""
        return TaskInputs(
            towers={"image": batch.images}, context={"targets": self._classes.of(batch.labels)}
        )

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Return the logits [n, classes] of clips."""
        return self.model.logits(rows)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean cross-entropy over the whole batch, and the share named right."""
        logits, targets = embeddings["image"], context["targets"]
        own = F.cross_entropy(
            logits, targets, label_smoothing=self.label_smoothing, reduction="sum"
        )
        right = (logits.argmax(-1) == targets).sum().to(own.dtype)
        count = own.new_tensor([len(targets)])
        (loss,), (share,) = whole_means(own[None], count, self.ranks, right[None])
        return loss, {"top1": share}


class Recognition:
    """Evaluator: how often the head's best guess, or one of its best five, is right.

    Args:
        loader: Held-out clips.
        labels: Label of each class, in the order of the head's outputs.
    """

    def __init__(self, loader: Loader, labels: Sequence[int]) -> None:
        self.loader = loader
        self._classes = Classes(labels)

    def __call__(self, model: VideoClassifier) -> dict[str, float]:
        """Return `recognition/top1` and `recognition/top5`."""
        embedded = embed_images(model, self.loader, contents=False)
        ranks = class_ranks(embedded.embeddings, self._classes.of(embedded.labels))
        return {f"recognition/top{k}": (ranks < k).double().mean().item() for k in (1, 5)}


class Classes:
    """Numbers of classes by the labels of their texts.

    Args:
        labels: Label of each class, all different.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self._sorted, self._numbers = torch.tensor(list(labels)).sort()

    def of(self, labels: Tensor) -> Tensor:
        """Return the numbers [n] of labels [n].

        Raises:
            UsageError: A label is no class's.
        """
        places = torch.searchsorted(self._sorted, labels).clamp(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[places], labels):
            raise UsageError("a clip's text is none of the head's classes; train on one set only")
        return self._numbers[places]
