"""Detection as a task: images with boxes into the losses of ATSS (Florence 2.4)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from adapters.detection.atss import Objects, losses
from adapters.detection.detector import Detector
from adapters.detection.reading import DetectionBatch
from unicl.data.order import mix
from unicl.distributed import ALONE, Ranks
from unicl.engine.task import TaskInputs
from unicl.pretraining import learns

_NAMES = int.from_bytes(b"names")


class DetectionTraining:
    """Images and their objects into the sum of ATSS's three losses.

    Where classes are texts, a step sees some of the vocabulary: the classes of the batch's objects,
    and others, drawn from those that were looked for in one of its images.

    Args:
        model: The detector.
        names: Names of the classes, where they are texts.
        tokenize: Makes token numbers of names.
        classes_per_step: Names per step and rank, unless the batch's objects have more.
        seed: Decides which names.
        ranks: The processes that share a batch.
    """

    def __init__(
        self,
        model: Detector,
        *,
        names: Sequence[str] = (),
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
        classes_per_step: int = 128,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.classes_per_step = classes_per_step
        self.seed = seed
        self.ranks = ranks
        self._tokens = tokenize(names) if tokenize is not None and model.by_text else None
        towers = {"image": model, "text": model.text}
        self._frozen = frozenset(name for name, tower in towers.items() if not learns(tower))

    def inputs(self, batch: DetectionBatch) -> TaskInputs:
        """Lay out images, the names of this step, and the objects."""
        labels, judged = batch.labels, batch.judged
        towers = {"image": batch.images}
        if self._tokens is not None:
            columns = self._choose(batch)
            towers["text"] = self._tokens[columns]
            towers["scale"] = torch.zeros(1)
            labels, judged = torch.searchsorted(columns, labels), judged[:, columns]
        context = {
            "boxes": batch.boxes,
            "labels": labels,
            "owners": batch.owners,
            "judged": judged,
            "size": torch.tensor(batch.images.shape[-2:]),
        }
        return TaskInputs(towers, context, self._frozen)

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Predict at the places of images [n, anchors, outputs], or embed names [n, dim].

        The tower "scale" is what makes logits of similarities [1, 2].
        """
        if tower == "scale":
            return self.model.class_fit()[None]
        if tower == "text":
            return self.model.name_embeddings(rows)
        return self.model.places(rows)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss over the whole batch, and its three parts."""
        fit = embeddings["scale"][0] if "scale" in embeddings else None
        prediction = self.model.predict(embeddings["image"], embeddings.get("text"), fit)
        parts = losses(
            prediction,
            self.model.anchors(*context["size"].tolist()),
            Objects(context["boxes"], context["labels"], context["owners"]),
            judged=context["judged"],
            ranks=self.ranks,
        )
        metrics: dict[str, Any] = {f"loss/{name}": part.detach() for name, part in parts.items()}
        if fit is not None:
            metrics["scale"] = fit[0].detach()
        return torch.stack(list(parts.values())).sum(), metrics

    def _choose(self, batch: DetectionBatch) -> Int64[Tensor, " columns"]:
        """Draw the classes that a step sees, in rising order; the same for the same batch."""
        present = batch.labels.unique()
        others = batch.judged.any(0)
        others[present] = False
        candidates = others.nonzero().flatten()
        room = max(0, self.classes_per_step - len(present))
        # At least one: a step of images without objects has negatives to learn from.
        if room < len(candidates):
            seed = mix(self.seed, _NAMES, batch.consumed, self.ranks.rank)
            drawn = np.random.default_rng(seed).permutation(len(candidates))[:room]
            candidates = candidates[torch.from_numpy(drawn)]
        chosen = torch.cat([present, candidates]).sort().values
        return chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
