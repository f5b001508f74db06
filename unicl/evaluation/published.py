"""Figures that Florence's and CLIP's papers report, to stand beside one's own.

All are as printed, in percent but for ranks. A set is named as in `unicl.data.image_sets`, a
metric as there or as the evaluators name it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Task = Literal[
    "zero_shot",
    "linear_probe",
    "fine_tune",
    "few_shot",
    "retrieval",
    "retrieval_fine_tuned",
    "detection",
    "detection_zero_shot",
    "detection_few_shot",
    "detection_fine_tune",
    "vqa",
    "captioning",
    "retrieval_reranked",
]
Figures = Mapping[str, Mapping[str, float]]

# The columns of Florence's table 1, with the metrics of CLIP's protocol; table 2 lacks the last.
_COLUMNS = (
    ("food101", "top1"),
    ("cifar10", "top1"),
    ("cifar100", "top1"),
    ("sun397", "top1"),
    ("cars", "top1"),
    ("aircraft", "mean_per_class"),
    ("voc2007", "map11"),
    ("dtd", "top1"),
    ("pets", "mean_per_class"),
    ("caltech101", "mean_per_class"),
    ("flowers", "mean_per_class"),
    ("imagenet", "top1"),
)
_ZERO_SHOT = "class names in CLIP's prompt templates, their mean; nothing trained on the set"
_PROBE = "logistic regression on the frozen image tower, by CLIP's implementation"
_VIDEO_SECTIONS = "Florence, sections 3.8 and 3.9"
_RECALLS = ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5")
# The labels of their test parts were kept for contests.
_REPORTED_ON_VAL = ("imagenet", "kinetics400", "kinetics600", "kinetics700")
_BOXES_REPORTED_ON_VAL = ("coco", "lvis", "objects365")
_TRANSFER = "Florence, section 3.6 and its table of zero-shot transfer to 11 sets"
_DETECTION = "Florence, section 3.6 and its table of fine-tuning"
_VQA = "Florence, section 3.7 and table 8"
_RETRIEVAL = "cosine similarity; Karpathy's test splits, 1,000 images of Flickr30k, 5,000 of COCO"

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
"""The 11 public sets on Roboflow that zero-shot detection is measured on, in the paper's order."""
NUM_TRAIN_IMAGES = {
    "food101": 75_750,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "sun397": 19_850,
    "cars": 8_144,
    "aircraft": 6_667,
    "voc2007": 5_011,
    "dtd": 3_760,
    "pets": 3_680,
    "caltech101": 3_060,
    "flowers": 2_040,
    "imagenet": 1_281_167,
}
"""Images that the papers' probes are fitted on, by set (CLIP, table 9)."""
NUM_TEST_IMAGES = {
    "food101": 25_250,
    "cifar10": 10_000,
    "cifar100": 10_000,
    "sun397": 19_850,
    "cars": 8_041,
    "aircraft": 3_333,
    "voc2007": 4_952,
    "dtd": 1_880,
    "pets": 3_669,
    "caltech101": 6_085,
    "flowers": 6_149,
    "imagenet": 50_000,
    "flickr30k": 1_000,
    "coco": 5_000,
    "msrvtt": 1_000,
}
"""Images that the papers' figures are of, by set (CLIP, table 9; Florence, section 3.5)."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What one paper reports of one model for one task."""

    model: str
    """Its name in the paper."""
    task: Task
    """What was done with it."""
    resolution: int | None
    """Side of its images in pixels; None where the paper does not say."""
    protocol: str
    """How it was done, where one's own way may differ."""
    source: str
    """The paper and where in it."""
    figures: Figures
    """Percent by set and metric; ranks as they are."""
    views: str | None = None
    """Clips x crops that a video is seen by; None where the paper does not say."""


def published(task: Task, name: str) -> tuple[Published, ...]:
    """Return what is published of a task on a set; nothing for a set that no paper has."""
    return tuple(row for row in PUBLISHED if row.task == task and name in row.figures)


