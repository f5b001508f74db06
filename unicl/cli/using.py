"""The commands that use a model: eval, embed, index, search, export, report."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from unicl.cli.ranks import refuse_ranks
from unicl.config import Medium, evaluation_names, split_evaluation
from unicl.data.atomic import require_parent
from unicl.errors import UsageError, no_model
from unicl.export import FORMATS
from unicl.search import KINDS

logger = logging.getLogger("unicl")

_MODEL = (
    "a run's folder or checkpoint, a folder that export or open_clip wrote, "
    "open_clip:NAME[/WEIGHTS], or a .pth"
)
_SET = "a known set's name, a folder of class folders, of prepared shards or of WebDataset tars"
# Torch is imported where these are decided; a test holds them equal.
_TASKS = ("zero-shot", "linear-probe", "few-shot", "retrieval", "fine-tune")
_PRECISIONS = ("fp32", "bf16", "fp16")
_OPTIONS_OF_TASKS = {
    "templates": ("zero-shot", "fine-tune"),
    "probe": ("linear-probe",),
    "shots": ("few-shot",),
    "episodes": ("few-shot",),
}


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    _add_eval(commands)
    _add_embed(commands)
    _add_index(commands)
    _add_search(commands)
    _add_export(commands)
    _add_report(commands)


def _add_eval(commands: Any) -> None:
    command = commands.add_parser(
        "eval",
        help="evaluate a model: zero-shot, linear probe, few-shot, retrieval",
        description="Evaluate by the paper's protocols, beside its figures. Results are JSON in "
        "CLIP_benchmark's schema. Start it as you start train to share the work among ranks. "
        "fine-tune trains on the set's train part first: any key of its recipe can be set "
        "(--trainer.steps 200), and --out gets data, run and result.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=model_name, help=_MODEL)
    tasks = (*_TASKS, *evaluation_names())
    command.add_argument("task", metavar="TASK", choices=tasks, help=", ".join(tasks))
    command.add_argument(
        "data",
        metavar="DATA",
        type=_set,
        nargs="+",
        help=f"{_SET}, or all: the paper's sets that are there",
    )
    _add_sets(command)
    _add_arithmetic(command)
    command.add_argument(
        "--out", type=Path, help="folder of the results (default: evaluation in the run's folder)"
    )
    command.add_argument("--templates", metavar="NAME", help="another prompt ensemble: none, ...")
    command.add_argument(
        "--probe", type=Path, metavar="FILE", help="linear-probe: test a saved one, fit none"
    )
    command.add_argument(
        "--shots",
        type=lambda text: tuple(positive_count(word) for word in text.split(",")),
        metavar="N,N",
        help="few-shot: images per class (default: 5,20,50)",
    )
    command.add_argument(
        "--episodes", type=positive_count, metavar="N", help="few-shot: how many (default: 600)"
    )
    command.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the results as a table, too"
    )
    command.set_defaults(run=_eval, takes_overrides=True)


def _add_embed(commands: Any) -> None:
    command = commands.add_parser(
        "embed",
        help="embed the images of a set or a folder: what index reads",
        description="Write embeddings.npy, a row per image, and items.jsonl, a line per row.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=model_name, help=_MODEL)
    command.add_argument("data", metavar="DATA", type=_set, help=f"{_SET}, or any folder of images")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    _add_sets(command)
    _add_arithmetic(command)
    command.set_defaults(run=_embed, takes_overrides=True)


def _add_index(commands: Any) -> None:
    command = commands.add_parser(
        "index",
        help="make embeddings searchable, or add some to an index",
        description="Build a FAISS index of what embed wrote; an approximate one looks through as "
        "few lists as the wanted recall allows, and says what it reaches.",
        allow_abbrev=False,
    )
    command.add_argument(
        "embeddings", metavar="EMBEDDINGS", nargs="+", type=Path, help="folders that embed wrote"
    )
    command.add_argument("--out", type=Path, required=True, help="the index's folder")
    command.add_argument(
        "--add", action="store_true", help="add to the index that is there; items it has stay"
    )
    # Without defaults, so that --add can refuse what was given.
    command.add_argument(
        "--kind", choices=KINDS, metavar="KIND", help=f"{', '.join(KINDS)} (default: auto)"
    )
    command.add_argument(
        "--recall", type=float, metavar="R", help="wanted recall at 10 (default 0.95)"
    )
    command.set_defaults(run=_index, takes_overrides=False)


def _add_search(commands: Any) -> None:
    command = commands.add_parser(
        "search",
        help="find images by text or by image",
        description="Print the nearest images of each query as a table or JSON, or write a page.",
        allow_abbrev=False,
    )
    command.add_argument("index", metavar="INDEX", type=Path, help="a folder that index wrote")
    command.add_argument("queries", metavar="QUERY", nargs="*", help="texts to look for")
    command.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image or video to look for"
    )
    command.add_argument(
        "--k", type=positive_count, default=10, help="images per query (default 10)"
    )
    command.add_argument(
        "--model",
        metavar="MODEL",
        type=model_name,
        help="the model that embedded, where it has moved",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page of pictures, too")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.set_defaults(run=_search, takes_overrides=False)


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="take a model to open_clip, ONNX or safetensors",
        description="Write a folder with the model, what loading it takes, and a model card; what "
        "comes out there is compared with the original.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=model_name, help=_MODEL)
    command.add_argument(
        "--format", required=True, metavar="F", choices=FORMATS, help=", ".join(FORMATS)
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--license", default="other", help="of the weights, such as apache-2.0")
    command.add_argument("--push", metavar="ORG/NAME", help="upload to this repository of the hub")
    command.add_argument("--private", action="store_true", help="a new repository is private")
    command.set_defaults(run=_export, takes_overrides=False)


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write a page of one run, or comparing several, beside the papers' figures",
        description="Write one HTML page that needs no other file: figures of eval, curves, "
        "confusion, examples and settings.",
        allow_abbrev=False,
    )
    command.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's folder, a folder of eval's results, or open_clip:NAME[/WEIGHTS]",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html"
    )
    command.add_argument(
        "--csv", type=Path, metavar="FILE", help="write all results as a table, too"
    )
    command.set_defaults(run=_report, takes_overrides=False)


def _add_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--root", type=Path, default=Path("data"), help="where known sets lie (default: data)"
    )
    command.add_argument(
        "--download", action="store_true", help="fetch known sets that are not there into --root"
    )
    command.add_argument("--split", default="test", help="part of the sets (default: test)")


def add_device(command: argparse.ArgumentParser) -> None:
    """Add where a command computes, and how precisely."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--precision",
        default="fp32",
        choices=_PRECISIONS,
        metavar="P",
        help=f"{', '.join(_PRECISIONS)} (default: fp32)",
    )


