"""Does every way to run give the gradient of the single-process, full-batch loss, here and now?

One batch, one set of weights; the truth is the loss as the paper prints it, in fp32, in one
process, without any economy. A mode that is wrong by a factor (ranks, chunks) or in its direction
shows.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import rich.box
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unicl.build import build_backend, build_train_loader
from unicl.config import PRETRAINING, EngineConfig, ImageTowerConfig, Recipe, TextTowerConfig
from unicl.data.loader import Batch
from unicl.distributed import Ranks, joined
from unicl.engine.backend import tower_of
from unicl.engine.gradient_cache import backward
from unicl.engine.precision import Precision
from unicl.errors import UniclError, UsageError
from unicl.loss import reference_loss
from unicl.models import build_model, build_tokenizer, choose_device, complete
from unicl.pretraining import Pretraining
from unicl.towers.two_tower import TwoTower

# Relative distance from the truth. Rounding alone stays well below, and the smallest mistake known
# among trainers, a local loss whose texts give no gradient back, lies at 0.28.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.15}

_CHUNKS = 4
_SLIM_IMAGE = ImageTowerConfig(model="coswin_nano", image_size=48)
_SLIM_TEXT = TextTowerConfig(width=64, num_layers=2, num_heads=2)


@dataclass(frozen=True)
class Mode:
    """One way to run a step."""

    ranks: int
    engine: str
    """`torch`, or DeepSpeed's `zero0` to `zero3`; `zero3/chunk` reduces after every chunk."""
    chunks: int
    precision: Precision
    tile: int


@dataclass(frozen=True)
class Agreement:
    """A gradient beside the truth."""

    ratio: float
    """Its length over the truth's."""
    angle: float
    """Degrees between the two."""
    distance: float
    """Length of their difference over the truth's length."""


@dataclass(frozen=True)
class Verdict:
    """How the gradients of one mode compare."""

    mode: Mode
    towers: dict[str, Agreement]

    @property
    def right(self) -> bool:
        """Whether every tower's gradient is the true one, up to rounding."""
        limit = TOLERANCE[self.mode.precision]
        return all(agreement.distance <= limit for agreement in self.towers.values())


def verify_gradients(
    recipe: Recipe,
    *,
    samples_per_rank: int = 8,
    slim: bool = False,
    engines: Sequence[str] = (),
) -> list[Verdict]:
    """Compare every mode that these ranks can run with the truth, and print the table.

    Args:
        recipe: Its towers and its data; without data the batch is made up.
        samples_per_rank: Size of the batch over the number of ranks; the whole batch must fit one
            process without checkpointing or gradient cache.
        slim: Take small towers instead of the recipe's.
        engines: Which ones to verify, such as `torch` and `zero2/chunk`; all unless given.

    Returns:
        The verdicts, on every rank.

    Raises:
        UniclError: A mode is wrong; the table is printed before.
        UsageError: There is no such engine, or no sample, or the recipe has a plug-in's task.
    """
    if recipe.task != PRETRAINING:
        raise UsageError(
            "verify-gradients compares the gradients of image-text pretraining only, not those of "
            f"a recipe of {recipe.task}"
        )
    known = _engines(recipe.engine)
    if unknown := sorted(set(engines).difference(known)):
        raise UsageError(f"there is no engine {unknown[0]!r}; there are {', '.join(known)}")
    if samples_per_rank < 1:
        raise UsageError(f"--samples-per-rank must be positive, got {samples_per_rank}")
    device = choose_device(recipe.trainer.device)
    with joined(device, timeout_seconds=recipe.engine.timeout_seconds, alone=False) as ranks:
        size = max(2, samples_per_rank * ranks.size)
        own = ranks.together(lambda: _prepare(recipe, size, slim))
        chosen = {name: known[name] for name in engines or known}
        verdicts = [*_verdicts(own, chosen, device, ranks)]
        if ranks.first:
            _print(verdicts, ranks.size)
    wrong = [verdict for verdict in verdicts if not verdict.right]
    if wrong:
        raise UniclError(f"{len(wrong)} of {len(verdicts)} modes give another gradient")
    return verdicts


@dataclass(frozen=True)
class _Problem:
    recipe: Recipe
    batch: Batch


def _prepare(recipe: Recipe, size: int, slim: bool) -> _Problem:
    if slim:
        recipe = replace(
            recipe, model=None, image_tower=_SLIM_IMAGE, text_tower=_SLIM_TEXT, embed_dim=64
        )
    recipe = complete(recipe)
    # Stochastic depth draws per rank and chunk, so there would be no one truth.
    tower = replace(recipe.image_tower, drop_path_rate=0.0)
    recipe = replace(
        recipe,
        image_tower=tower,
        trainer=replace(recipe.trainer, batch_size=size),
        data=replace(recipe.data, num_workers=0),
    )
    if recipe.data.train:
        batches = build_train_loader(recipe).batches()
        return _Problem(recipe, next(batch for batch in batches if len(batch) > 1))
    return _Problem(recipe, _made_up(recipe, size))


