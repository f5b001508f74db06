"""How many samples per second does a whole training step reach beside open_clip's?"""

import copy
from collections.abc import Callable

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

import cosswin  # noqa: F401  registers coswin_* with timm
from benchmarks.captions import describe, draw_tokens
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from benchmarks.training import Batch, OpenClipStep, forward_flops, own_step
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE
from unicl.engine.torch_backend import TorchBackend
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import from_open_clip
from unicl.towers.two_tower import TwoTower

_PRECISIONS = ("fp32", "bf16")


def measure(*, quick: bool) -> Result:
    """Both towers, loss, backward, clipping and AdamW, on equal weights and an equal batch.

    The labels all differ, so both losses are CLIP's. Ours is given bytes, which it normalises in
    the step; open_clip normalises in its loader, so its images come ready.
    """
    batch, size, num_layers = (4, 64, 1) if quick else (32, 224, 12)
    torch.manual_seed(0)
    peer = CLIP(
        512,
        CLIPVisionCfg(timm_model_name="coswin_tiny", image_size=size),
        CLIPTextCfg(layers=num_layers),
    )
    own = _own_model(peer, size)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    own_batch = Batch(images, draw_tokens(batch), torch.arange(batch))
    assert isinstance(own.image, ImageTower)
    ready = (images.float() - own.image.mean) / own.image.std
    bars, rows, losses = [], [], {}
    for precision in _PRECISIONS:
        sides = {
            "unicl": _own_step(copy.deepcopy(own), own_batch, precision),
            "open_clip": _peer_step(copy.deepcopy(peer), ready, own_batch.tokens, precision),
        }
        losses[f"{precision}_first_losses"] = [side() for side in sides.values()]
        timings = compare(sides, repeats=1 if quick else 4, warm_up=0)  # the first step was it
        gain = ratio(timings["open_clip"], timings["unicl"])
        bars.append(
            Bar(
                f"whole training step, samples/s over open_clip's, batch {batch}, {precision}",
                gain.median,
                1.3,
                "x",
                "at least",
                (gain.low, gain.high),
            )
        )
        rows += [
            {
                "step": side,
                "precision": precision,
                "samples_per_second": batch / timing.median,
                "seconds": timing.median,
            }
            for side, timing in timings.items()
        ]
    return Result(
        bars=bars,
        tables={"Training step": rows},
        facts={
            "image_tower": "coswin_tiny",
            "image_size": size,
            "text_tower": f"width 512, {num_layers} layers",
            **describe(own_batch.tokens),
            **losses,
            **_shares(own, peer, own_batch, ready),
        },
    )


def _own_model(peer: CLIP, size: int) -> TwoTower:
    """Build our two towers with the peer's weights."""
    image = ImageTower("coswin_tiny", embed_dim=512, image_size=size)
    image.backbone.load_state_dict(peer.visual.trunk.state_dict())
    image.projection.load_state_dict(peer.visual.head.proj.state_dict())
    return TwoTower(image, from_open_clip(peer.state_dict()))


def _own_step(model: TwoTower, batch: Batch, precision: str) -> Callable[[], float]:
    task = Pretraining(model)
    backend = TorchBackend(task, OptimizerConfig(), ALONE)
    backend.encoder.precision = precision
    return lambda: float(own_step(task, backend, task.inputs(batch)))


def _peer_step(model: CLIP, images: Tensor, tokens: Tensor, precision: str) -> Callable[[], float]:
    step = OpenClipStep(model, precision)
    return lambda: float(step(images, tokens))


def _shares(own: TwoTower, peer: CLIP, batch: Batch, ready: Tensor) -> dict[str, object]:
    """Say how the work of the forward is divided, so that nobody takes a tiny tower for a gain."""
    image = forward_flops(lambda: own.image(batch.images))
    own_text = forward_flops(lambda: own.encode_text(batch.tokens))
    peer_text = forward_flops(lambda: peer.encode_text(batch.tokens))
    return {
        "image_tower_gflops_per_sample": image / len(ready) / 1e9,
        "text_share_of_our_flops": own_text / (image + own_text),
        "text_share_of_open_clip_flops": peer_text / (image + peer_text),
    }
