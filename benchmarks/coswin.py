"""Is CoSwin-T as fast as timm's Swin-T, though it does more work?"""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cosswin  # noqa: F401  registers coswin_* with timm
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.engine.precision import autocast

_MODELS = {"coswin": "coswin_tiny", "swin": "swin_tiny_patch4_window7_224"}


def measure(*, quick: bool) -> Result:
    """Forward and backward at 224 pixels, in fp32 and under bf16 autocast."""
    batch = 1 if quick else 16
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224)
    models = {side: timm.create_model(name) for side, name in _MODELS.items()}
    bars, rows = [], []
    for precision in ("fp32", "bf16"):
        sides = {side: _side(model, images, precision) for side, model in models.items()}
        timings = compare(sides, repeats=1 if quick else 15)
        gain = ratio(timings["swin"], timings["coswin"])
        bars.append(
            Bar(
                f"CoSwin-T, images/s over timm's Swin-T, 224 pixels, batch {batch}, {precision}",
                gain.median,
                1.0,
                "x",
                "at least",
                (gain.low, gain.high),
            )
        )
        rows += [
            {
                "model": _MODELS[side],
                "precision": precision,
                "images_per_second": batch / timing.median,
                "seconds": timing.median,
            }
            for side, timing in timings.items()
        ]
    return Result(
        bars=bars,
        tables={"Forward and backward": rows},
        facts={
            "batch": batch,
            "image_size": 224,
            **{f"{name}_gflops": _gflops(models[side]) for side, name in _MODELS.items()},
        },
    )


def _side(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(precision, images.device):
            logits = model(images)
        logits.float().square().mean().backward()

    return run


def _gflops(model: nn.Module) -> float:
    """Count the operations of one image's forward in matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 1e9
