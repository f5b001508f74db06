"""How much memory does a rank hold under DDP and ZeRO, and does `unicl plan` foretell it?"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.harness import reset_peak, resident, status
from benchmarks.ranks import on_ranks
from benchmarks.record import Bar, Result
from benchmarks.training import Batch, own_step
from unicl.build import build_backend
from unicl.config import Recipe, parse_recipe
from unicl.distributed import Ranks
from unicl.engine.gradient_cache import num_chunks
from unicl.models import build_model
from unicl.plan import Plan, plan
from unicl.pretraining import Pretraining

_MIB, _GIB = 2**20, 2**30
_TEXT_LENGTH = 16
_WARM_UP = 2  # from the second step on there are moments, and ZeRO 3 knows what to fetch next

# 152M parameters, and rows so few and small that parameters are nearly all there is.
_FULL = {
    "image_tower.model": "coswin_base",
    "image_tower.image_size": "64",
    "trainer.batch_size": "16",
    "trainer.chunk": "2",
    "trainer.precision": "fp32",
    "engine.reduce_every": "chunk",
}
_QUICK = {
    **_FULL,
    "image_tower.model": "coswin_nano",
    "image_tower.image_size": "48",
    "text_tower.num_layers": "1",
    "text_tower.width": "128",
    "text_tower.num_heads": "2",
}


def measure(*, quick: bool) -> Result:
    """A step, and the copy for an evaluation, on 4 ranks of one thread, under each backend."""
    sizes, ranks, stages = (_QUICK, 1, [3]) if quick else (_FULL, 4, [0, 1, 2, 3])
    rows = {"torch": _row(ranks, "torch", {**sizes, "engine.backend": "torch"})}
    for stage in stages:
        engine = {"engine.backend": "deepspeed", "engine.zero_stage": str(stage)}
        rows[f"ZeRO {stage}"] = _row(ranks, f"ZeRO {stage}", {**sizes, **engine})
    errors = {name: abs(row["predicted"] / row["measured"] - 1) for name, row in rows.items()}
    worst = max(errors, key=lambda name: errors[name])
    held = [row["measured"] for row in rows.values()]
    step = max(after / before for before, after in itertools.pairwise(held))
    recipe = _recipe(sizes)
    return Result(
        bars=[
            Bar(
                f"unicl plan, largest error of the memory per rank ({worst})",
                100 * errors[worst],
                15,
                "%",
                "at most",
            ),
            Bar("memory of an engine over the one before, at worst", step, 1, "x", "at most"),
            Bar("memory of ZeRO 3 over DDP", held[-1] / held[0], None, "x", "at most"),
        ],
        tables={"Peak memory per rank in MiB, of a step and an evaluation": list(rows.values())},
        facts={
            "ranks": ranks,
            "parameters": sum(p.numel() for p in build_model(recipe).parameters()),
            "batch_size": recipe.trainer.batch_size,
            "chunk": recipe.trainer.chunk,
            "memory": "resident set above that after imports, the largest of the ranks",
        },
    )


def _row(ranks: int, name: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    foretold = plan_of(ranks, overrides)
    held = on_ranks(ranks, "benchmarks.zero_memory:measure_rank", overrides=overrides)
    measured = [rank["peak"] - rank["imports"] for rank in held]
    phase = foretold.memory
    return {
        "engine": name,
        "predicted": foretold.memory.total / _MIB,
        "measured": max(measured),
        "error": f"{100 * (foretold.memory.total / _MIB / max(measured) - 1):+.1f}%",
        "parameters": phase.parameters / _MIB,
        "gradients": phase.gradients / _MIB,
        "optimizer": phase.optimizer / _MIB,
        "activations": phase.activations / _MIB,
        "buffers": phase.buffers / _MIB,
        "phase": phase.name,
    }


def plan_of(ranks: int, overrides: Mapping[str, str]) -> Plan:
    """Plan the recipe for CPUs."""
    return plan(
        _recipe(overrides),
        gpus=ranks,
        gpu_memory=64,
        text_length=_TEXT_LENGTH,
        device="cpu",
    )


def _recipe(overrides: Mapping[str, str]) -> Recipe:
    return parse_recipe("", overrides)


def measure_rank(ranks: Ranks, overrides: Mapping[str, str]) -> dict[str, float]:
    """Run steps on one of the ranks, and return its memory after imports and at the peak in MiB."""
    recipe = _recipe(overrides)
    if recipe.engine.backend == "deepspeed":
        import deepspeed  # noqa: F401  an import too
    ranks.barrier()
    imports = resident()
    torch.manual_seed(0)
    task = Pretraining(build_model(recipe), tile=recipe.loss.tile, ranks=ranks)
    backend = build_backend(recipe, task, ranks)
    batch = _make_batch(recipe, len(ranks.share(recipe.trainer.batch_size)))

    def step() -> None:
        chunks = num_chunks(len(batch.labels), recipe.trainer.chunk)
        own_step(task, backend, task.inputs(batch), chunks=chunks)

    for _ in range(_WARM_UP):
        step()
    resident()
    ranks.barrier()
    reset_peak()
    step()
    with backend.whole_model():  # what an evaluation takes
        pass
    return {"imports": imports, "peak": status("VmHWM")}


def _make_batch(recipe: Recipe, rows: int) -> Batch:
    """Make different texts that all have the planned length."""
    side = recipe.image_tower.image_size
    tokens = torch.zeros(rows, recipe.text_tower.context_length, dtype=torch.int64)
    tokens[:, : _TEXT_LENGTH - 1] = torch.randint(1, 40_000, (rows, _TEXT_LENGTH - 1))
    tokens[:, _TEXT_LENGTH - 1] = 49407
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8)
    return Batch(images, tokens, torch.arange(rows))