def is_rank(metric: str) -> bool:
    """Whether a metric is a place in a list, of which 1 is best, and no share."""
    return metric.endswith("_rank")


def reported_part(dataset: str, task: str = "") -> str:
    """Return the part of a set that is asked about where figures of a task are reported."""
    if task == "vqa":
        return "test-dev" if dataset == "vqav2" else "val"
    on_val = _BOXES_REPORTED_ON_VAL if task.startswith("detection") else _REPORTED_ON_VAL
    return "val" if dataset in on_val else "test"


def _by_set(*values: float) -> dict[str, dict[str, float]]:
    # An eleventh value ends the columns of the linear probe.
    columns = _COLUMNS[: len(values)]
    return {name: {metric: value} for (name, metric), value in zip(columns, values, strict=True)}


def _recalls(*values: float) -> dict[str, float]:
    return dict(zip(_RECALLS, values, strict=True))


def _text_to_video(*values: float) -> dict[str, float]:
    return dict(zip(("t2i_r1", "t2i_r5", "t2i_r10"), values, strict=True))


def _shots(*values: float) -> dict[str, float]:
    return dict(zip(("5_shot", "20_shot", "50_shot"), values, strict=True))


def _roboflow(*values: float, metric: str = "ap") -> dict[str, dict[str, float]]:
    """Return COCO's AP, the mean over overlaps of 0.5 to 0.95."""
    return {name: {metric: value} for name, value in zip(ROBOFLOW, values, strict=True)}


def _coco(minival: float, test_dev: float) -> dict[str, dict[str, float]]:
    # The labels of the test part are kept for a contest; nobody else can measure on it.
    return {"coco": {"ap": minival}, "coco_test_dev": {"ap": test_dev}}


_FLORENCE_ZERO_SHOT = _by_set(
    95.1, 94.6, 77.6, 77.0, 93.2, 55.5, 85.5, 66.4, 95.9, 94.7, 86.2, 83.74
)
_FLORENCE_ZERO_SHOT["imagenet"]["top5"] = 97.18

