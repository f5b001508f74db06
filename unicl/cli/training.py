"""The commands that make a model: demo, prepare, train, verify-gradients, plan."""

import argparse
import logging
from pathlib import Path
from typing import Any

from unicl.cli.ranks import refuse_ranks
from unicl.config import find_holder, load_recipe, recipe_names

logger = logging.getLogger("unicl")

_A100_TFLOPS = 312.0


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    demo = commands.add_parser(
        "demo",
        help="the whole job on the embedded corpus, ending in a report to look at",
        description="Prepare the Twemoji corpus, train, evaluate, write report.html. "
        "Any key of the recipe can be set: --trainer.steps 200.",
        allow_abbrev=False,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    demo.add_argument(
        "--compare-clip",
        action="store_true",
        help="train once more with plain CLIP targets, and show both in the report",
    )
    demo.add_argument(
        "--adapt",
        action="store_true",
        help="adapt the towers to detection, questions and video, too, each beside random towers",
    )
    demo.set_defaults(run=_demo, takes_overrides=True)

    prepare = commands.add_parser(
        "prepare",
        help="turn a folder, a CSV or the embedded corpus into shards",
        description="Write WebDataset shards, an index per shard and the text hash table.",
        allow_abbrev=False,
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with one folder of images per class, a .csv or .tsv with image paths "
        "and captions, a folder of WebDataset tars, a set of videos, or twemoji",
    )
    prepare.add_argument("--out", type=Path, help="folder to write; tars are indexed in place")
    prepare.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N")
    for column in ("image", "text"):
        prepare.add_argument(
            f"--{column}-column",
            metavar="NAME",
            help=f"column of a .csv or .tsv with the {column}s",
        )
    prepare.set_defaults(run=_prepare, takes_overrides=False)

    train = commands.add_parser(
        "train",
        help="train a recipe, or go on with a run",
        description="Train a recipe; a folder that holds the same recipe's run is continued. "
        f"Shipped recipes: {', '.join(recipe_names())}. "
        "Any key can be set on the command line: --trainer.steps 200.",
        allow_abbrev=False,
    )
    _add_recipe(train)
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    train.set_defaults(run=_train, takes_overrides=True)

    verify = commands.add_parser(
        "verify-gradients",
        help="compare the gradient of every mode with the full-batch truth, here and now",
        description="Compare ranks, ZeRO stages, chunks, precisions and tiles, on one batch, with "
        "the single-process gradient; exit code 1 if one is wrong. Start it as you start train.",
        allow_abbrev=False,
    )
    _add_recipe(verify)
    verify.add_argument("--slim", action="store_true", help="small towers instead of the recipe's")
    verify.add_argument("--samples-per-rank", type=int, default=8, metavar="N")
    verify.add_argument(
        "--engines", default="", metavar="NAMES", help="such as torch,zero2/chunk (default: all)"
    )
    verify.set_defaults(run=_verify_gradients, takes_overrides=True)
    _add_plan(commands)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a recipe will need in memory and time, and the settings that fit",
        description="Foretell memory per GPU, operations and days; needs neither GPU nor data. "
        f"Shipped recipes: {', '.join(recipe_names())}. "
        "Any key can be set on the command line: --trainer.batch_size 4096.",
        allow_abbrev=False,
    )
    _add_recipe(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    plan.add_argument(
        "--gpu-memory", type=float, required=True, metavar="G", help="GiB of memory of each GPU"
    )
    plan.add_argument(
        "--peak-tflops",
        type=float,
        metavar="T",
        help="what a GPU does at best, in 1e12 operations per second (default: 312, A100 in bf16)",
    )
    plan.add_argument(
        "--text-length",
        type=int,
        metavar="L",
        help="tokens of a batch's longest text (default: the whole context)",
    )
    plan.set_defaults(run=_plan, takes_overrides=True)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a .toml file")


def _demo(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("demo")
    from unicl.demo import run_demo

    run_demo(
        arguments.out,
        overrides=overrides,
        compare_clip=arguments.compare_clip,
        adapt=arguments.adapt,
    )


def _prepare(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("prepare")
    from unicl.data.prepare import prepare
    from unicl.data.progress import progress_bar

    source = arguments.source
    # Tars are indexed in place, whatever they hold.
    medium = None if any(Path(source).glob("*.tar")) else find_holder(source)
    if medium is not None:
        source = medium.open_source(source)
    with progress_bar(arguments.source) as progress:
        prepared = prepare(
            source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            image_column=arguments.image_column,
            text_column=arguments.text_column,
            progress=progress,
        )
    logger.info("%s", prepared)


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    recipe = load_recipe(arguments.recipe, overrides)
    from unicl.build import train
    from unicl.distributed import first_speaks

    with first_speaks():
        run = train(recipe, arguments.out)
        logger.info("finished at step %d: %s", run.step, run.path)


def _verify_gradients(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    recipe = load_recipe(arguments.recipe, overrides)
    from unicl.verification import verify_gradients

    verify_gradients(
        recipe,
        samples_per_rank=arguments.samples_per_rank,
        slim=arguments.slim,
        engines=[name for name in arguments.engines.split(",") if name],
    )


def _plan(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    recipe = load_recipe(arguments.recipe, overrides)
    from unicl.plan import plan
    from unicl.plan.report import show

    foretold = plan(
        recipe,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        peak_tflops=_A100_TFLOPS if arguments.peak_tflops is None else arguments.peak_tflops,
        text_length=arguments.text_length,
    )
    show(foretold, device="A100 GPUs in bf16" if arguments.peak_tflops is None else "GPUs")
