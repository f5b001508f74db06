"""Memory, operations and days of a recipe on some GPUs, and what to change if it is too much.

Florence trained 893M parameters on 512 A100 of 40 GB within 10 days (section 2.3); its means were
ZeRO, activation checkpointing, mixed precision and the gradient cache (section 2.7).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from unicl.config import PRETRAINING, EngineConfig, Recipe
from unicl.engine.optimizer import kinds
from unicl.errors import UsageError
from unicl.plan.memory import Load, Phase, peak
from unicl.plan.towers import Towers

GIB = 2**30
_FLOAT = 4
# The CUDA context, NCCL's and cuBLAS's workspaces, and what the allocator cannot use.
_RESERVE = 2 * GIB

# Guesses, not measured: time of a step over one without, for the exchanges it adds.
_STAGE_COST = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.2}
_EXCHANGE_PER_CHUNK = 1.1
_OFFLOAD_OPTIMIZER_COST = 1.3
_OFFLOAD_PARAMETERS_COST = 1.5


@dataclass(frozen=True)
class Plan:
    """What a recipe will need on each rank; sizes in bytes."""

    recipe: Recipe
    gpus: int
    gpu_memory: int | float
    """GiB of each GPU."""
    peak_tflops: int | float
    """What one GPU could do at best, in 1e12 operations per second."""
    text_length: int
    """Tokens of a text that were reckoned with."""
    parameters: int
    """Trained parameters, counted."""
    memory: Phase
    """The phase of a step that holds most."""
    forward_flops: int
    """Operations of one image-text pair's forward."""
    training_flops: int
    """Operations of its forward, backward and what is recomputed."""
    changes: tuple[str, ...] | None
    """Flags that make it fit, cheapest first; empty if it fits, None if none of them do."""
    slowdown: float
    """Time of a step with the changes over that without."""
    changed_memory: Phase
    """The phase that holds most with the changes; with the last resort if nothing fits."""

    @property
    def fits(self) -> bool:
        """Whether the recipe fits as it is."""
        return self.memory.total <= self.gpu_memory * GIB

    @property
    def rows(self) -> int:
        """Samples of a rank."""
        return -(-self.recipe.trainer.batch_size // self.gpus)

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self.recipe.trainer.steps * self.recipe.trainer.batch_size

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        return float(self.samples) * self.training_flops

    def days(self, utilisation: float) -> float:
        """Return how long the run takes where the GPUs reach this share of their peak."""
        return self.flops / (self.gpus * self.peak_tflops * 1e12 * utilisation) / 86_400


def plan(
    recipe: Recipe,
    *,
    gpus: int,
    gpu_memory: int | float,
    peak_tflops: int | float = 312.0,
    text_length: int | None = None,
    device: str = "cuda",
) -> Plan:
    """Foretell what a recipe needs; uses neither a GPU nor data, and reads no weights.

    Args:
        recipe: What is to be trained.
        gpus: Number of ranks, one GPU each.
        gpu_memory: GiB of one GPU.
        peak_tflops: What a GPU does at best in the recipe's precision; 312 is an A100 in bf16.
        text_length: Tokens of the longest text in a batch; unset reckons with the whole context,
            although texts are trimmed and most are short.
        device: "cuda", or "cpu" for what the same takes on CPUs.

    Raises:
        UsageError: A number is not positive, there are fewer samples in a batch than GPUs, or the
            recipe trains a model of open_clip or has a plug-in's task.
    """
    if recipe.task != PRETRAINING:
        raise UsageError(
            f"plan reckons with image-text pretraining only, not with a recipe of {recipe.task}"
        )
    if recipe.model is not None:
        raise UsageError(
            f"plan reckons with towers that a recipe describes, not with {recipe.model}; "
            "describe towers of its size"
        )
    context = recipe.text_tower.context_length
    text_length = context if text_length is None else text_length
    for name, value in (("gpus", gpus), ("gpu-memory", gpu_memory), ("peak-tflops", peak_tflops)):
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} must be positive, got {value}")
    if not 0 < text_length <= context:
        raise UsageError(f"--text-length must lie in [1, {context}], got {text_length}")
    if recipe.trainer.batch_size < gpus:
        raise UsageError(
            f"trainer.batch_size {recipe.trainer.batch_size} is smaller than --gpus {gpus}; "
            "each GPU needs a sample at least"
        )
    precision = recipe.trainer.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    towers = Towers(recipe, device=device, precision=precision, text_length=text_length)
    reserve = _RESERVE if device == "cuda" else 0
    own = _Way(recipe, towers, gpus, reserve)
    limit = gpu_memory * GIB
    best, fits = (own, True) if own.memory.total <= limit else _cheapest(own, limit)
    return Plan(
        recipe=recipe,
        gpus=gpus,
        gpu_memory=gpu_memory,
        peak_tflops=peak_tflops,
        text_length=text_length,
        parameters=sum(map(sum, towers.groups)),
        memory=own.memory,
        forward_flops=own.forward_flops,
        training_flops=own.training_flops,
        changes=tuple(own.flags(best)) if fits else None,
        slowdown=best.cost / own.cost,
        changed_memory=best.memory,
    )


