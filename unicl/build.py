"""The only place where configuration becomes objects."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch

from unicl.config import PRETRAINING, Recipe, find_plugin, recipe_to_toml
from unicl.data.atomic import atomic_file, write_error
from unicl.data.augment import TrainTransform
from unicl.data.hash_table import TextHashTable
from unicl.data.loader import BatchLoader, Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import TEMPLATES, PromptSampler
from unicl.data.reader import Decode, ImageDecoder, SampleSet, samples_at_once
from unicl.data.shards import ShardSet
from unicl.distributed import ALONE, Ranks, joined
from unicl.engine.backend import Backend
from unicl.engine.checkpoint import (
    checkpoints,
)
from unicl.engine.schedule import learning_rate
from unicl.engine.task import Task, TaskInputs
from unicl.engine.torch_backend import TorchBackend
from unicl.engine.trainer import Evaluator, Run, Trainer
from unicl.errors import UsageError
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.retrieval import Retrieval
from unicl.evaluation.zero_shot import ZeroShot
from unicl.models import (
    build_model,
    build_tokenizer,
    build_transform,
    choose_device,
    complete,
    like,
    read_recipe,
    with_towers_of,
)
from unicl.pretraining import Pretraining, StepFlops
from unicl.towers.image import check_image_size
from unicl.towers.two_tower import TwoTower

logger = logging.getLogger("unicl")

# Keys that change how a run is carried out or reported, not what it computes.
_FREE_ON_RESUME = {
    "data.max_skipped_share",
    "data.num_workers",
    "description",
    "engine.backend",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.persistence_threshold",
    "engine.reduce_every",
    "engine.timeout_seconds",
    "engine.zero_stage",
    "evaluation.batch_size",
    "evaluation.data",
    "evaluation.names",
    "evaluation.templates",
    "image_tower.checkpointing",
    "name",
    "text_tower.checkpointing",
    "trainer.chunk",
    "trainer.compile",
    "trainer.device",
    "trainer.eval_every",
    "trainer.keep_best",
    "trainer.keep_last",
    "trainer.log_every",
    "trainer.max_nonfinite",
    "trainer.save_every",
}

_PROBLEMS_SHOWN = 3
_DIGEST_FILE = "data.digest"


@runtime_checkable
class TextSamples(SampleSet, Protocol):
    """Samples with a text hash table; `unicl.data.shards.ShardSet` is one."""

    @property
    def shard_sizes(self) -> np.ndarray:
        """Number of samples that lie together, one number for each place."""

    def table(self) -> TextHashTable:
        """Return the text hash table."""

    def digest(self) -> str:
        """Return hexadecimal digits that change with the samples or their order."""


@dataclass(frozen=True)
class HeldOut:
    """Evaluator of one set of held-out shards; its images are embedded once for all figures."""

    loader: Loader
    zero_shot: ZeroShot
    retrieval: Retrieval

    def __call__(self, model: TwoTower) -> dict[str, float]:
        """Return `zero_shot/top1`, ..., `retrieval/i2t_r1`, ..."""
        embedded = embed_images(model, self.loader)
        return {**self.zero_shot(model, embedded), **self.retrieval(model, embedded)}


def train(recipe: Recipe, out: str | Path | None = None) -> Run:
    """Train a recipe, or go on with the run that its folder already holds.

    Args:
        recipe: what to train.
        out: the run's folder; `runs/NAME` unless given.

    Raises:
        UsageError: the folder holds a run of another recipe, or a setting does not fit the data.
        UniclError: what stopped the run, in one line.
    """
    recipe = complete(recipe)
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    if recipe.task != PRETRAINING:
        recipe = find_plugin(recipe.task).complete(_as_begun(recipe, folder))
    deepspeed = recipe.engine.backend == "deepspeed"
    with joined(
        choose_device(recipe.trainer.device),
        timeout_seconds=recipe.engine.timeout_seconds,
        alone=not deepspeed,
    ) as ranks:
        ranks.together(lambda: _check_free(folder, recipe))
        # Built before anything is written: a mistake in the recipe must not occupy the folder.
        trainer = ranks.together(lambda: build_trainer(recipe, folder, ranks))
        digest = ranks.together(lambda: _check_data(folder, recipe, trainer))
        ranks.on_first(lambda: _claim(folder, recipe, digest))
        return trainer.fit()


@dataclass(frozen=True)
class Parts:
    """What a run is made of besides the engine."""

    task: Task
    """What is trained, its model with the weights to start from, still on the CPU."""
    loader: BatchLoader[Any]
    """This rank's part of the training batches."""
    evaluators: Sequence[Evaluator] = ()
    """What measures the model on held-out data."""
    flops: Callable[[TaskInputs], float] | None = None
    """Counts the operations of a step on this rank."""
    prepare: Callable[[Path], None] | None = None
    """Makes what the steps need besides and keeps it in the run's folder; called on all ranks, when
    they can exchange, each time before training goes on."""


