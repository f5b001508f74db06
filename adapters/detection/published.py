"""Figures of detection that Florence's paper reports, to stand beside one's own.

AP is COCO's, the mean over overlaps of 0.5 to 0.95, in percent.
"""

from unicl.evaluation.published import Published

ROBOFLOW = (
    "aquarium",
    "bccd",
    "chess_pieces",
    "mask_wearing",
    "oxford_pets",
    "packages",
    "pistols",
    "pklot",
    "pothole",
    "thermal",
    "wildfire_smoke",
)
"""The 11 public sets on Roboflow that zero-shot transfer is measured on, in the paper's order."""
NUM_IMAGES = dict(
    zip(ROBOFLOW, (638, 364, 292, 149, 3680, 26, 2986, 12416, 665, 203, 737), strict=True)
)
"""Images that the paper counts in each, all parts together."""
NUM_CLASSES = dict(zip(ROBOFLOW, (7, 3, 12, 2, 37, 1, 1, 2, 1, 2, 1), strict=True))
"""Classes that the paper counts in each."""

_TRANSFER = "Florence, section 3.6 and its table of zero-shot transfer to 11 sets"
_FINE_TUNING = "Florence, section 3.6 and its table of fine-tuning"


def _roboflow(*values: float) -> dict[str, dict[str, float]]:
    return {name: {"ap": value} for name, value in zip(ROBOFLOW, values, strict=True)}


def _coco(model: str, minival: float, test_dev: float, protocol: str) -> tuple[Published, ...]:
    return tuple(
        Published(
            model=model,
            task="detection",
            resolution=None,
            protocol=f"{part}; {protocol}",
            source=_FINE_TUNING,
            figures={"coco": {"ap": value}},
        )
        for part, value in (("minival", minival), ("test-dev", test_dev))
    )


DETECTION: tuple[Published, ...] = (
    Published(
        model="Florence (CoSwin-H)",
        task="detection_zero_shot",
        resolution=None,
        protocol="test parts; boxes of a Dynamic Head trained on FLOD-9M without its classes, on "
        "the frozen tower, each named by the two towers",
        source=_TRANSFER,
        figures=_roboflow(43.1, 15.3, 13.4, 15.0, 68.9, 79.6, 41.4, 31.4, 53.3, 46.9, 48.7),
    ),
    Published(
        model="ZSD (Dynamic Head with BERT)",
        task="detection_zero_shot",
        resolution=None,
        protocol="test parts; a detector trained end to end on Objects365, its classes BERT's "
        "embeddings of their names",
        source=_TRANSFER,
        figures=_roboflow(16.0, 1.2, 0.1, 0.6, 0.3, 58.3, 31.5, 0.2, 2.4, 37.4, 0.002),
    ),
    Published(
        model="Dynamic Head (Swin-L)",
        task="detection_few_shot",
        resolution=None,
        protocol="test parts; fine-tuned on 5 shots",
        source=_TRANSFER,
        figures=_roboflow(39.0, 40.6, 57.3, 26.8, 47.5, 32.8, 20.0, 22.1, 10.8, 54.9, 14.2),
    ),
    Published(
        model="Dynamic Head (Swin-L)",
        task="detection_fine_tune",
        resolution=None,
        protocol="test parts; fine-tuned on the whole training part",
        source=_TRANSFER,
        figures=_roboflow(53.1, 62.6, 80.7, 52.0, 85.9, 52.0, 74.4, 98.0, 61.8, 75.9, 58.7),
    ),
    *_coco(
        "Florence (CoSwin-H)", 62.0, 62.4,
        "longer side up to 2,500 pixels, 12 epochs, trained and tested at several sizes",
    ),
    *_coco("Dynamic Head (Swin-L)", 60.3, 60.6, "as Florence quotes it"),
    *_coco("Soft Teacher", 60.7, 61.3, "as Florence quotes it"),
    Published(
        model="Florence (CoSwin-H)",
        task="detection",
        resolution=None,
        protocol="longer side up to 1,333 pixels",
        source=_FINE_TUNING,
        figures={"objects365": {"ap": 39.3}},
    ),
)  # fmt: skip
