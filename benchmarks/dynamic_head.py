"""Is a detector with a Dynamic Head nearly as fast as RetinaNet, and what takes its time?"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.ops import FeaturePyramidNetwork, deform_conv2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters.detection.atss import Objects, losses
from adapters.detection.config import DetectionConfig
from adapters.detection.deformable import Sampling
from adapters.detection.detector import STRIDES, Detector
from adapters.detection.pyramid import level_sizes
from benchmarks.harness import Timing, compare, ratio
from benchmarks.record import Bar, Result
from unicl.engine.precision import autocast
from unicl.towers.image import ImageTower

_CLASSES = 80
_OBJECTS = 7  # of an image, as in COCO


@dataclass(frozen=True)
class _Sizes:
    side: int
    own: str
    peer: str
    width: int
    num_blocks: int
    repeats: int
    warm_up: int


_FULL = _Sizes(640, "coswin_tiny", "swin_tiny_patch4_window7_224", 256, 6, 7, 2)
_QUICK = _Sizes(64, "coswin_nano", "test_resnet", 32, 1, 1, 0)


def measure(*, quick: bool) -> Result:
    """Forward and backward of one image, in fp32 and under bf16 autocast."""
    torch.manual_seed(0)
    sizes = _QUICK if quick else _FULL
    detector, peer = _detector(sizes), _retinanet(sizes)
    images = torch.rand(1, 3, sizes.side, sizes.side)
    objects = _objects(sizes.side)
    bars, parts, rates = [], [], []
    for precision in ("bf16",) if quick else ("fp32", "bf16"):
        of_parts = compare(
            _parts(detector, images, objects, precision),
            repeats=sizes.repeats,
            warm_up=sizes.warm_up,
        )
        totals = [sum(walls) for walls in zip(*(t.wall for t in of_parts.values()), strict=True)]
        shares = {
            name: [100 * wall / total for wall, total in zip(timing.wall, totals, strict=True)]
            for name, timing in of_parts.items()
        }
        head = shares["Dynamic Head"]
        bars.append(
            Bar(
                f"Dynamic Head's share of the detector's time, {precision}",
                median(head), 50.0, "%", "at most", (min(head), max(head)),
            )
        )  # fmt: skip
        parts += [
            {
                "part": name,
                "precision": precision,
                "seconds": timing.median,
                "percent": median(shares[name]),
            }
            for name, timing in of_parts.items()
        ]
        timings = compare(
            {
                "detector": _step(detector, partial(_loss, detector, images, objects), precision),
                "RetinaNet": _step(peer, partial(_peer_loss, peer, images, objects), precision),
            },
            repeats=sizes.repeats,
            warm_up=sizes.warm_up,
        )
        bars.append(
            _gain(
                f"detector, images/s over torchvision's RetinaNet, {precision}",
                timings["RetinaNet"], timings["detector"], 0.7,
            )
        )  # fmt: skip
        rates += [
            {
                "model": name,
                "precision": precision,
                "images_per_second": 1 / timing.median,
                "seconds": timing.median,
            }
            for name, timing in timings.items()
        ]
    convolutions, more = _convolutions(sizes)
    return Result(
        bars=[*bars, *more],
        tables={
            "Forward and backward by part": parts,
            "Forward and backward with losses": rates,
            "Forward and backward of deformable convolutions, fp32": convolutions,
        },
        facts={
            "side": sizes.side,
            "num_blocks": sizes.num_blocks,
            "detector_million_parameters": _millions(detector),
            "retinanet_million_parameters": _millions(peer),
        },
    )


def _detector(sizes: _Sizes) -> Detector:
    return Detector(
        ImageTower(sizes.own, image_size=sizes.side),
        nn.Identity(),
        DetectionConfig(classes="numbers", width=sizes.width, num_blocks=sizes.num_blocks),
        num_classes=_CLASSES,
        embed_dim=sizes.width,
    )


class _Backbone(nn.Module):
    """What torchvision wants: maps by name, of equal channels."""

    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        sized = {"img_size": sizes.side} if "swin" in sizes.peer else {}
        self.body = timm.create_model(sizes.peer, features_only=True, **sized)
        infos = self.body.feature_info
        self.taken = [infos.reduction().index(stride) for stride in STRIDES]
        widths = [infos.channels()[stage] for stage in self.taken]
        self.last = "swin" in sizes.peer
        self.out_channels = sizes.width
        extra = LastLevelP6P7(sizes.width, sizes.width)
        self.fpn = FeaturePyramidNetwork(widths, sizes.width, extra_blocks=extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        chosen = (maps[stage] for stage in self.taken)
        return self.fpn(
            OrderedDict(
                (str(index), each.movedim(-1, 1) if self.last else each)
                for index, each in enumerate(chosen)
            )
        )


def _retinanet(sizes: _Sizes) -> RetinaNet:
    # Its input is neither made larger nor smaller.
    return RetinaNet(_Backbone(sizes), _CLASSES, min_size=sizes.side, max_size=sizes.side)


def _objects(side: int) -> Objects:
    corners = torch.rand(_OBJECTS, 2) * side * 0.6
    sides = (0.1 + 0.3 * torch.rand(_OBJECTS, 2)) * side
    boxes = torch.cat([corners, corners + sides], 1)
    labels = torch.randint(_CLASSES, (_OBJECTS,))
    return Objects(boxes, labels, torch.zeros(_OBJECTS, dtype=torch.int64))


def _loss(detector: Detector, images: Tensor, objects: Objects) -> Tensor:
    return _atss(detector, detector.places(images), objects, images.shape[-1])


def _atss(detector: Detector, places: Tensor, objects: Objects, side: int) -> Tensor:
    parts = losses(detector.predict(places), detector.anchors(side, side), objects)
    return torch.stack(list(parts.values())).sum()


def _peer_loss(peer: RetinaNet, images: Tensor, objects: Objects) -> Tensor:
    targets = [{"boxes": objects.boxes, "labels": objects.labels}]
    return torch.stack(list(peer(list(images), targets).values())).sum()


def _step(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(precision, torch.device("cpu")):
            value = loss()
        value.backward()

    return run


def _parts(
    detector: Detector, images: Tensor, objects: Objects, precision: str
) -> Mapping[str, Callable[[], None]]:
    """Each part alone, on what the part before it gave."""
    tower: Any = detector.image
    with torch.no_grad(), autocast(precision, images.device):
        maps = tower.maps(images, STRIDES)
        levels = detector.pyramid(maps)
        mixed = detector.head(levels)

    def predicted(levels: list[Tensor]) -> list[Tensor]:
        places = detector.predictor(levels)
        return [_atss(detector, places, objects, images.shape[-1])]

    def part(run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Any:
        def loss() -> Tensor:
            leaves = [each.detach().requires_grad_() for each in inputs]
            outputs = run(leaves)
            # The sum's gradient is a number repeated: nearly free.
            return torch.stack([each.float().sum() for each in outputs]).sum()

        return _step(detector, loss, precision)

    return {
        "tower": part(lambda images: tower.maps(images[0], STRIDES), [images]),
        "pyramid": part(detector.pyramid, maps),
        "Dynamic Head": part(detector.head, levels),
        "predictors and losses": part(predicted, mixed),
    }


def _convolutions(sizes: _Sizes) -> tuple[list[dict[str, object]], list[Bar]]:
    """The three deformable convolutions that a block has at its levels, the largest of each."""
    (fine, coarse, *_) = level_sizes(sizes.side, sizes.side, 5)
    rows: list[dict[str, object]] = []
    bars = []
    cases = {
        "this level": (fine, fine, 1),
        "finer level": (fine, coarse, 2),
        "coarser level": (coarse, fine, 1),
    }
    for case, (map_size, places, stride) in cases.items():
        x = torch.randn(1, sizes.width, *map_size)
        inputs = {
            "x": x.contiguous(memory_format=torch.channels_last),
            "offset": torch.randn(1, 18, *places),
            "mask": torch.rand(1, 9, *places),
            "weight": torch.randn(sizes.width, sizes.width, 3, 3) / (3 * sizes.width**0.5),
        }
        leaves = [each.requires_grad_() for each in inputs.values()]
        read = tuple(stride * side for side in places)
        timings = compare(
            {
                name: partial(_convolve, conv, leaves, read, stride)
                for name, conv in (("ours", _own_conv), ("torchvision", _peer_conv))
            },
            repeats=min(3, sizes.repeats),
            warm_up=sizes.warm_up,
        )
        bars.append(
            _gain(
                f"deformable convolution, {case}: speed over torchvision's, fp32",
                timings["torchvision"], timings["ours"], None,
            )
        )  # fmt: skip
        rows += [
            {"source": case, "conv": name, "seconds": timing.median}
            for name, timing in timings.items()
        ]
    return rows, bars


def _convolve(conv: Any, leaves: list[Tensor], read: tuple[int, int], stride: int) -> None:
    torch.autograd.grad(conv(*leaves, read, stride).sum(), leaves)


def _own_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, read: tuple[int, int], stride: int
) -> Tensor:
    return Sampling(offset, mask, size=read, stride=stride).conv(x, weight)


def _peer_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, read: tuple[int, int], stride: int
) -> Tensor:
    if x.shape[2:] != read:
        x = F.interpolate(x, size=read, mode="bilinear", align_corners=True)
    return deform_conv2d(x, offset, weight, stride=stride, padding=1, mask=mask)


def _gain(what: str, over: Timing, under: Timing, limit: float | None) -> Bar:
    gain = ratio(over, under)
    return Bar(what, gain.median, limit, "x", "at least", (gain.low, gain.high))


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