PUBLISHED = (
    Published(
        model="Florence (CoSwin-H)",
        task="zero_shot",
        resolution=384,
        protocol=_ZERO_SHOT,
        source="Florence, section 3.1 and table 1",
        figures=_FLORENCE_ZERO_SHOT,
    ),
    Published(
        model="CLIP (ViT-L/14)",
        task="zero_shot",
        resolution=336,
        protocol=_ZERO_SHOT,
        source="CLIP, table 11; Florence, table 1",
        figures=_by_set(93.8, 95.7, 77.5, 68.4, 78.8, 37.2, 84.3, 55.7, 93.5, 92.8, 78.3, 76.2),
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="linear_probe",
        resolution=384,
        protocol=_PROBE,
        source="Florence, section 3.2 and table 2",
        figures=_by_set(96.2, 97.6, 87.1, 84.2, 95.7, 83.9, 90.5, 86.0, 96.4, 96.6, 99.7),
    ),
    Published(
        model="CLIP (ViT-L/14)",
        task="linear_probe",
        resolution=336,
        protocol=_PROBE,
        source="CLIP, table 10; Florence, table 2",
        figures=_by_set(95.9, 97.9, 87.4, 82.2, 91.5, 71.6, 89.9, 83.0, 95.1, 96.0, 99.2),
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="fine_tune",
        resolution=512,
        protocol="UniCL loss with class prompts; batch 8,192, 10 epochs, peak learning rate 2e-5",
        source="Florence, section 3.3 and table 3",
        figures={"imagenet": {"top1": 90.05, "top5": 99.02}},
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="few_shot",
        resolution=None,
        protocol="CD-FSL: 5 classes, 600 episodes; linear head and backbone, 100 epochs, mirrored",
        source="Florence, section 3.4 and table 4",
        figures={
            "isic": _shots(57.1, 72.9, 78.3),
            "eurosat": _shots(90.0, 95.8, 97.1),
            "cropdisease": _shots(97.7, 99.3, 99.6),
            "chestx": _shots(29.3, 37.5, 42.8),
        },
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="retrieval",
        resolution=None,
        protocol=_RETRIEVAL,
        source="Florence, section 3.5 and table 5",
        figures={
            "flickr30k": _recalls(90.9, 99.1, 76.7, 93.6),
            "coco": _recalls(64.7, 85.9, 47.2, 71.4),
        },
    ),
    Published(
        model="CLIP (ViT-L/14)",
        task="retrieval",
        resolution=336,
        protocol=_RETRIEVAL,
        source="CLIP, table 13; Florence, table 5",
        figures={
            "flickr30k": _recalls(88.0, 98.7, 68.7, 90.6),
            "coco": _recalls(58.4, 81.5, 37.8, 62.4),
        },
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="retrieval_fine_tuned",
        resolution=None,
        protocol=f"{_RETRIEVAL}; fine-tuned: batch 3,072, 12 epochs, peak learning rate 2e-5",
        source="Florence, section 3.5 and table 5",
        figures={
            "flickr30k": _recalls(97.2, 99.9, 87.9, 98.1),
            "coco": _recalls(81.8, 95.2, 63.2, 85.7),
        },
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="retrieval",
        resolution=None,
        protocol="MSR-VTT's 1k-A test split, zero-shot; one caption per video",
        source=_VIDEO_SECTIONS,
        figures={"msrvtt": _text_to_video(37.6, 63.8, 72.6)},
    ),
    Published(
        model="CLIP (ViT-B/16)",
        task="retrieval",
        resolution=224,
        protocol="MSR-VTT's 1k-A test split, zero-shot; one caption per video",
        source=_VIDEO_SECTIONS,
        figures={"msrvtt": _text_to_video(26.0, 49.4, 60.7)},
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="fine_tune",
        resolution=384,
        protocol="a head on 3D-CoSwin; 30 epochs, label smoothing, RandAugment, drop-path 0.5",
        source=_VIDEO_SECTIONS,
        figures={
            "kinetics400": {"top1": 86.5, "top5": 97.3},
            "kinetics600": {"top1": 87.8, "top5": 97.8},
        },
        views="4 x 3",
    ),
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
        figures=_roboflow(
            39.0, 40.6, 57.3, 26.8, 47.5, 32.8, 20.0, 22.1, 10.8, 54.9, 14.2, metric="5_shot"
        ),
    ),
    Published(
        model="Dynamic Head (Swin-L)",
        task="detection_fine_tune",
        resolution=None,
        protocol="test parts; fine-tuned on the whole training part",
        source=_TRANSFER,
        figures=_roboflow(53.1, 62.6, 80.7, 52.0, 85.9, 52.0, 74.4, 98.0, 61.8, 75.9, 58.7),
    ),
    Published(
        model="Florence (CoSwin-H)",
        task="detection",
        resolution=None,
        protocol="COCO: minival, longer side up to 2,500 pixels, 12 epochs, trained and tested at "
        "several sizes; Objects365: longer side up to 1,333 pixels",
        source=_DETECTION,
        figures={**_coco(62.0, 62.4), "objects365": {"ap": 39.3}},
    ),
    Published(
        model="Dynamic Head (Swin-L)",
        task="detection",
        resolution=None,
        protocol="minival; as Florence quotes it",
        source=_DETECTION,
        figures=_coco(60.3, 60.6),
    ),
    Published(
        model="Soft Teacher",
        task="detection",
        resolution=None,
        protocol="minival; as Florence quotes it",
        source=_DETECTION,
        figures=_coco(60.7, 61.3),
    ),
    *(
        Published(
            model=model,
            task="vqa",
            resolution=None,
            protocol="test-dev, measured by the server; trained on train and val",
            source=_VQA,
            figures={"vqav2": {"accuracy": test_dev}},
        )
        for model, test_dev in (
            ("Florence (CoSwin-H)", 80.16),
            ("SimVLM", 80.03),
            ("METER", 77.68),
        )
    ),
)
