"""Where the images lie that a file of annotations names."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from unicl.data.image_sets import MissingSetError

_LOOKS = 100


def locate_images(path: Path, names: list[str]) -> tuple[Path, list[str]]:
    """Return the folder that most images lie in, and their paths in it.

    Objects365 names images by more folders than people unpack; what is cut off must not make two
    names one.

    Args:
        path: The file of the annotations.
        names: What it calls the images.

    Raises:
        MissingSetError: None is there.
    """
    for chosen in _shortened(names):
        count, folder = fullest(_places(path), chosen)
        if count:
            return folder, chosen
    raise MissingSetError(
        f"none of the images of {path} is there, such as {names[0]}; put them into {path.parent} "
        f"or {path.parent / 'images'}"
    )


def fullest(places: Sequence[Path], names: Sequence[str]) -> tuple[int, Path]:
    """Return how many of a hundred of the names the fullest folder has, and the folder."""
    looks = names[:: -(-len(names) // _LOOKS)] if names else []
    best = (0, places[0])
    for place in places:
        count = sum(os.path.isfile(place / name) for name in looks)
        best = max(best, (count, place), key=lambda each: each[0])
        if count == len(looks):
            break
    return best


def _shortened(names: list[str]) -> Iterator[list[str]]:
    yield names
    for depth in (2, 1):
        found = ["/".join(name.split("/")[-depth:]) for name in names]
        if found != names and len(set(found)) == len(found):
            yield found


def _places(path: Path) -> list[Path]:
    stem, above = path.stem, path.parent.parent
    words = [stem, "images", *re.split(r"[_.\-]", stem), path.parent.name]
    places = [path.parent, *(path.parent / word for word in words), above]
    places += [above / word for word in words]
    places += [above / "images" / word for word in words]
    # LVIS's images are COCO's.
    places += [above / "coco", above.parent / "coco"]
    return list(dict.fromkeys(places))
