"""The only place where configuration becomes objects."""

import functools
import logging
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from unicl.config import Recipe, recipe_to_toml
from unicl.data.atomic import atomic_file, write_error
from unicl.data.augment import TrainTransform
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import TEMPLATES, PromptSampler
from unicl.data.shards import ShardSet
from unicl.distributed import ALONE, Ranks, joined
from unicl.engine.backend import Backend
from unicl.engine.checkpoint import (
    checkpoints,
)
from unicl.engine.schedule import learning_rate
from unicl.engine.task import Task
from unicl.engine.torch_backend import TorchBackend
from unicl.engine.trainer import Run, Trainer
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
    read_recipe,
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
    deepspeed = recipe.engine.backend == "deepspeed"
    with joined(
        choose_device(recipe.trainer.device),
        timeout_seconds=recipe.engine.timeout_seconds,
        alone=not deepspeed,
    ) as ranks:
        ranks.together(lambda: _check_free(folder, recipe))
        # Built before anything is written: a mistake in the recipe must not occupy the folder.
        trainer = ranks.together(lambda: build_trainer(recipe, folder, ranks))
        ranks.together(lambda: _claim(folder, recipe) if ranks.first else None)
        return trainer.fit()


def build_trainer(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> Trainer:
    """Build the trainer of a run on one of its ranks; exchanges nothing yet."""
    if not recipe.data.train:
        raise UsageError(
            "data.train is not set; `unicl prepare SOURCE --out DIR` makes such a folder"
        )
    if recipe.trainer.batch_size == 1:
        raise UsageError("trainer.batch_size must be at least 2: the loss of one pair is always 0")
    device = choose_device(recipe.trainer.device)
    torch.manual_seed(recipe.trainer.seed)
    # A run that goes on has its weights in a checkpoint; the file to start from may be gone.
    model = build_model(recipe, start=not checkpoints(folder / "checkpoints")).to(device)
    check_image_size(model.image, recipe.image_tower.image_size)
    flops = StepFlops(
        model,
        image_size=recipe.image_tower.image_size,
        context_length=recipe.text_tower.context_length,
    )
    task = Pretraining(model, targets=recipe.loss.targets, tile=recipe.loss.tile, ranks=ranks)
    if recipe.trainer.compile:
        for tower in (model.image, model.text):
            tower.compile()  # in place: the weights keep their names
    return Trainer(
        task,
        build_train_loader(recipe, ranks),
        folder,
        backend=lambda: build_backend(recipe, task, ranks),
        config=recipe.trainer,
        learning_rate=functools.partial(
            learning_rate,
            peak=recipe.optimizer.learning_rate,
            final=recipe.schedule.final_learning_rate,
            warmup_steps=recipe.schedule.warmup_steps,
            total_steps=recipe.trainer.steps,
        ),
        evaluators=build_evaluators(recipe, ranks),
        flops=flops,
        ranks=ranks,
    )


def build_backend(recipe: Recipe, task: Task, ranks: Ranks = ALONE) -> Backend:
    """Build what carries out a task's steps, around a model that has its weights."""
    if recipe.engine.backend == "torch":
        return TorchBackend(task, recipe.optimizer, ranks)
    from unicl.engine.deepspeed_backend import DeepSpeedBackend  # takes seconds to import

    return DeepSpeedBackend(task, recipe.optimizer, ranks, recipe.engine)


def build_train_loader(recipe: Recipe, ranks: Ranks = ALONE) -> Loader:
    """Build the endless, reproducible stream of training batches."""
    data, seed, batch_size = recipe.data, recipe.trainer.seed, recipe.trainer.batch_size
    shards = _open_shards(Path(data.train))
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
        transform=TrainTransform(
            recipe.image_tower.image_size,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip=data.flip,
        ),
        prompts=PromptSampler(data.templates, short_text_words=data.short_text_words, seed=seed),
        batch_size=batch_size,
        seed=seed,
        ranks=ranks,
    )


def build_eval_loader(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> Loader:
    """Build one ordered, unaugmented pass over a folder of shards."""
    shards = _open_shards(folder)
    return _build_loader(
        recipe,
        shards,
        SampleOrder(shards.shard_sizes, seed=0, window=1, shuffle=False),
        transform=build_transform(recipe),
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=recipe.evaluation.batch_size,
        seed=0,
        ranks=ranks,
    )


def _build_loader(recipe: Recipe, shards: ShardSet, order: SampleOrder, **own: Any) -> Loader:
    return Loader(
        shards,
        order,
        tokenize=build_tokenizer(recipe),
        num_workers=recipe.data.num_workers,
        max_image_pixels=recipe.data.max_image_pixels,
        max_skipped_share=recipe.data.max_skipped_share,
        **own,
    )


def _open_shards(folder: Path) -> ShardSet:
    """Open a folder of shards, and say at once what of it will be skipped later."""
    shards = ShardSet.open(folder)
    shards.table()  # a damaged one is told at once, and the loader's workers share it
    problems = shards.problems(indices=False)
    for problem in problems[:_PROBLEMS_SHOWN]:
        logger.warning("%s; the samples it lacks are skipped", problem)
    if len(problems) > _PROBLEMS_SHOWN:
        logger.warning("%d more tars of %s are damaged", len(problems) - _PROBLEMS_SHOWN, folder)
    return shards


def build_evaluators(recipe: Recipe, ranks: Ranks = ALONE) -> list[HeldOut]:
    """Build what a recipe's held-out shards are measured with; none where it names no such data."""
    if recipe.evaluation.data is None:
        return []
    return [build_held_out(recipe, ranks)]


def build_held_out(recipe: Recipe, ranks: Ranks = ALONE) -> HeldOut:
    """Build the evaluation of a recipe's held-out shards: zero-shot and retrieval.

    Raises:
        UsageError: the recipe names no held-out data, or the folder holds none.
    """
    evaluation = recipe.evaluation
    if evaluation.data is None:
        raise UsageError("evaluation.data is not set; there is nothing to evaluate on")
    folder = Path(evaluation.data)
    loader = build_eval_loader(recipe, folder, ranks)
    table = ShardSet.open(Path(evaluation.names) if evaluation.names else folder).table()
    names = [text for text in table.texts if text.strip()]
    if evaluation.names:
        own = {text for text in ShardSet.open(folder).table().texts if text.strip()}
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


def _check_free(folder: Path, recipe: Recipe) -> None:
    """Check that the folder is this recipe's run, or can become it."""
    if checkpoints(folder / "checkpoints"):
        differing = _differences(read_recipe(folder), recipe)
        if differing:
            raise UsageError(
                f"{folder} holds a run with another {', '.join(differing[:3])}; "
                f"choose another --out, or remove that folder"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.toml").exists():
        raise UsageError(f"{folder} is not empty and not a run; choose another --out")
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another --out")


def _claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into the folder; what is free to change may have changed."""
    path = folder / "recipe.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with atomic_file(path) as file:
        file.write(recipe_to_toml(recipe).encode())


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(old):  # type: ignore[arg-type]
        before, after, key = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if is_dataclass(before):
            keys += _differences(before, after, f"{key}.")
        elif before != after and key not in _FREE_ON_RESUME:
            keys.append(key)
    return keys
