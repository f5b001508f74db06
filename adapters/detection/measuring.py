"""How well a detector finds the objects of a set: COCO's average precision."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.detection.atss import Detections
from adapters.detection.config import DetectionConfig
from adapters.detection.detector import Detector
from adapters.detection.finding import Finder
from adapters.detection.metrics import AGNOSTIC, agnostic, coco_metrics, to_coco
from adapters.detection.reading import DetectionBatch, DetectionReader, JoinedSets
from adapters.detection.sets import DetectionSet
from adapters.detection.transforms import EvalTransform
from adapters.detection.vocabulary import Vocabulary
from unicl.data.loader import BatchLoader
from unicl.data.order import SampleOrder
from unicl.distributed import ALONE, Ranks
from unicl.errors import UsageError
from unicl.evaluation.embeddings import device_of

MAX_PIXELS = 1 << 30
# A forward pass of `batch_size` images is meant for images of so many pixels; of larger ones it
# takes fewer.
_PIXELS = 224 * 224


def build_loaders(
    images: DetectionSet,
    detection: DetectionConfig,
    *,
    batch_size: int,
    num_workers: int,
    ranks: Ranks = ALONE,
) -> list[BatchLoader[DetectionBatch]]:
    """Build a loader of all images for each size that they are looked at in.

    Args:
        images: What is measured on.
        detection: The sizes.
        batch_size: Images of 224 x 224 pixels per forward pass; of larger ones fewer.
        num_workers: Processes that read them.
        ranks: The processes that share them.
    """
    samples = JoinedSets([images], Vocabulary.of_objects([images]))
    loaders = []
    for size in detection.test_sizes:
        pixels = size * min(detection.max_size, 2 * size)
        reader = DetectionReader(
            samples,
            SampleOrder(samples.shard_sizes, seed=0, window=1, shuffle=False),
            EvalTransform(size, detection.max_size),
            0,
            MAX_PIXELS,
            pixels,
        )
        loaders.append(
            BatchLoader[DetectionBatch](
                reader,
                batch_size=max(1, batch_size * _PIXELS // pixels) * ranks.size,
                num_workers=num_workers,
                max_skipped_share=None,
                ranks=ranks,
            )
        )
    return loaders


class AveragePrecision:
    """Evaluator: COCO's metrics on held-out images.

    Args:
        images: What is measured on.
        loaders: What `build_loaders` made.
        detection: The detector, and how it looks at images.
        tokenize: Makes token numbers of names.
        ranks: The processes that share the work.
    """

    def __init__(
        self,
        images: DetectionSet,
        loaders: Sequence[BatchLoader[DetectionBatch]],
        detection: DetectionConfig,
        *,
        tokenize: Callable[[Sequence[str]], Tensor],
        ranks: Ranks = ALONE,
    ) -> None:
        self.images, self.loaders, self.detection = images, loaders, detection
        self.ranks = ranks
        self._tokens = tokenize(images.class_names) if detection.classes == "texts" else None

    def __call__(self, model: Detector) -> dict[str, float]:
        """Return `detection/ap`, `detection/ap50`, ...; recall where objects have no class."""
        names = None
        if self._tokens is not None:
            names = model.name_embeddings(self._tokens.to(device_of(model)))
        finder = Finder(model, self.detection, names)
        results, _ = find_all(finder, self.images, self.loaders, self.ranks)
        truth = self.images.truth()
        truth = agnostic(truth) if self.detection.classes == "none" else truth
        return {f"detection/{name}": value for name, value in coco_metrics(truth, results).items()}


def find_all(
    finder: Finder,
    images: DetectionSet,
    loaders: Sequence[BatchLoader[DetectionBatch]],
    ranks: Ranks = ALONE,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Find objects in all images of a set, the ranks sharing the work.

    Returns:
        COCO's results of all ranks, and how many images were left out, by reason.

    Raises:
        UsageError: the detector's classes are numbers, and the set has others.
    """
    ids = _category_ids(finder, images)
    samples = JoinedSets([images], Vocabulary.of_objects([images]))
    found, skipped = finder.in_samples(samples, loaders)
    own: list[dict[str, Any]] = []
    for row, each in found.items():
        own += _results(int(images.image_ids[row]), each, ids)
    results = [result for part in ranks.gather_objects(own) for result in part]
    reasons: dict[str, int] = {}
    for part in ranks.gather_objects(skipped):
        for reason, count in part.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return results, reasons


def _results(image_id: int, found: Detections, ids: np.ndarray) -> list[dict[str, Any]]:
    """Return COCO's results; what is no category of the set cannot be right and is left out."""
    numbers = ids[found.labels.numpy()]
    known = torch.from_numpy(numbers >= 0)
    found = Detections(*(tensor[known] for tensor in found))
    return to_coco(
        image_id,
        found.boxes.numpy(),
        found.scores.numpy(),
        np.arange(len(found.scores)),
        numbers[known.numpy()].tolist(),
    )


def _category_ids(finder: Finder, images: DetectionSet) -> np.ndarray:
    """Return the set's category of each output of the detector, -1 where it has none."""
    if finder.config.classes == "none" and finder.names is None:
        return np.array([AGNOSTIC], np.int64)
    if finder.config.classes != "numbers":  # asked for the names of the set
        return np.array(images.category_ids, np.int64)
    num_own = len(finder.config.class_names)
    numbers = Vocabulary.join([finder.config, images]).numbers[1]
    unknown = [
        n for n, number in zip(images.class_names, numbers, strict=True) if number >= num_own
    ]
    if unknown:
        raise UsageError(
            f"the detector does not know {len(unknown)} of the {len(images.class_names)} classes "
            f"of {images.name}, such as {unknown[0]!r}: it was trained on another set"
        )
    ids = np.full(num_own, -1, np.int64)
    ids[numbers] = images.category_ids
    return ids
