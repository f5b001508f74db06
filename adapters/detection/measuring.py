"""How well a detector finds the objects of a set: COCO's average precision."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from adapters.detection.config import DetectionConfig
from adapters.detection.detector import Detector
from adapters.detection.finding import Finder
from adapters.detection.found import Detections
from adapters.detection.metrics import AGNOSTIC, agnostic, coco_metrics, to_coco
from adapters.detection.reading import DetectionBatch, DetectionReader, JoinedSets
from adapters.detection.sets import Annotations, DetectionSet
from adapters.detection.transforms import EvalTransform
from adapters.detection.vocabulary import Vocabulary
from unicl.data.loader import BatchLoader
from unicl.data.order import SampleOrder
from unicl.distributed import ALONE, Ranks
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import embed_texts

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
                batch_size=max(1, batch_size * _PIXELS // pixels),
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
        self.tokenize, self.ranks = tokenize, ranks

    def __call__(self, model: Detector) -> dict[str, float]:
        """Return `detection/ap`, `detection/ap50`, ...; only recall where objects have no class."""
        names = None
        if self.detection.classes == "texts":
            names = embed_texts(model, self.images.class_names, self.tokenize)
        finder = Finder(model, self.detection, names)
        found = find_all(finder, self.images, self.loaders, self.ranks)
        metrics = compare(found, self.images, by_class=self.detection.classes != "none")
        if self.detection.classes == "none":  # nothing says which proposals are right
            metrics = {name: value for name, value in metrics.items() if name.startswith("ar")}
        return {f"detection/{name}": value for name, value in metrics.items()}


class Found(NamedTuple):
    """What was found in the images of a set."""

    results: list[dict[str, Any]]
    """In COCO's format, with the set's ids."""
    rows: list[int]
    """Numbers of the images that were looked at, in rising order."""
    skipped: dict[str, int]
    """How many images were left out, by reason."""


def find_all(
    finder: Finder,
    images: DetectionSet,
    loaders: Sequence[BatchLoader[DetectionBatch]],
    ranks: Ranks = ALONE,
) -> Found:
    """Find objects in all images of a set, the ranks sharing the work.

    Raises:
        UsageError: the detector's classes are numbers, and the set has others.
        UniclError: no image can be read.
    """
    ids = category_ids(finder.config, images, named=finder.names is not None)
    samples = JoinedSets([images], Vocabulary.of_objects([images]))
    found, own_skipped = ranks.together(lambda: finder.in_samples(samples, loaders))
    own: list[dict[str, Any]] = []
    for row, each in found.items():
        own += _results(int(images.image_ids[row]), each, ids)
    results = [result for part in ranks.gather_objects(own) for result in part]
    rows = sorted(row for part in ranks.gather_objects(list(found)) for row in part)
    skipped: Counter[str] = Counter()
    for part in ranks.gather_objects(own_skipped):
        skipped.update(part)
    if not rows:
        raise UniclError(f"none of the {images.num_images:,} images of {images} can be read")
    return Found(results, rows, dict(skipped))


def compare(found: Found, images: DetectionSet, *, by_class: bool) -> dict[str, float]:
    """Return COCO's metrics of what was found; in an image that cannot be read all is missed.

    Where not all classes were looked for in all images, what is found of another class is neither
    right nor wrong, nor what is found besides the annotated of a class of which not all were
    annotated, as in LVIS. But for 100 detections per image, where LVIS takes 300.

    Args:
        found: In these images.
        images: The set.
        by_class: Whether the class has to be right, too.
    """
    truth = images.truth()
    if not by_class:
        return coco_metrics(agnostic(truth), found.results)
    results = found.results
    if images.judged is not None:
        asked = {
            (int(images.image_ids[row]), images.category_ids[number])
            for row in found.rows
            for number in _asked(images.of(row))
        }
        results = [each for each in results if (each["image_id"], each["category_id"]) in asked]
        truth["annotations"] += _not_exhaustive(images, len(truth["annotations"]))
    return coco_metrics(truth, results)


def _asked(annotations: Annotations) -> Iterator[int]:
    """Yield the classes that were looked for in an image, or annotated without that."""
    yield from annotations.labels.tolist()
    yield from () if annotations.judged is None else annotations.judged.tolist()


def _not_exhaustive(images: DetectionSet, num_annotations: int) -> list[dict[str, Any]]:
    """Return a crowd as large as the image for each class of which not all were annotated."""
    crowds: list[dict[str, Any]] = []
    for row in range(images.num_images):
        annotations = images.of(row)
        judged = () if annotations.judged is None else annotations.judged.tolist()
        for number in sorted(set(annotations.labels.tolist()).difference(judged)):
            # Larger than any image whose size is not known.
            height, width = (int(side) or 1 << 16 for side in images.sizes[row])
            crowds.append(
                {
                    "id": num_annotations + len(crowds) + 1,
                    "image_id": int(images.image_ids[row]),
                    "category_id": images.category_ids[number],
                    "bbox": [0.0, 0.0, float(width), float(height)],
                    "area": float(width * height),
                    "iscrowd": 1,
                }
            )
    return crowds


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


def category_ids(
    config: DetectionConfig, images: DetectionSet, *, named: bool
) -> Int64[np.ndarray, " outputs"]:
    """Return the set's category of each output of a detector, -1 where it has none.

    Args:
        config: Of the detector.
        images: The set.
        named: Whether the detector looks for the names of the set's classes.

    Raises:
        UsageError: the detector's classes are numbers, and the set has others.
    """
    if config.classes == "none" and not named:
        return np.array([AGNOSTIC], np.int64)
    if config.classes != "numbers":
        return np.array(images.category_ids, np.int64)
    num_own = len(config.class_names)
    numbers = Vocabulary.join([config, images]).numbers[1]
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
