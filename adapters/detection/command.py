"""`unicl detect`: objects in images, as a table, as JSON lines, as pictures with boxes.

Imports no torch until the command runs.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from unicl.cli.ranks import refuse_ranks
from unicl.cli.using import add_device, model_name
from unicl.data.atomic import atomic_file, write_error
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

_URL = re.compile(r"(https?|file)://")
# What pictures are written as; of any other suffix, PNG is put behind it.
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


def add_detect(commands: Any) -> None:
    """Add it to the command line."""
    command = commands.add_parser(
        "detect",
        help="find objects in images with a detector",
        description="Find objects by name, or of the classes of the training. Where a detector "
        "looks at images in several ways, choose one as in its recipe (--detection.test_sizes "
        "640,800, --detection.regions pool).",
        allow_abbrev=False,
    )
    command.add_argument(
        "model", metavar="RUN", type=model_name, help="a detector's run, or one of its checkpoints"
    )
    command.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image's file or URL, or a folder of images"
    )
    command.add_argument(
        "--names",
        type=_names,
        metavar="A,B",
        help="what to look for (default: the classes of the training)",
    )
    command.add_argument(
        "--threshold",
        type=_threshold,
        default=0.3,
        metavar="T",
        help="lowest score (default: 0.3)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="write the images with boxes, under their names"
    )
    command.add_argument(
        "--json", action="store_true", help="print a line of JSON per object instead of a table"
    )
    add_device(command)
    command.set_defaults(run=_detect, takes_overrides=True)


@dataclass(frozen=True)
class _Input:
    """An image, and where its picture goes below the folder of pictures."""

    place: str
    """A path or a URL."""
    name: Path


def _detect(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    refuse_ranks("detect")
    inputs = _inputs(arguments.images)
    if arguments.out is not None:
        _require_apart(arguments.out, inputs)
    predictor = _load(arguments, overrides)
    found: list[tuple[str, Any]] = []
    unread = 0
    for each in inputs:
        try:
            image = _read(each.place)
        except UniclError as error:  # the others are none the worse for it
            unread += 1
            logger.warning("left out: %s", error)
            continue
        (objects,) = predictor.detect([image], arguments.names, threshold=arguments.threshold)
        found += [(each.place, detection) for detection in objects]
        if arguments.json:
            _print_json(each.place, objects)
        if arguments.out is not None:
            _save(arguments.out / each.name, image, objects)
    if not arguments.json:
        _show(found, len(inputs) - unread)
    if arguments.out is not None and unread < len(inputs):
        logger.info("pictures are in %s", arguments.out)
    if unread:
        raise UniclError(f"{unread:,} of {len(inputs):,} images could not be read, as told above")


def _load(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> Any:
    from adapters.detection.evaluating import detector_of
    from adapters.detection.pretrained import overridden
    from unicl.models import load
    from unicl.predictor import Predictor

    loaded = load(arguments.model, device=arguments.device)
    detect = detector_of(loaded)
    detect = replace(detect, config=overridden(detect.config, overrides))
    names_proposals = detect.config.classes == "none" and arguments.names is not None
    if "detection.regions" in overrides and not names_proposals:
        raise UsageError("detection.regions has an effect on --names of a detector of classes none")
    return Predictor(replace(loaded, skills={"detect": detect}), precision=arguments.precision)


def _inputs(places: Sequence[str]) -> list[_Input]:
    """List the images of files, URLs and folders; no two pictures have the same name."""
    listed = []
    for place in places:
        if _URL.match(place):
            last = PurePosixPath(unquote(urlsplit(place).path)).name
            listed.append(_Input(place, Path(last or "image")))
        elif Path(place).is_dir():
            from unicl.data.image_sets.class_folder import images_below

            found = images_below(Path(place))
            listed += [_Input(str(Path(place) / below), below) for below in found]
        elif Path(place).exists():
            listed.append(_Input(place, Path(Path(place).name)))
        else:
            raise UsageError(f"there is no image or folder {place}")
    taken: set[Path] = set()
    inputs = []
    for each in listed:
        name = each.name
        if name.suffix.lower() not in _FORMATS:
            name = name.with_name(f"{name.name}.png")
        free, number = name, 1
        while free in taken:
            number += 1
            free = name.with_stem(f"{name.stem}-{number}")
        taken.add(free)
        inputs.append(replace(each, name=free))
    return inputs


def _require_apart(out: Path, inputs: Sequence[_Input]) -> None:
    """Refuse a folder in which a picture would take the place of an image, and make it."""
    originals = {os.path.realpath(place) for each in inputs if (place := _path(each.place))}
    for each in inputs:
        if os.path.realpath(out / each.name) in originals:
            raise UsageError(
                f"--out {out} would overwrite the image {out / each.name}; choose another folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


def _path(place: str) -> str | None:
    """Return the file of a path or a file:// URL; None of other URLs."""
    if not _URL.match(place):
        return place
    url = urlsplit(place)
    return unquote(url.path) if url.scheme == "file" else None


def _read(place: str) -> Any:
    """Read and decode an image, upright, before anything is asked of the detector."""
    from unicl.data.augment import open_image, upright
    from unicl.predictor import naming, read_image

    with naming(place):
        return upright(open_image(read_image(place)))


def _save(path: Path, image: Any, objects: Sequence[Any]) -> None:
    import torch

    from adapters.detection.drawing import draw

    drawn = draw(
        image,
        torch.tensor([each.box for each in objects]).view(-1, 4),
        [each.name for each in objects],
        torch.tensor([each.score for each in objects]),
    )
    encoded = BytesIO()
    drawn.save(encoded, _FORMATS[path.suffix.lower()], quality=90)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    with atomic_file(path) as file:
        file.write(encoded.getvalue())


def _print_json(place: str, objects: Sequence[Any]) -> None:
    for each in objects:
        box = [round(side, 2) for side in each.box]
        fields = {"file": place, "name": each.name, "score": round(each.score, 6), "box": box}
        sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _show(found: Sequence[tuple[str, Any]], num_images: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not found:
        if num_images:
            lower = "--threshold or --detection.score_threshold"
            images = "1 image" if num_images == 1 else f"{num_images:,} images"
            logger.info("found nothing in %s; try a lower %s", images, lower)
        return
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("object", overflow="fold")
    table.add_column("score", justify="right")
    for side in ("left", "top", "right", "bottom"):
        table.add_column(side, justify="right")
    for place, each in found:
        sides = (f"{side:.0f}" for side in each.box)
        table.add_row(escape(place), escape(each.name), f"{each.score:.2f}", *sides)
    Console().print(table)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between, got {text!r}")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise argparse.ArgumentTypeError(f"has {repeated!r} twice: name each class once")
    return names


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text!r}")
    return value