def _made_up(recipe: Recipe, size: int) -> Batch:
    """Make a batch of noise and captions; every fourth sample shares the text of the one before."""
    generator = torch.Generator().manual_seed(0)
    side = recipe.image_tower.image_size
    numbers = [index - (index % 4 == 3) for index in range(size)]
    texts = tuple(" ".join(["a photo"] * (number % 5 + 1)) + f" {number}" for number in numbers)
    return Batch(
        torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        build_tokenizer(recipe)(texts),
        torch.from_numpy(np.array(numbers, dtype=np.int64)),
        tuple(map(str, range(size))),
        texts,
        size,
        {},
    )


def _verdicts(
    problem: _Problem, engines: Mapping[str, EngineConfig], device: torch.device, ranks: Ranks
) -> Iterator[Verdict]:
    recipe, batch = problem.recipe, problem.batch
    truth = _truth(_fresh(recipe, device), batch.to(device), recipe.loss.targets)
    share = ranks.share(len(batch))
    own = _part(batch, slice(share.start, share.stop))
    half = "fp16" if recipe.trainer.precision == "fp16" else "bf16"
    small = max(1, len(batch) // 3)
    for name, engine in engines.items():
        task = Pretraining(_fresh(recipe, device), targets=recipe.loss.targets, ranks=ranks)
        backend = build_backend(replace(recipe, engine=engine), task, ranks)
        chunked = (_CHUNKS,) if engine.reduce_every == "chunk" else (1, _CHUNKS)
        for chunks, (precision, tile) in itertools.product(
            chunked, (("fp32", small), ("fp32", recipe.loss.tile), (half, recipe.loss.tile))
        ):
            task.tile = tile
            backend.encoder.precision = precision
            backward(task, backend, task.inputs(own).to(device), chunks=chunks)
            towers = _compare(backend.gradients(), truth)
            backend.drop()
            yield Verdict(Mode(ranks.size, name, chunks, precision, tile), towers)


def _engines(config: EngineConfig) -> dict[str, EngineConfig]:
    """Return the engines to verify by name, with what the recipe offloads where it can be."""
    plain = replace(config, offload_optimizer=False, offload_parameters=False, reduce_every="step")
    deepspeed = replace(plain, backend="deepspeed")
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    engines = {"torch": replace(plain, backend="torch")}
    for stage in stages:
        engine = replace(
            deepspeed,
            zero_stage=stage,
            offload_optimizer=config.offload_optimizer and stage > 0,
            offload_parameters=config.offload_parameters and stage == 3,
        )
        engines[f"zero{stage}"] = engine
        if stage > 0:
            engines[f"zero{stage}/chunk"] = replace(engine, reduce_every="chunk")
    return engines


def _fresh(recipe: Recipe, device: torch.device) -> TwoTower:
    torch.manual_seed(recipe.trainer.seed)
    return build_model(recipe, start=False).to(device)


def _truth(model: TwoTower, batch: Batch, targets: str) -> dict[str, Tensor]:
    """Differentiate the dense loss of the whole batch in this process alone."""
    labels = batch.labels if targets == "unicl" else torch.arange(len(batch)).to(batch.labels)
    reference_loss(
        model.encode_image(batch.images),
        model.encode_text(batch.tokens, economies=False),
        labels,
        model.scale(),
    ).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _part(batch: Batch, rows: slice) -> Batch:
    return replace(
        batch,
        images=batch.images[rows],
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        keys=batch.keys[rows],
        texts=batch.texts[rows],
    )


def _compare(
    gradients: Iterator[tuple[str, Tensor]], truth: dict[str, Tensor]
) -> dict[str, Agreement]:
    """Compare per tower; products of whole towers are summed in fp64."""
    sums: dict[str, Tensor] = {}
    for name, gradient in gradients:
        ours, true = gradient.flatten().double(), truth[name].flatten().double()
        products = torch.stack(
            [ours @ ours, ours @ true, true @ true, (ours - true).square().sum()]
        )
        tower = tower_of(name)
        sums[tower] = sums[tower] + products if tower in sums else products
    return {tower: _agreement(*products.tolist()) for tower, products in sums.items()}


def _agreement(own: float, both: float, true: float, difference: float) -> Agreement:
    cosine = both / math.sqrt(own * true) if own * true > 0 else math.nan
    return Agreement(
        ratio=math.sqrt(own / true) if true > 0 else math.nan,
        angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if own * true > 0 else math.nan,
        distance=math.sqrt(difference / true) if true > 0 else math.inf,
    )


def _print(verdicts: list[Verdict], num_ranks: int) -> None:
    table = Table(
        title=f"Gradients on {num_ranks} rank{'s' * (num_ranks > 1)} beside the truth of one "
        "process and the whole batch: ratio of lengths, angle",
        title_justify="left",
        box=rich.box.SIMPLE,
    )
    for name in ("engine", "chunks", "precision", "tile"):
        table.add_column(name, no_wrap=True)
    for tower in verdicts[0].towers:
        table.add_column(tower, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in verdicts:
        mode = verdict.mode
        cells = [f"{each.ratio:.4f} {each.angle:5.2f}°" for each in verdict.towers.values()]
        table.add_row(
            *(mode.engine, str(mode.chunks), mode.precision, str(mode.tile)),
            *cells,
            "[green]right[/]" if verdict.right else "[red]WRONG[/]",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    if num_ranks == 1:
        console.print("Start it with torchrun, deepspeed or srun to verify several ranks.")
