"""What does the gradient cache save in memory, and what does it cost in time?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.captions import describe, draw_tokens
from benchmarks.harness import Memory, compare, peak_memory, ratio
from benchmarks.record import Bar, Result
from benchmarks.training import Batch, own_step
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE
from unicl.engine.gradient_cache import num_chunks
from unicl.engine.torch_backend import TorchBackend
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower

_CHUNK = 32
_PRECISION = "fp32"


@dataclass(frozen=True)
class _Sizes:
    model: str
    image_size: int
    width: int
    num_layers: int
    large: int
    timed: int


# A quarter of 224's area: the same model and the same ratios in a quarter of the time.
_FULL = _Sizes("coswin_tiny", 112, 512, 12, large=1024, timed=96)
_QUICK = _Sizes("coswin_nano", 48, 64, 1, large=64, timed=64)


def measure(*, quick: bool) -> Result:
    """A whole step with chunk 32: peak memory over the batch, time against the uncached step."""
    sizes = _QUICK if quick else _FULL
    step_of = _steps(sizes)
    sides = {"cached": step_of(sizes.timed, _CHUNK), "uncached": step_of(sizes.timed, None)}
    timings = compare(sides, repeats=1 if quick else 3)
    cost = ratio(timings["cached"], timings["uncached"])
    memory = {
        (batch, chunk): _memory(quick, batch, chunk)
        for batch, chunk in ((32, _CHUNK), (sizes.large, _CHUNK), (sizes.timed, None))
    }
    growth = memory[sizes.large, _CHUNK].total / memory[32, _CHUNK].total
    return Result(
        bars=[
            Bar(
                f"gradient cache, chunk {_CHUNK}, peak memory at batch {sizes.large:,} over 32",
                growth,
                1.25,
                "x",
                "at most",
            ),
            Bar(
                f"gradient cache, chunk {_CHUNK}, time over the uncached step, batch {sizes.timed}",
                cost.median,
                1.4,
                "x",
                "at most",
                (cost.low, cost.high),
            ),
        ],
        tables={
            "Peak memory of a step in MiB": [
                _memory_row(batch, chunk, held) for (batch, chunk), held in memory.items()
            ],
            f"Step at batch {sizes.timed}": [
                {"step": name, "samples_per_second": sizes.timed / t.median, "seconds": t.median}
                for name, t in timings.items()
            ],
        },
        facts={
            "image_tower": sizes.model,
            "image_size": sizes.image_size,
            "text_tower": f"width {sizes.width}, {sizes.num_layers} layers",
            "precision": _PRECISION,
            **describe(draw_tokens(sizes.timed)),
            "memory": "resident set above that after imports: towers, moments, images (uint8), "
            "gradients and activations",
        },
    )


def memory_case(quick: bool, batch: int, chunk: int | None) -> Callable[[], object]:
    """Make towers, optimizer and a batch; what is run is one whole step."""
    step_of = _steps(_QUICK if quick else _FULL)
    step_of(2, None)()  # from its first step on, AdamW holds two moments
    return step_of(batch, chunk)


def _memory(quick: bool, batch: int, chunk: int | None) -> Memory:
    case = {"quick": quick, "batch": batch, "chunk": chunk}
    return peak_memory("benchmarks.gradient_cache:memory_case", **case)


def _memory_row(batch: int, chunk: int | None, held: Memory) -> dict[str, object]:
    return {
        "batch": batch,
        "chunk": chunk or "uncached",
        "imports": held.imports,
        "towers_optimizer_and_batch": held.ready - held.imports,
        "step_on_top": held.extra,
        "peak_above_imports": held.total,
        "peak_of_the_process": held.peak,
    }


def _steps(sizes: _Sizes) -> Callable[[int, int | None], Callable[[], None]]:
    """Make towers and optimizer; return a function from batch size and chunk to a step."""
    torch.manual_seed(0)
    model = TwoTower(
        ImageTower(sizes.model, embed_dim=512, image_size=sizes.image_size),
        TextTower(width=sizes.width, num_layers=sizes.num_layers),
    )
    task = Pretraining(model)
    backend = TorchBackend(task, OptimizerConfig(), ALONE)
    backend.encoder.precision = _PRECISION

    def step_of(batch_size: int, chunk: int | None) -> Callable[[], None]:
        shape = (batch_size, 3, sizes.image_size, sizes.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        batch = Batch(images, draw_tokens(batch_size), torch.arange(batch_size))

        def step() -> None:
            own_step(task, backend, task.inputs(batch), chunks=num_chunks(batch_size, chunk))

        return step

    return step_of