def build_trainer(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> Trainer:
    """Build the trainer of a run on one of its ranks; exchanges nothing yet."""
    if not recipe.data.train:
        raise UsageError(
            "data.train is not set; `unicl prepare SOURCE --out DIR` makes such a folder"
        )
    device = choose_device(recipe.trainer.device)
    torch.manual_seed(recipe.trainer.seed)
    build = _build_pretraining
    if recipe.task != PRETRAINING:
        build = find_plugin(recipe.task).build
    # A run that goes on has its weights in a checkpoint; the file to start from may be gone.
    parts: Parts = build(recipe, ranks, start=not checkpoints(folder / "checkpoints"))
    parts.task.model.to(device)
    if recipe.trainer.compile:
        for tower in parts.task.model.children():
            tower.compile()  # in place: the weights keep their names
    return Trainer(
        parts.task,
        parts.loader,
        folder,
        backend=lambda: build_backend(recipe, parts.task, ranks),
        config=recipe.trainer,
        learning_rate=functools.partial(
            learning_rate,
            peak=recipe.optimizer.learning_rate,
            final=recipe.schedule.final_learning_rate,
            warmup_steps=recipe.schedule.warmup_steps,
            total_steps=recipe.trainer.steps,
            decay=recipe.schedule.decay,
        ),
        evaluators=parts.evaluators,
        flops=parts.flops,
        prepare=parts.prepare,
        ranks=ranks,
    )


def _build_pretraining(recipe: Recipe, ranks: Ranks, *, start: bool) -> Parts:
    model, size = build_model(recipe, start=start), recipe.image_tower.image_size
    check_image_size(model.image, size)
    return contrastive_parts(
        recipe,
        ranks,
        model,
        loader=build_train_loader(recipe, ranks),
        evaluators=build_evaluators(recipe, ranks),
        image_shape=(3, size, size),
    )


def contrastive_parts(
    recipe: Recipe,
    ranks: Ranks,
    model: TwoTower,
    *,
    loader: Loader,
    evaluators: Sequence[Evaluator],
    image_shape: tuple[int, ...],
    images_per_sample: int = 1,
) -> Parts:
    """Put together what trains two towers by the contrastive loss, whatever the image tower sees.

    Args:
        recipe: the loss, and the longest text.
        ranks: the processes that share a batch.
        model: the towers.
        loader: this rank's part of the training batches.
        evaluators: what measures the model.
        image_shape: shape of one image, or of what else the image tower takes.
        images_per_sample: how many of these a sample has, such as frames.

    Raises:
        UsageError: A batch would have one pair only.
    """
    if recipe.trainer.batch_size == 1:
        raise UsageError("trainer.batch_size must be at least 2: the loss of one pair is always 0")
    return Parts(
        Pretraining(model, targets=recipe.loss.targets, tile=recipe.loss.tile, ranks=ranks),
        loader,
        evaluators,
        StepFlops(
            model,
            image_shape=image_shape,
            context_length=recipe.text_tower.context_length,
            images_per_sample=images_per_sample,
        ),
    )


def build_backend(recipe: Recipe, task: Task, ranks: Ranks = ALONE) -> Backend:
    """Build what carries out a task's steps, around a model that has its weights."""
    if recipe.engine.backend == "torch":
        return TorchBackend(task, recipe.optimizer, ranks)
    from unicl.engine.deepspeed_backend import DeepSpeedBackend  # takes seconds to import

    return DeepSpeedBackend(task, recipe.optimizer, ranks, recipe.engine)


def build_train_loader(
    recipe: Recipe,
    ranks: Ranks = ALONE,
    *,
    samples: TextSamples | None = None,
    decode: Decode | None = None,
) -> Loader:
    """Build the endless, reproducible stream of training batches.

    Args:
        recipe: data, batch size and seed.
        ranks: the processes that share the batches.
        samples: what is trained on; unset opens the recipe's shards.
        decode: makes the image tower's input; unset decodes and augments images.
    """
    data, seed, batch_size = recipe.data, recipe.trainer.seed, recipe.trainer.batch_size
    shards = open_shards(Path(data.train)) if samples is None else samples
    if batch_size > shards.num_samples:
        logger.warning(
            "trainer.batch_size %d is larger than %s with its %d samples: they repeat in a batch",
            batch_size,
            data.train,
            shards.num_samples,
        )
    return _build_loader(
        recipe,
        shards,
        SampleOrder(shards.shard_sizes, seed=seed, window=data.shuffle_window),
        decode=build_train_decoder(recipe) if decode is None else decode,
        prompts=PromptSampler(data.templates, short_text_words=data.short_text_words, seed=seed),
        batch_size=batch_size,
        seed=seed,
        ranks=ranks,
    )


def build_train_decoder(recipe: Recipe) -> Decode:
    """Build what decodes and augments an image of the training data."""
    transform = TrainTransform(
        recipe.image_tower.image_size,
        scale=recipe.data.crop_scale,
        ratio=recipe.data.crop_ratio,
        flip=recipe.data.flip,
    )
    return ImageDecoder(transform, recipe.data.max_image_pixels)


def build_eval_loader(
    recipe: Recipe, samples: TextSamples, ranks: Ranks = ALONE, *, decode: Decode | None = None
) -> Loader:
    """Build one ordered, unaugmented pass over samples.

    Args:
        recipe: towers and batch size.
        samples: what is evaluated on.
        ranks: the processes that share the pass.
        decode: makes the image tower's input; unset decodes images.
    """
    if decode is None:
        decode = ImageDecoder(build_transform(recipe), recipe.data.max_image_pixels)
    return _build_loader(
        recipe,
        samples,
        SampleOrder(samples.shard_sizes, seed=0, window=1, shuffle=False),
        decode=decode,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=samples_at_once(decode, recipe.evaluation.batch_size),
        seed=0,
        ranks=ranks,
    )


def _build_loader(recipe: Recipe, samples: TextSamples, order: SampleOrder, **own: Any) -> Loader:
    return Loader(
        samples,
        order,
        tokenize=build_tokenizer(recipe),
        num_workers=recipe.data.num_workers,
        max_skipped_share=recipe.data.max_skipped_share,
        **own,
    )


def open_shards(folder: Path) -> ShardSet:
    """Open a folder of shards, and say at once what of it will be skipped later."""
    shards = ShardSet.open(folder)
    shards.table()  # a damaged one is told at once, and the loader's workers share it
    problems = shards.problems(indices=False)
    for problem in problems[:_PROBLEMS_SHOWN]:
        logger.warning("%s; the samples it lacks are skipped", problem)
    if len(problems) > _PROBLEMS_SHOWN:
        logger.warning("%d more tars of %s are damaged", len(problems) - _PROBLEMS_SHOWN, folder)
    return shards


def build_evaluators(recipe: Recipe, ranks: Ranks = ALONE, **how: Any) -> list[HeldOut]:
    """Build what a recipe's held-out data are measured with; none where it names no such data.

    How they are opened and decoded is `build_held_out`'s.
    """
    if recipe.evaluation.data is None:
        return []
    return [build_held_out(recipe, ranks, **how)]


def build_held_out(
    recipe: Recipe,
    ranks: Ranks = ALONE,
    *,
    open_samples: Callable[[Path], TextSamples] = open_shards,
    decode: Decode | None = None,
) -> HeldOut:
    """Build the evaluation of a recipe's held-out data: zero-shot and retrieval.

    Args:
        recipe: towers, and where the data lies.
        ranks: the processes that share the work.
        open_samples: opens the data; shards unless given.
        decode: makes the image tower's input; unset decodes images.

    Raises:
        UsageError: the recipe names no held-out data, or the folder holds none.
    """
    evaluation = recipe.evaluation
    if evaluation.data is None:
        raise UsageError("evaluation.data is not set; there is nothing to evaluate on")
    folder = Path(evaluation.data)
    samples = open_samples(folder)
    loader = build_eval_loader(recipe, samples, ranks, decode=decode)
    table = (open_samples(Path(evaluation.names)) if evaluation.names else samples).table()
    names = [text for text in table.texts if text.strip()]
    if evaluation.names:
        own = {text for text in samples.table().texts if text.strip()}
        if unknown := sorted(own.difference(names)):
            raise UsageError(
                f"{folder} has {len(unknown)} texts that are no class name of evaluation.names "
                f"{evaluation.names}, such as {unknown[0]!r}; name the folder that has them all"
            )
    zero_shot = ZeroShot(
        loader,
        names,
        TEMPLATES[evaluation.templates],
        build_tokenizer(recipe),
        labels=[table.label(name, "") for name in names],
        short_text_words=recipe.data.short_text_words,
        batch_size=evaluation.batch_size,
    )
    retrieval = Retrieval(loader, build_tokenizer(recipe), batch_size=evaluation.batch_size)
    return HeldOut(loader, zero_shot, retrieval)


def _as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe that takes from its own run what it would take from weights that are gone."""
    is_gone = recipe.weights is not None and not Path(recipe.weights).exists()
    if not is_gone or not checkpoints(folder / "checkpoints"):
        return recipe
    run = read_recipe(folder)
    if run.task != recipe.task:
        return recipe
    section = getattr(recipe, recipe.task)
    own = like(section, getattr(run, run.task), [item.name for item in fields(section)])
    return with_towers_of(replace(recipe, **{recipe.task: own}), run)


def _check_free(folder: Path, recipe: Recipe) -> None:
    """Check that the folder is this recipe's run, or can become it."""
    if checkpoints(folder / "checkpoints"):
        differing = _differences(read_recipe(folder), recipe, _free_on_resume(recipe))
        if differing:
            raise UsageError(
                f"{folder} holds a run with another {', '.join(differing[:3])}; "
                f"choose another --out, or remove that folder"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.toml").exists():
        raise UsageError(f"{folder} is not empty and not a run; choose another --out")
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another --out")


def _check_data(folder: Path, recipe: Recipe, trainer: Trainer) -> str:
    """Check that a run goes on with the samples that it began with, and return their digest.

    Its place in the data is a number, which would mean another sample.
    """
    digest: str = cast(Any, trainer.loader).samples.digest()
    path = folder / _DIGEST_FILE
    if checkpoints(folder / "checkpoints") and path.exists() and path.read_text() != digest:
        raise UsageError(
            f"{recipe.data.train} has other samples than {folder} was trained on; bring those "
            "back, or choose another --out"
        )
    return digest


def _claim(folder: Path, recipe: Recipe, digest: str) -> None:
    """Write the recipe into the folder; what is free to change may have changed."""
    path = folder / "recipe.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with atomic_file(path) as file:
        file.write(recipe_to_toml(recipe).encode())
    with atomic_file(folder / _DIGEST_FILE) as file:
        file.write(digest.encode())


def _free_on_resume(recipe: Recipe) -> set[str]:
    if recipe.task == PRETRAINING:
        return _FREE_ON_RESUME
    own = find_plugin(recipe.task).free_on_resume
    return _FREE_ON_RESUME | {f"{recipe.task}.{key}" for key in own}


def _differences(old: object, new: object, free: set[str], prefix: str = "") -> list[str]:
    keys = []
    for item in fields(old):  # type: ignore[arg-type]
        before, after, key = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if is_dataclass(before):
            keys += _differences(before, after, free, f"{key}.")
        elif before != after and key not in free:
            keys.append(key)
    return keys
