"""Texts that do not match an image, chosen by what the two towers think of them.

The towers embed all images and texts once, before the first step; the embeddings lie in the run's
folder and are read from there, so that they need neither memory nor the towers later on.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16
from torch import Tensor

from unicl.data.atomic import atomic_file, write_error
from unicl.data.hash_table import normalise
from unicl.data.order import mix
from unicl.data.prompts import PromptSampler
from unicl.data.reader import SampleSet
from unicl.distributed import Ranks
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import Setting, image_blocks, texts_embeddings
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

FOLDER = "negatives"
"""In a run's folder: the embeddings that negatives are chosen by."""

_CHOICE = int.from_bytes(b"negative")
_TEXTS_AT_ONCE = 65_536
_DONE = "done.json"
_ARRAYS = ("images", "texts")
# A pool all of whose texts are the image's own is drawn again; so often at most.
_ATTEMPTS = 100


@runtime_checkable
class Negatives(Protocol):
    """Chooses texts that do not match."""

    def choose(self, samples: Sequence[int], texts: Sequence[str], consumed: int) -> list[str]:
        """Return one text per sample, that is not its own."""


@dataclass(frozen=True)
class Embeddings:
    """What the towers make of all samples' images and of all texts."""

    images: Float16[np.ndarray, "samples dim"]
    texts: Float16[np.ndarray, "texts dim"]
    scale: float
    """Factor that turns similarities into logits."""


class DrawnNegatives:
    """Draws texts at random, and of these takes one that the towers find similar to the image.

    A function of the seed, the sample and the batch's place in the stream.

    Args:
        texts: All different texts of the data.
        own: Texts that match a sample's image besides the sample's own, such as its other captions.
        prompts: Puts texts into templates, as those that match are.
        pool: How many are drawn at a time.
        seed: Decides which.
        embed: Makes or opens the embeddings in the run's folder; None takes any text drawn.

    Raises:
        UsageError: There are no two different texts.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        own: Callable[[int], Sequence[str]],
        prompts: PromptSampler,
        pool: int,
        seed: int,
        embed: Callable[[Path], Embeddings] | None = None,
    ) -> None:
        if len(texts) < 2:
            raise UsageError(
                f"matching needs texts that differ, and the data have {len(texts)}; train on more"
            )
        self._texts = texts
        self._own = own
        self._prompts = prompts
        self._pool = pool
        self._seed = seed
        self._embed = embed
        self._embeddings: Embeddings | None = None

    def prepare(self, folder: Path) -> None:
        """Make the embeddings, or open those that are there; ranks share the work."""
        if self._embed is not None:
            self._embeddings = self._embed(folder / FOLDER)

    def choose(self, samples: Sequence[int], texts: Sequence[str], consumed: int) -> list[str]:
        """Return one text per sample, that is not its own.

        Args:
            samples: Numbers of the samples.
            texts: Their own texts.
            consumed: The batch's place in the stream.

        Raises:
            UsageError: All texts drawn are the sample's own, again and again.
        """
        return [
            self._chosen(sample, text, mix(self._seed, _CHOICE, sample, consumed))
            for sample, text in zip(samples, texts, strict=True)
        ]

    def _chosen(self, sample: int, text: str, seed: int) -> str:
        rng = np.random.default_rng(seed)
        own = {normalise(each) for each in (text, *self._own(sample))}
        for _ in range(_ATTEMPTS):
            drawn = rng.integers(len(self._texts), size=self._pool)
            other = np.array([row for row in drawn.tolist() if self._texts[row] not in own])
            if len(other):
                chosen = self._texts[self._similar(sample, other, rng)]
                return self._prompts(chosen, mix(seed, 1))
        raise UsageError(f"matching found no text that is not {text!r}; train on more texts")

    def _similar(self, sample: int, drawn: np.ndarray, rng: np.random.Generator) -> int:
        if self._embeddings is None:
            return int(drawn[0])
        image = self._embeddings.images[sample].astype(np.float32)
        logits = self._embeddings.scale * (self._embeddings.texts[drawn].astype(np.float32) @ image)
        weights = np.exp(logits - logits.max())
        return int(rng.choice(drawn, p=weights / weights.sum()))


def embed_all(
    folder: Path,
    samples: SampleSet,
    texts: Sequence[str],
    *,
    load: Callable[[], Pretrained],
    setting: Setting,
    digest: str,
) -> Embeddings:
    """Embed all images and texts into a folder, or open what lies there whole.

    Args:
        folder: Where to.
        samples: The images.
        texts: The texts.
        load: Loads the towers; not called if all is there.
        setting: How they are embedded; its ranks share the work.
        digest: Of the data.

    Raises:
        UniclError: The towers cannot be loaded, or the folder not written.
    """
    ranks = setting.ranks
    (done,) = ranks.gather_numbers(_is_done(folder, digest))[0]
    if not done:
        model = ranks.together(load)
        logger.info("embedding what negatives are chosen by, with %s", model.name)
        ranks.on_first(lambda: _make(folder))
        images = image_blocks(model, samples, setting)
        _write(folder / "images.npy", samples.num_samples, _image_rows(images), ranks)
        _write(folder / "texts.npy", len(texts), _text_rows(model, texts, setting), ranks)
        about = {"digest": digest, "scale": model.model.scale().item(), "model": model.name}
        ranks.on_first(lambda: _finish(folder, about))
    return ranks.together(lambda: _open(folder))


def _is_done(folder: Path, digest: str) -> bool:
    try:
        _open(folder)  # what was damaged is made anew
        return bool(json.loads((folder / _DONE).read_text())["digest"] == digest)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return False


def _open(folder: Path) -> Embeddings:
    images, texts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return Embeddings(images, texts, json.loads((folder / _DONE).read_text())["scale"])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _DONE).unlink(missing_ok=True)  # of other data, whose arrays are written over
    except OSError as error:
        raise write_error(folder, error) from error


def _finish(folder: Path, about: dict[str, Any]) -> None:
    with atomic_file(folder / _DONE) as file:
        file.write(json.dumps(about, indent=1).encode())


def _image_rows(blocks: Any) -> Any:
    for block in blocks:
        if len(block.rows):
            yield block.rows.numpy(), block.embeddings


def _text_rows(model: Pretrained, texts: Sequence[str], setting: Setting) -> Any:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[start : start + _TEXTS_AT_ONCE]
        yield slice(start, start + len(part)), texts_embeddings(model, part, setting)


def _write(path: Path, num_rows: int, blocks: Any, ranks: Ranks) -> None:
    """Write blocks of rows into one array; all ranks make them, the first one writes."""
    array: np.memmap | None = None

    def put(rows: Any, block: Tensor) -> None:
        nonlocal array
        try:
            if array is None:
                shape = (num_rows, block.shape[1])
                array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            array[rows] = block.numpy()
            array.flush()
        except OSError as error:
            raise write_error(path, error) from error

    for rows, block in blocks:
        ranks.on_first(partial(put, rows, block))
    ranks.on_first(partial(_require, array))


def _require(array: Any) -> None:
    if array is None:
        raise UniclError("no image of the training data can be read to choose negatives by")
