"""How many samples per second does a whole training step reach beside open_clip's?"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cosswin  # noqa: F401  registers coswin_* with timm
from benchmarks.captions import describe, draw_tokens
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE
from unicl.engine.gradient_cache import backward
from unicl.engine.torch_backend import TorchBackend
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import from_open_clip
from unicl.towers.two_tower import TwoTower

_CPU = torch.device("cpu")
_PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}  # ours: open_clip's name for it


@dataclass(frozen=True)
class _Batch:
    images: Tensor
    tokens: Tensor
    labels: Tensor


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
    own_batch = _Batch(images, draw_tokens(batch), torch.arange(batch))
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


def _own_step(model: TwoTower, batch: _Batch, precision: str) -> Callable[[], float]:
    config = OptimizerConfig()
    task = Pretraining(model)
    backend = TorchBackend(task, config, ALONE)
    backend.encoder.precision = precision

    def step() -> float:
        loss, _ = backward(task, backend, task.inputs(batch))
        norm = math.hypot(*backend.gradient_norms().values())
        backend.step(config.learning_rate, norm=norm)
        return float(loss)

    return step


def _peer_step(model: CLIP, images: Tensor, tokens: Tensor, precision: str) -> Callable[[], float]:
    """Step as `open_clip_train` does it, with the optimizer that it builds."""
    from open_clip_train.precision import get_autocast

    config = OptimizerConfig()
    loss_of = ClipLoss()
    cast = get_autocast(_PRECISIONS[precision], device_type="cpu")
    no_decay: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        excluded = parameter.ndim < 2 or any(x in name for x in ("bn", "ln", "bias", "logit_scale"))
        (no_decay if excluded else decay).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": no_decay, "weight_decay": 0.0},
            {"params": decay, "weight_decay": config.weight_decay},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )

    def step() -> float:
        optimizer.zero_grad()
        with cast():
            image_features, text_features, scale = model(images, tokens)
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return float(loss.detach())

    return step


def _shares(own: TwoTower, peer: CLIP, batch: _Batch, ready: Tensor) -> dict[str, object]:
    """Say how the work of the forward is divided, so that nobody takes a tiny tower for a gain."""
    image = _flops(lambda: own.image(batch.images))
    own_text = _flops(lambda: own.encode_text(batch.tokens))
    peer_text = _flops(lambda: peer.encode_text(batch.tokens))
    return {
        "image_tower_gflops_per_sample": image / len(ready) / 1e9,
        "text_share_of_our_flops": own_text / (image + own_text),
        "text_share_of_open_clip_flops": peer_text / (image + peer_text),
    }


def _flops(run: Callable[[], Tensor]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
