"""COCO's metrics of boxes."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unicl.errors import UniclError

AGNOSTIC = 1
"""The only category of `agnostic`."""
_KEYS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


def coco_metrics(
    truth: dict[str, Any], results: list[dict[str, Any]], *, per_class: bool = False
) -> dict[str, float]:
    """Compare results with annotations, as COCOeval does.

    faster-coco-eval does it where it is installed, otherwise pycocotools; they agree.

    Args:
        truth: In COCO's format, as `DetectionSet.truth` gives it.
        results: image_id, category_id, bbox as x, y, width, height, and score of each detection.
        per_class: Also give `ap/NAME` for each class.

    Returns:
        Shares in 0..1: ap (of IoU 0.50 to 0.95), ap50, ap75; ar1, ar10, ar100 (average recall of so
        many detections per image); ap_small, ar_large... of objects of up to 32 x 32 pixels, 96 x
        96 and above. What the truth has no object for is left out.

    Raises:
        UniclError: A result is of an image or a category that the truth lacks, or its score or box
            is no finite number; or nothing that computes metrics is installed.
    """
    _check(truth, results)
    kinds = _implementation()
    # Both print, and both write into what they are given.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = kinds[1](
            _indexed(kinds[0], truth, truth.get("annotations", [])),
            _indexed(kinds[0], truth, _as_annotations(results)),
            iouType="bbox",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.asarray(evaluation.stats, np.float64)[: len(_KEYS)].tolist()
    metrics = {key: value for key, value in zip(_KEYS, stats, strict=True) if value >= 0}
    if per_class:
        metrics.update(_per_class(truth, evaluation))
    return metrics


def to_coco(
    image_id: int,
    boxes: torch.Tensor | np.ndarray,
    scores: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Return the detections of an image in COCO's format for results.

    Args:
        image_id: Of the image.
        boxes: x1, y1, x2, y2 in pixels of the original image, "m 4".
        scores: "m".
        labels: Numbers of classes, "m".
        category_ids: Of each class.
    """
    corners = np.asarray(torch.as_tensor(boxes).detach().cpu(), np.float64).reshape(-1, 4)
    corners[:, 2:] -= corners[:, :2]
    rows = zip(corners.tolist(), torch.as_tensor(scores).tolist(), labels.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in rows
    ]


def agnostic(truth: dict[str, Any]) -> dict[str, Any]:
    """Return annotations as if all objects were of one category, whose id is `AGNOSTIC`.

    Against them, ar100 tells how many of the objects class-agnostic proposals find.
    """
    return {
        **truth,
        "annotations": [{**each, "category_id": AGNOSTIC} for each in truth["annotations"]],
        "categories": [{"id": AGNOSTIC, "name": "object"}],
    }


def _check(truth: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for noun, items in (("an image", truth["images"]), ("a category", truth["categories"])):
        key = f"{noun.split()[1]}_id"
        known = {each["id"] for each in items}
        unknown = [result for result in results if result[key] not in known]
        if unknown:
            raise UniclError(
                f"{len(unknown)} results are of {noun} that the set does not have, such as "
                f"{noun.split()[1]} {unknown[0][key]!r}; they are of another set"
            )
    numbers = np.array([[*each["bbox"], each["score"]] for each in results], np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers.reshape(-1, 5)).all(1))
    if len(bad):
        image = results[bad[0]]["image_id"]
        raise UniclError(
            f"{len(bad)} results have a box or score that is no finite number, such as of image "
            f"{image}"
        )


def _implementation() -> tuple[Any, Any]:
    """Return the classes of annotations and of their comparison."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        raise UniclError("metrics of boxes need pycocotools: pip install pycocotools") from error


def _as_annotations(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**each, "id": number, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for number, each in enumerate(results, start=1)
    ]


def _indexed(kind: Any, truth: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    # Not their loadRes: pycocotools' one fails where there are no results.
    content = kind()
    content.dataset = {
        "images": [dict(each) for each in truth["images"]],
        "annotations": [dict(each) for each in annotations],
        "categories": [dict(each) for each in truth["categories"]],
    }
    content.createIndex()
    return content


def _per_class(truth: dict[str, Any], evaluation: Any) -> dict[str, float]:
    names = {each["id"]: each["name"] for each in truth["categories"]}
    counts = Counter(names.values())
    # Thresholds, recalls, categories, areas (all first), numbers of detections (100 last).
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    found = {}
    for place, number in enumerate(sorted(names)):
        values = precision[:, :, place]
        if (values > -1).any():
            name = names[number]
            key = name if counts[name] == 1 else f"{name} ({number})"
            found[f"ap/{key}"] = float(values[values > -1].mean())
    return found