def _add_arithmetic(command: argparse.ArgumentParser) -> None:
    add_device(command)
    command.add_argument("--batch-size", type=positive_count, default=256, metavar="N")
    command.add_argument("--workers", type=_whole, default=2, metavar="N", help="loading processes")
    command.add_argument(
        "--cache",
        metavar="DIR",
        help="where embeddings are remembered, or none (default: $UNICL_CACHE or ~/.cache/unicl)",
    )


def _eval(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    plugin, task = split_evaluation(arguments.task)
    for option, tasks in _OPTIONS_OF_TASKS.items():
        if getattr(arguments, option) is not None and task not in tasks:
            raise UsageError(f"--{option} is an option of {' and '.join(tasks)} only")
    if arguments.csv is not None:
        require_parent(arguments.csv)
    from unicl.evaluator import evaluate, show

    options = _options(arguments)
    if task == "fine-tune" and (plugin is None or isinstance(plugin, Medium)):
        from unicl.fine_tuning import fine_tune

        if len(arguments.data) != 1:
            raise UsageError(f"{arguments.task} takes one set, got {len(arguments.data)}")
        results = [fine_tune(arguments.model, arguments.data[0], options, overrides, plugin)]
    elif overrides and plugin is None:
        raise UsageError(f"--{next(iter(overrides))} is a key of fine-tune's recipe only")
    else:
        results = evaluate(arguments.model, arguments.task, arguments.data, options, overrides)
    if os.environ.get("RANK", "0") == "0":
        show(results, csv=arguments.csv)


def _options(arguments: argparse.Namespace) -> Any:
    from unicl.evaluator import Options, default_cache

    cache = None if arguments.cache == "none" else arguments.cache
    few_shot = {
        "shots": getattr(arguments, "shots", None),
        "num_episodes": getattr(arguments, "episodes", None),
    }
    return Options(
        root=arguments.root,
        download=arguments.download,
        split=arguments.split,
        out=arguments.out,
        cache=default_cache() if arguments.cache is None else cache and Path(cache),
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        templates=getattr(arguments, "templates", None),
        probe=getattr(arguments, "probe", None),
        **{name: value for name, value in few_shot.items() if value is not None},
    )


def _embed(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from unicl.searching import embed

    embed(arguments.model, arguments.data, _options(arguments), overrides)


def _index(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("index")
    settings = {"kind": arguments.kind, "recall": arguments.recall}
    given = {name: value for name, value in settings.items() if value is not None}
    if arguments.add and given:
        raise UsageError(
            f"--{next(iter(given))} is for a new index, --add keeps the index's own; leave it out, "
            f"or remove {arguments.out} and build it anew"
        )
    from unicl.search.collection import Collection
    from unicl.search.folder import read_description

    for folder in arguments.embeddings:
        Collection.open(folder)
    if arguments.add:
        read_description(arguments.out)
    from unicl.searching import add_to_index, build_index

    if arguments.add:
        add_to_index(arguments.out, arguments.embeddings)
    else:
        build_index(arguments.out, arguments.embeddings, **given)


def _search(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("search")
    if not arguments.queries and not arguments.image:
        raise UsageError("search needs a text or an --image to look for")
    from unicl.search.folder import read_description

    read_description(arguments.index)
    from unicl.searching import search, show, to_json, write_page

    searched = search(
        arguments.index,
        texts=arguments.queries,
        images=arguments.image,
        k=arguments.k,
        model=arguments.model,
        device=arguments.device,
    )
    if arguments.html is not None:
        write_page(arguments.html, searched)
        logger.info("open %s in a browser", arguments.html)
    if arguments.json:
        sys.stdout.write(to_json(searched) + "\n")
    else:
        show(searched)


def _export(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("export")
    from unicl.exporting import export

    export(
        arguments.model,
        arguments.out,
        to=arguments.format,
        license=arguments.license,
        push=arguments.push,
        private=arguments.private,
    )


def _report(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("report")
    from unicl.reporting import report

    report(arguments.runs, arguments.out, csv=arguments.csv)
    logger.info("open %s in a browser", arguments.out)


def positive_count(text: str) -> int:
    """Read a number of which there is at least one."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def model_name(name: str) -> str:
    """Refuse a path that leads nowhere before torch is imported."""
    if not name.startswith("open_clip:") and not Path(name).exists():
        raise argparse.ArgumentTypeError(str(no_model(name)))
    return name


def _set(name: str) -> str:
    """Refuse a path that leads nowhere before torch is imported; a word may be a set's name."""
    if os.sep in name and not Path(name).exists():
        raise argparse.ArgumentTypeError(f"there is no set {name}: no such file or folder")
    return name
