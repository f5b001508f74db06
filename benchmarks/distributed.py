"""What does a rank's loss hold, and what does the gradient cache cost across ranks?"""

import gc
import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.captions import draw_tokens
from benchmarks.harness import reset_peak, resident, status
from benchmarks.ranks import on_ranks
from benchmarks.record import Bar, Result
from benchmarks.training import Batch, own_step
from unicl.build import build_backend
from unicl.config import OptimizerConfig, parse_recipe
from unicl.distributed import Ranks
from unicl.loss import unicl_loss
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower

_DIM = 512
_CHUNKS = 4


def measure(*, quick: bool) -> Result:
    """Extra memory of the loss on 4 ranks over the global batch; a ZeRO 2 step on 2 ranks."""
    ranks, step_ranks = (2, 1) if quick else (4, 2)
    batches = [512, 1024] if quick else [8192, 16384, 32768, 65536]
    memory = on_ranks(ranks, "benchmarks.distributed:loss_memory", batches=batches)
    held = [max(of_ranks) for of_ranks in zip(*memory, strict=True)]
    curve = [{"batch": b, "extra_mib": extra} for b, extra in zip(batches, held, strict=True)]
    # Doubling the batch doubles what grows with it; a matrix of logits would quadruple it.
    growth = held[-1] / held[-2]
    case = "benchmarks.distributed:time_steps"
    ratios = on_ranks(step_ranks, case, quick=quick)[0]
    return Result(
        bars=[
            Bar(
                f"loss on {ranks} ranks, extra memory per rank at batch {batches[-1]:,}",
                held[-1],
                512,
                "MiB",
                "at most",
            ),
            Bar("the same over that at half the batch", growth, 2.0, "x", "at most"),
            Bar(
                f"step with ZeRO 2 and gradient cache over plain accumulation, {step_ranks} ranks",
                median(ratios),
                1.4,
                "x",
                "at most",
                (min(ratios), max(ratios)),
            ),
        ],
        tables={f"Extra peak memory of the loss per rank, {ranks} ranks": curve},
        facts={"dim": _DIM, "dtype": "float32", "chunks": _CHUNKS, "labels": "half of them twice"},
    )


def loss_memory(ranks: Ranks, batches: list[int]) -> list[float]:
    """Return what forward and backward of the loss hold on this rank beside inputs, in MiB."""
    _loss_step(ranks, 64 * ranks.size)()  # the libraries' own buffers
    held = []
    for batch in batches:
        step = _loss_step(ranks, batch)
        before = resident()
        ranks.barrier()
        reset_peak()
        step()
        held.append(status("VmHWM") - before)
    return held


def _loss_step(ranks: Ranks, batch: int) -> Callable[[], tuple[Tensor, ...]]:
    own = ranks.share(batch)
    generator = torch.Generator().manual_seed(ranks.rank)
    images, texts = (
        F.normalize(torch.randn(len(own), _DIM, generator=generator), dim=-1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, requires_grad=True)
    labels = torch.arange(own.start, own.stop) % (3 * batch // 4)

    def step() -> tuple[Tensor, ...]:
        loss = unicl_loss(images, texts, labels, scale, group=ranks.group)
        return torch.autograd.grad(loss, (images, texts, scale))

    return step


def time_steps(ranks: Ranks, quick: bool) -> list[float]:
    """Return the ratios, round by round, of a cached step's time to an accumulated one's.

    Plain accumulation has the loss of each chunk alone, as with any other loss: it trains
    something else, but it is what the same chunks cost without the cache.
    """
    model, size, width = ("coswin_nano", 48, 64) if quick else ("coswin_tiny", 112, 512)
    torch.manual_seed(0)
    towers = TwoTower(
        ImageTower(model, embed_dim=_DIM, image_size=size),
        TextTower(width=width, num_layers=1 if quick else 12),
    )
    task = Pretraining(towers, ranks=ranks)
    recipe = parse_recipe("", {"engine.backend": "deepspeed", "engine.zero_stage": "2"})
    backend = build_backend(recipe, task, ranks)
    rows = 8 * _CHUNKS
    batch = Batch(
        torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8),
        draw_tokens(rows),
        torch.arange(rows) + rows * ranks.rank,
    )
    parts = [
        Batch(*parts)
        for parts in zip(
            *(each.tensor_split(_CHUNKS) for each in (batch.images, batch.tokens, batch.labels)),
            strict=True,
        )
    ]

    def cached() -> None:
        own_step(task, backend, task.inputs(batch), chunks=_CHUNKS)

    def accumulated() -> None:
        with backend.accumulate():
            for number, part in enumerate(parts):
                backend.begin_part(last=number == _CHUNKS - 1)
                inputs = task.inputs(part)
                loss, _ = task.loss(backend.encode(inputs.towers, 0), inputs.context)
                backend.backward(loss / _CHUNKS)
        norm = math.hypot(*backend.gradient_norms().values())
        backend.step(OptimizerConfig().learning_rate, norm=norm)

    return _interleaved(ranks, cached, accumulated, rounds=1 if quick else 5)


def _interleaved(
    ranks: Ranks, one: Callable[[], None], other: Callable[[], None], *, rounds: int
) -> list[float]:
    times: dict[Callable[[], None], list[float]] = {one: [], other: []}
    for turn in range(-1, rounds):
        for side in (one, other) if turn % 2 else (other, one):
            gc.collect()
            ranks.barrier()
            start = time.perf_counter()
            side()
            ranks.barrier()
            if turn >= 0:
                times[side].append(time.perf_counter() - start)
    return [a / b for a, b in zip(times[one], times[other], strict=True)]
