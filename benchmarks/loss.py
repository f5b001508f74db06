"""What do memory and time of the tiled loss cost beside dense ones?"""

from collections.abc import Callable, Mapping

import psutil
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import compare, peak_memory, ratio
from benchmarks.record import Bar, Result
from unicl.loss import reference_loss, unicl_loss

_DIM = 512


def measure(*, quick: bool) -> Result:
    """Forward and backward: extra peak memory over the batch size, time against ClipLoss."""
    memory_batch, time_batch = (512, 512) if quick else (16384, 8192)
    losses = ["unicl_loss", "ClipLoss"] if quick else ["unicl_loss", "ClipLoss", "reference_loss"]
    rows = _memory_curve([memory_batch] if quick else [4096, 8192, memory_batch], losses)
    sides = {name: _sides(time_batch)[name] for name in ("unicl_loss", "ClipLoss")}
    timings = compare(sides, repeats=2 if quick else 5)
    against = ratio(timings["unicl_loss"], timings["ClipLoss"])
    own = rows[-1]["unicl_loss_mib"]
    assert isinstance(own, float)
    return Result(
        bars=[
            Bar(f"loss, extra peak memory at batch {memory_batch:,}", own, 256, "MiB", "at most"),
            Bar(
                f"loss, time over open_clip's ClipLoss at batch {time_batch:,}, distinct labels",
                against.median,
                0.8,
                "x",
                "at most",
                (against.low, against.high),
            ),
        ],
        tables={
            "Extra peak memory of forward and backward": rows,
            f"Seconds at batch {time_batch:,}": [
                {"loss": name, "median": t.median, "low": min(t.wall), "high": max(t.wall)}
                for name, t in timings.items()
            ],
        },
        facts={
            "dim": _DIM,
            "dtype": "float32",
            "largest_gradient_difference": _difference(sides),
            "memory": "resident set above that after inputs and one small warm-up",
        },
    )


def memory_case(loss: str, batch: int) -> Callable[[], object]:
    """Make inputs, and load the libraries' own buffers with a small batch."""
    _sides(64)[loss]()
    return _sides(batch)[loss]


def _memory_curve(batches: list[int], losses: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for batch in batches:
        row: dict[str, object] = {"batch": batch}
        for loss in losses:
            fits = loss == "unicl_loss" or _dense_fits(batch)
            case = {"loss": loss, "batch": batch}
            extra = peak_memory("benchmarks.loss:memory_case", **case).extra if fits else None
            row[f"{loss}_mib"] = "does not fit" if extra is None else extra
        rows.append(row)
    return rows


def _dense_fits(batch: int) -> bool:
    # Logits, log-softmax, positives and gradients: about eight fp32 matrices at the peak.
    return psutil.virtual_memory().available > 1.3 * 8 * 4 * batch**2


def _sides(batch: int) -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(batch, _DIM, generator=generator), dim=-1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, requires_grad=True)
    labels = torch.arange(batch)
    inputs = (images, texts, scale)
    clip = ClipLoss()
    return {
        "unicl_loss": lambda: torch.autograd.grad(unicl_loss(images, texts, labels, scale), inputs),
        "ClipLoss": lambda: torch.autograd.grad(clip(images, texts, scale), inputs),
        "reference_loss": lambda: torch.autograd.grad(
            reference_loss(images, texts, labels, scale), inputs
        ),
    }


def _difference(sides: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> float:
    """Return how far the gradients of both sides lie apart, relative to the largest entry."""
    own, peer = sides["unicl_loss"](), sides["ClipLoss"]()
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(own, peer, strict=True))
