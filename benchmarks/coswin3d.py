"""Is 3D-CoSwin-T nearly as fast as torchvision's Swin3D-T, though it does more work?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import swin3d_t

from adapters.video.coswin3d import coswin3d
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.engine.precision import autocast

_CLASSES = 400


@dataclass(frozen=True)
class _Input:
    batch: int
    frames: int
    side: int
    limit: float | None

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.side} pixels, batch {self.batch}"

    def clips(self) -> Tensor:
        return torch.randn(self.batch, 3, self.frames, self.side, self.side)


# Video-Swin's training clip, and one so short that small windows save nothing.
_INPUTS = (_Input(1, 32, 224, 0.9), _Input(2, 8, 112, None))
_QUICK = (_Input(1, 4, 64, 0.9), _Input(1, 2, 64, None))


def measure(*, quick: bool) -> Result:
    """Forward and backward of both in fp32 and under bf16 autocast, with the peer's drop-path."""
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "coswin3d": coswin3d("coswin_tiny", num_classes=_CLASSES, drop_path_rate=0.1),
        "swin3d": swin3d_t(num_classes=_CLASSES),
    }
    bars, rows, work = [], [], []
    for size in _QUICK if quick else _INPUTS:
        clips = size.clips()
        for precision in ("fp32", "bf16"):
            sides = {side: _side(model, clips, precision) for side, model in models.items()}
            timings = compare(sides, repeats=1 if quick else 9)
            gain = ratio(timings["swin3d"], timings["coswin3d"])
            bars.append(
                Bar(
                    f"3D-CoSwin-T, clips/s over torchvision's swin3d_t, {size}, {precision}",
                    gain.median,
                    size.limit,
                    "x",
                    "at least",
                    (gain.low, gain.high),
                )
            )
            rows += [
                {
                    "model": side,
                    "input": str(size),
                    "precision": precision,
                    "clips_per_second": size.batch / timing.median,
                    "seconds": timing.median,
                }
                for side, timing in timings.items()
            ]
        work += [
            {"model": side, "input": str(size), **_gflops(model, clips[:1])}
            for side, model in models.items()
        ]
    return Result(
        bars=bars,
        tables={"Forward and backward": rows, "GFLOPs of one clip's forward": work},
        facts={
            "time_windows": [
                stage.blocks[0].attn.window_size[0] for stage in models["coswin3d"].layers
            ],
            **{
                f"{side}_million_parameters": sum(p.numel() for p in model.parameters()) / 1e6
                for side, model in models.items()
            },
        },
    )


def _side(model: nn.Module, clips: Tensor, precision: str) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(precision, clips.device):
            logits = model(clips)
        logits.float().square().mean().backward()

    return run


def _gflops(model: nn.Module, clip: Tensor) -> dict[str, float]:
    """Count the operations in matrix products and convolutions, and what they are for."""
    embedding = ("patch_embed", "downsample", "reduction")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    counts = {name: sum(flops.values()) / 1e9 for name, flops in counter.flop_counts.items()}
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) / 1e9
    embedded = sum(value for name, value in counts.items() if name.endswith(embedding))
    return {
        "all": counts["Global"],
        "embedding_and_merging": embedded,
        "attention_products": attention,
    }