@dataclass(frozen=True)
class _Way:
    """One way to carry out a recipe's step."""

    recipe: Recipe
    towers: Towers
    gpus: int
    reserve: int

    @property
    def rows(self) -> int:
        return -(-self.recipe.trainer.batch_size // self.gpus)

    @property
    def chunks(self) -> int:
        chunk = self.recipe.trainer.chunk
        return 1 if chunk is None else -(-self.rows // chunk)

    @property
    def checkpointing(self) -> dict[str, bool]:
        return {
            "image": self.recipe.image_tower.checkpointing,
            "text": self.recipe.text_tower.checkpointing,
        }

    @property
    def memory(self) -> Phase:
        recipe, rows, at_once = self.recipe, self.rows, -(-self.rows // self.chunks)
        side, context = recipe.image_tower.image_size, recipe.text_tower.context_length
        load = Load(
            groups=self.towers.groups,
            ranks=self.gpus,
            chunks=self.chunks,
            moments=len(kinds(recipe.optimizer)),
            frozen=_FLOAT * sum(self.towers.frozen.values()),
            activations=sum(
                self.towers.memory(tower, checkpointing=on).activations(at_once)
                for tower, on in self.checkpointing.items()
            ),
            loss=_loss_bytes(recipe, rows),
            inputs=rows * (3 * side * side + 8 * context),
            reserve=self.reserve,
            gloo=self.towers.device == "cpu",
        )
        return peak(load, recipe.engine)

    @property
    def forward_flops(self) -> int:
        return sum(self.towers.flops(tower) for tower in self.checkpointing)

    @property
    def training_flops(self) -> int:
        """Backward takes twice a forward; the gradient cache and checkpointing take one more.

        A locked tower has its forward only.
        """
        return sum(
            self.towers.flops(tower)
            * (1 if self.towers.frozen[tower] else 3 + (self.chunks > 1) + checkpointing)
            for tower, checkpointing in self.checkpointing.items()
        )

    @property
    def cost(self) -> float:
        """Time of a step: operations, times a guess of what exchanges add."""
        engine = self.recipe.engine
        cost = float(self.training_flops)
        if engine.backend == "deepspeed":
            cost *= _STAGE_COST[engine.zero_stage]
            if engine.zero_stage >= 2 and engine.reduce_every == "chunk" and self.chunks > 1:
                cost *= _EXCHANGE_PER_CHUNK
        cost *= _OFFLOAD_OPTIMIZER_COST if engine.offload_optimizer else 1
        return cost * (_OFFLOAD_PARAMETERS_COST if engine.offload_parameters else 1)

    def others(self) -> Iterator["_Way"]:
        """Yield this way with whatever saves memory and is not done yet."""
        recipe = self.recipe
        for engine, image, text, chunk in itertools.product(
            _engines(recipe.engine),
            self._choices("image"),
            self._choices("text"),
            self._chunk_sizes(),
        ):
            yield dataclasses.replace(
                self,
                recipe=dataclasses.replace(
                    recipe,
                    engine=engine,
                    image_tower=dataclasses.replace(recipe.image_tower, checkpointing=image),
                    text_tower=dataclasses.replace(recipe.text_tower, checkpointing=text),
                    trainer=dataclasses.replace(recipe.trainer, chunk=chunk),
                ),
            )

    def _choices(self, tower: str) -> list[bool]:
        if self.checkpointing[tower] or not self.towers.can_checkpoint(tower):
            return [self.checkpointing[tower]]
        return [False, True]

    def _chunk_sizes(self) -> list[int | None]:
        """Return the recipe's chunk and smaller ones: all that give another number of chunks."""
        sizes = {-(-self.rows // count) for count in range(1, self.rows + 1)}
        most = -(-self.rows // self.chunks)
        own = self.recipe.trainer.chunk
        return [own, *sorted((size for size in sizes if size < most), reverse=True)]

    def flags(self, other: "_Way") -> Iterator[str]:
        """Yield the flags that turn this way into another one."""
        for section in ("engine", "image_tower", "text_tower", "trainer"):
            before, after = getattr(self.recipe, section), getattr(other.recipe, section)
            for item in dataclasses.fields(before):
                value = getattr(after, item.name)
                if value != getattr(before, item.name):
                    text = str(value).lower() if isinstance(value, bool) else str(value)
                    yield f"--{section}.{item.name} {text}"


def _engines(own: EngineConfig) -> Iterator[EngineConfig]:
    """Yield the engine's settings, then those that share out more."""
    yield own
    stage = own.zero_stage if own.backend == "deepspeed" else 0
    for more in range(max(stage, 1), 4):
        for reduce_every in dict.fromkeys([own.reduce_every, "chunk"]):
            if more == 1 and reduce_every != own.reduce_every:
                continue  # changes nothing at stage 1
            for optimizer in dict.fromkeys([own.offload_optimizer, True]):
                for parameters in dict.fromkeys([own.offload_parameters, more == 3 and optimizer]):
                    yield dataclasses.replace(
                        own,
                        backend="deepspeed",
                        zero_stage=more,  # type: ignore[arg-type]
                        reduce_every=reduce_every,
                        offload_optimizer=optimizer,
                        offload_parameters=parameters,
                    )


def _cheapest(own: _Way, limit: int | float) -> tuple[_Way, bool]:
    """Return the fastest way that fits with fewest flags, or the smallest one if none fits."""
    ways = [(way, way.memory.total) for way in own.others()]
    fitting = [way for way, total in ways if total <= limit]
    if not fitting:
        return min(ways, key=lambda pair: pair[1])[0], False
    return min(
        fitting, key=lambda way: (round(way.cost / own.cost, 3), way.chunks, len([*own.flags(way)]))
    ), True


def _loss_bytes(recipe: Recipe, rows: int) -> int:
    """Return what `unicl.loss` takes across ranks: linear in the whole batch, and two tiles."""
    batch, tile = recipe.trainer.batch_size, recipe.loss.tile
    texts = 2 * batch * recipe.embed_dim  # gathered, and their gradient
    images = 6 * rows * recipe.embed_dim  # both sides' own, their gradients, sums per class
    tiles = 2 * min(tile, rows) * min(tile, batch)
    return _FLOAT * (texts + images + tiles + 20 * batch)
