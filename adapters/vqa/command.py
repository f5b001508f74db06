"""`unicl answer` and `unicl caption`: about images, as a table, lines or JSON.

Imports no torch until a command runs.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unicl.cli.ranks import refuse_ranks
from unicl.cli.using import add_device, model_name, positive_count
from unicl.errors import UniclError

logger = logging.getLogger("unicl")

_MODEL = "a run on {}, or one of its checkpoints"


def add_answer(commands: Any) -> None:
    """Add `unicl answer` to the command line."""
    command = commands.add_parser(
        "answer",
        help="answer questions about an image",
        description="Print the best answers to each question, and how sure the model is of each.",
        allow_abbrev=False,
    )
    _add_model(command, "questions")
    command.add_argument("image", metavar="IMAGE", help="an image's file or URL")
    command.add_argument("questions", metavar="QUESTION", nargs="+", help="what is asked")
    command.add_argument(
        "--top-k",
        type=positive_count,
        default=3,
        metavar="K",
        help="answers per question (default: 3)",
    )
    _add_how(command)
    command.set_defaults(run=_answer, takes_overrides=False)


def add_caption(commands: Any) -> None:
    """Add `unicl caption` to the command line."""
    command = commands.add_parser(
        "caption",
        help="say what is in images",
        description="Print a caption per image. How it is searched for can be chosen as in the "
        "recipe (--vqa.num_beams 5, --vqa.top_p 0.9).",
        allow_abbrev=False,
    )
    _add_model(command, "captions")
    command.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image's file or URL, or a folder of images"
    )
    _add_how(command)
    command.set_defaults(run=_caption, takes_overrides=True)


def _add_model(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("model", metavar="RUN", type=model_name, help=_MODEL.format(what))


def _add_how(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print lines of JSON")
    add_device(command)


def _answer(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    refuse_ranks("answer")
    predictor = _load(arguments, "answers", overrides)
    found = [
        (question, predictor.answer(arguments.image, question, top_k=arguments.top_k))
        for question in arguments.questions
    ]
    if not arguments.json:
        _show(found)
        return
    for question, answers in found:
        scored = [{"answer": answer, "score": round(score, 6)} for answer, score in answers]
        line = {"file": arguments.image, "question": question, "answers": scored}
        sys.stdout.write(json.dumps(line) + "\n")


def _caption(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    refuse_ranks("caption")
    inputs = list(_listed(arguments.images))
    predictor = _load(arguments, "captions", overrides)
    unread = 0
    for place in inputs:
        try:
            caption = predictor.caption(place)
        except UniclError as error:  # the others are none the worse for it
            unread += 1
            logger.warning("left out: %s", error)
            continue
        line = json.dumps({"file": place, "caption": caption})
        sys.stdout.write((line if arguments.json else f"{place}: {caption}") + "\n")
        sys.stdout.flush()
    if unread:
        raise UniclError(f"{unread:,} of {len(inputs):,} images could not be read, as told above")


def _listed(places: Sequence[str]) -> Iterator[str]:
    """Go through the files and URLs, and the images below the folders."""
    from unicl.data.image_sets.class_folder import images_below

    for place in places:
        folder = Path(place)
        if folder.is_dir():
            yield from (str(folder / below) for below in images_below(folder))
        else:
            yield place


def _load(arguments: argparse.Namespace, objective: str, overrides: Mapping[str, str]) -> Any:
    from adapters.vqa.pretrained import overridden, reader_of, with_reader
    from unicl.models import load
    from unicl.predictor import Predictor

    loaded = load(arguments.model, device=arguments.device)
    reader = reader_of(loaded, objective)
    reader = replace(reader, config=overridden(reader.config, overrides))
    return Predictor(with_reader(loaded, reader), precision=arguments.precision)


def _show(found: list[tuple[str, list[tuple[str, float]]]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("question", overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("score", justify="right")
    for question, answers in found:
        for number, (answer, score) in enumerate(answers):
            table.add_row(escape(question) if not number else "", escape(answer), f"{score:.2f}")
    Console().print(table)
