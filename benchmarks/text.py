"""How many real captions per second does the text tower encode and learn from?"""

from collections.abc import Callable

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from benchmarks.captions import describe, draw_captions, draw_tokens
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.towers.text import TextTower, from_open_clip
from unicl.towers.two_tower import TwoTower


def measure(*, quick: bool) -> Result:
    """Forward and backward of both text towers on equal weights, fp32."""
    batch, num_layers = (16, 2) if quick else (256, 12)
    torch.manual_seed(0)
    peer = CLIP(
        512,
        CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=32),
        CLIPTextCfg(layers=num_layers),
    )
    own = TwoTower(nn.Identity(), from_open_clip(peer.state_dict()))
    tokens = draw_tokens(batch)
    direction = torch.randn(batch, 512)  # a loss whose gradient differs from text to text
    sides = {
        "unicl": _side(own, lambda: own.encode_text(tokens), direction),
        "without economies": _side(
            own, lambda: own.encode_text(tokens, economies=False), direction
        ),
        "open_clip": _side(peer, lambda: peer.encode_text(tokens, normalize=True), direction),
    }
    differences = _differences(own, peer, sides)
    alone = sides.pop("without economies")
    timings = compare(sides, repeats=2, warm_up=0)  # the look at their equality was it
    # Once is enough to show where the gain comes from.
    timings |= compare({"without economies": alone}, repeats=1, warm_up=0)
    gain = ratio(timings["open_clip"], timings["unicl"])
    return Result(
        bars=[
            Bar(
                "text tower, texts/s over open_clip's, real captions, forward and backward",
                gain.median,
                3.0,
                "x",
                "at least",
                (gain.low, gain.high),
            )
        ],
        tables={
            "Forward and backward": [
                {"tower": name, "texts_per_second": batch / t.median, "seconds": t.median}
                for name, t in timings.items()
            ]
        },
        facts={
            **describe(tokens),
            "captions": draw_captions(batch)[:3],
            "width": 512,
            "num_layers": num_layers,
            "dtype": "float32",
            **differences,
        },
    )


def _side(
    model: nn.Module, encode: Callable[[], Tensor], direction: Tensor
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        embeddings = encode()
        (embeddings * direction).sum().backward()
        return embeddings.detach()

    return run


def _differences(
    own: TwoTower, peer: CLIP, sides: dict[str, Callable[[], Tensor]]
) -> dict[str, object]:
    """Compare embeddings, and the gradients of the first and the last weight (relative)."""
    embeddings = {name: sides[name]() for name in ("unicl", "open_clip")}
    peer_grads = (peer.token_embedding.weight.grad, peer.text_projection.grad.T)
    assert isinstance(own.text, TextTower)
    own_grads = (own.text.token_embedding.weight.grad, own.text.projection.weight.grad)
    return {
        "largest_embedding_difference": float(
            (embeddings["unicl"] - embeddings["open_clip"]).abs().max()
        ),
        "largest_gradient_difference": max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(own_grads, peer_grads, strict=True)
        ),
    }
