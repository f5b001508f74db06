"""Embeddings on disk: a data set is embedded once per model, whatever is asked of it later.

An entry is a folder of blocks, each a safetensors file of consecutive samples; an interrupted
embedding goes on after its last complete block. The folder's name is a digest of the model's
identity and weights, of the data, and of the arithmetic.
"""

import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unicl.data.atomic import atomic_file, write_error
from unicl.data.image_sets import ImageSet
from unicl.data.image_sets.samples import Numbered
from unicl.data.loader import Batch, Loader
from unicl.data.order import SampleOrder
from unicl.data.progress import Progress, progress_bar
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Decode, ImageDecoder, SampleSet, samples_at_once
from unicl.distributed import ALONE, Ranks
from unicl.errors import UniclError
from unicl.evaluation.embeddings import Embedded, embed_images, embed_texts
from unicl.evaluation.zero_shot import class_embeddings
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

# Samples that are embedded between two writes.
_BLOCK = 8192
_FORMAT = 2
_MAX_IMAGE_PIXELS = 1 << 30  # public sets hold scans that are larger than Pillow's own limit
# What a disk or a right of access kept from being read may be there the next time, so a block that
# lacks such files is not remembered; what is wrong with a file itself stays so.
_PASSING = {
    *("missing file", "unreadable file", "missing index", "damaged index"),
    *("unreadable tar", "truncated tar", "changed tar"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How images and texts are embedded; no figure depends on it, but for rounding."""

    batch_size: int = 256
    """Images (of clips: frames) or texts per forward pass and rank."""
    num_workers: int = 2
    """Processes that read and decode."""
    autocast: torch.dtype | None = None
    """Type of the towers' arithmetic; None computes in the parameters' own."""
    ranks: Ranks = ALONE
    """The processes that share the work."""
    cache: Path | None = None
    """Folder of what was embedded before; None remembers nothing."""


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddings:
    """The images of a set that could be read, in their order."""

    embeddings: Float[Tensor, "num_images dim"]
    """Unit-length fp32 embeddings."""
    features: Float[Tensor, "num_images width"]
    """What they are projected from."""
    rows: Int[Tensor, " num_images"]
    """Number of each image in its set."""
    skipped: dict[str, int]
    """Images that could not be read, by reason."""


def image_embeddings(model: Pretrained, images: ImageSet, setting: Setting) -> ImageEmbeddings:
    """Embed a set of images, or take what was embedded before.

    Ranks share the images, and all get all of the result.

    Raises:
        UniclError: no image can be read, an embedding is not finite, or the cache cannot be
            written.
    """
    end, whole, skipped = 0, dict[str, Tensor](), Counter[str]()
    for block in image_blocks(model, images, setting):
        skipped.update(block.skipped)
        if not len(block.rows):
            continue
        start, end = end, end + len(block.rows)
        for name in ("embeddings", "features", "rows"):
            part: Tensor = getattr(block, name)
            # Blocks kept until they are joined would need twice the memory.
            if name not in whole:
                whole[name] = part.new_empty(images.num_samples, *part.shape[1:])
            whole[name][start:end] = part
    if not end:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise UniclError(f"{images} has no sample that can be read ({reasons})")
    return ImageEmbeddings(
        **{name: tensor[:end] for name, tensor in whole.items()}, skipped=dict(skipped)
    )


def image_blocks(
    model: Pretrained, images: ImageSet | SampleSet, setting: Setting
) -> Iterator[ImageEmbeddings]:
    """The same block by block, so that a set need not fit into memory; a block may have no rows.

    On a terminal a bar shows how far it is. Of sets alone is known what to remember them by.
    """
    entry = None
    if setting.cache is not None:
        assert isinstance(images, ImageSet)
        reading = f" {json.dumps(dict(model.reading))}" if model.reading else ""
        key = _key(model, setting, f"images{reading}", images.fingerprint)
        entry = setting.cache / key
        about = {"model": model.name, "images": str(images), "num_images": images.num_samples}
        setting.ranks.on_first(lambda: _describe(entry, about))
    loader = _loader(model, images, setting)
    with progress_bar("embedding") if setting.ranks.first else nullcontext(_untold) as progress:
        for start in range(0, images.num_samples, _BLOCK):
            span = range(start, min(start + _BLOCK, images.num_samples))
            samples = _Span(loader, span, images.num_samples, progress)
            path = entry / f"block-{start:010d}.safetensors" if entry is not None else None
            yield _recalled(path, partial(_embed, model, samples, setting), setting.ranks)
            progress(span.stop, images.num_samples)


def _untold(done: int, total: int | None) -> None:
    pass


def texts_embeddings(
    model: Pretrained, texts: Sequence[str], setting: Setting
) -> Float[Tensor, "num_texts dim"]:
    """Embed texts, each different one once, or take what was embedded before."""
    unique = list(dict.fromkeys(texts))

    def embed(own: Sequence[str]) -> Tensor:
        return embed_texts(
            model.model, own, model.tokenize, setting.batch_size, autocast=setting.autocast
        )

    rows = _texts(model, unique, setting, "texts", embed)
    place = {text: row for row, text in enumerate(unique)}
    return rows[[place[text] for text in texts]]


def classifier(
    model: Pretrained,
    names: Sequence[str],
    templates: Sequence[str],
    setting: Setting,
    *,
    short_text_words: int | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """One embedding per class, made of its prompts, or what was made before."""

    def embed(own: Sequence[str]) -> Tensor:
        return class_embeddings(
            model.model,
            own,
            templates,
            model.tokenize,
            short_text_words=short_text_words,
            batch_size=setting.batch_size,
            autocast=setting.autocast,
        )

    kind = "classes " + json.dumps([short_text_words, *templates])
    return _texts(model, names, setting, kind, embed)


def _texts(
    model: Pretrained,
    texts: Sequence[str],
    setting: Setting,
    kind: str,
    embed: Callable[[Sequence[str]], Tensor],
) -> Tensor:
    """Let the ranks share texts; what each embeds alone must not depend on the others."""
    ranks = setting.ranks

    def shared() -> Tensor:
        if len(texts) < ranks.size:  # a rank without any could not know how wide they are
            return ranks.together(lambda: embed(texts))
        shares = ranks.shares(len(texts))
        own = shares[ranks.rank]
        rows = ranks.together(lambda: embed(texts[own.start : own.stop]))
        return ranks.gather_rows(rows, [len(share) for share in shares])

    if setting.cache is None:
        return shared()
    content = blake2b(json.dumps(list(texts)).encode(), digest_size=16).hexdigest()
    path = setting.cache / f"{_key(model, setting, kind, content)}.safetensors"
    return _recalled_tensors(path, lambda: ({"embeddings": shared()}, {}), ranks)[0]["embeddings"]


def _key(model: Pretrained, setting: Setting, kind: str, content: str) -> str:
    parts = [str(_FORMAT), model.fingerprint, str(setting.autocast), kind, content]
    return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _loader(model: Pretrained, images: ImageSet | SampleSet, setting: Setting) -> Loader:
    decode = decoder_of(model)
    return Loader(
        Numbered(images, texts=False),
        SampleOrder(np.array([images.num_samples]), seed=0, window=1, shuffle=False),
        decode=decode,
        tokenize=_no_tokens,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=samples_at_once(decode, setting.batch_size),
        num_workers=setting.num_workers,
        seed=0,
        max_skipped_share=None,
        ranks=setting.ranks,
    )


def decoder_of(model: Pretrained) -> Decode:
    """Return what makes a model's input of an encoded file."""
    return model.decode or ImageDecoder(model.transform, _MAX_IMAGE_PIXELS)


def _no_tokens(texts: Sequence[str]) -> Tensor:
    return torch.zeros(len(texts), 1, dtype=torch.int64)


@dataclass(frozen=True)
class _Span:
    """Some consecutive samples of a loader."""

    loader: Loader
    span: range
    num_samples: int
    """Of the whole loader."""
    progress: Progress
    """Told how many of them are done."""

    @property
    def ranks(self) -> Ranks:
        return self.loader.ranks

    def epoch(self) -> Iterator[Batch]:
        done = self.span.start
        for batch in self.loader.epoch(self.span):
            yield batch
            # The other ranks are about as far.
            done += self.ranks.size * (len(batch) + sum(batch.skipped.values()))
            self.progress(min(done, self.span.stop), self.num_samples)


def _embed(model: Pretrained, samples: _Span, setting: Setting) -> ImageEmbeddings:
    embedded: Embedded = embed_images(
        model.model,
        samples,
        features=True,
        contents=False,  # how often an image comes makes no difference here
        empty=True,
        autocast=setting.autocast,
    )
    return ImageEmbeddings(
        embeddings=embedded.embeddings,
        features=embedded.features,
        rows=embedded.labels,
        skipped=embedded.skipped,
    )


def _recalled(
    path: Path | None, make: Callable[[], ImageEmbeddings], ranks: Ranks
) -> ImageEmbeddings:
    if path is None:
        return make()

    def made() -> tuple[dict[str, Tensor], dict[str, str]]:
        block = make()
        tensors = {
            "embeddings": block.embeddings,
            "features": block.features,
            "rows": block.rows,
        }
        return tensors, {"skipped": json.dumps(block.skipped)}

    tensors, notes = _recalled_tensors(path, made, ranks)
    return ImageEmbeddings(**tensors, skipped=json.loads(notes["skipped"]))


def _recalled_tensors(
    path: Path,
    make: Callable[[], tuple[dict[str, Tensor], dict[str, str]]],
    ranks: Ranks,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and notes from a file; where it is not whole, make and write them.

    All ranks do the one or the other: the first rank looks whether the file is there.
    """
    found = ranks.on_first(lambda: _read(path))
    (present,) = ranks.gather_numbers(int(found is not None))[0]
    if present:
        return ranks.together(lambda: found or _require(path))
    tensors, notes = make()
    lasting = _PASSING.isdisjoint(json.loads(notes.get("skipped", "{}")))
    ranks.on_first(lambda: _write(path, tensors, notes) if lasting else None)
    return tensors, notes


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); it is made again", path, error)
        return None


def _require(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    read = _read(path)
    if read is None:
        raise UniclError(f"the first rank reads {path}, this one cannot: the cache must be shared")
    return read


def _write(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _keep(path, save(contiguous, metadata=notes))


def _describe(entry: Path, about: dict[str, Any]) -> None:
    """Say in the entry what it holds, for a person who cleans up."""
    path = entry / "about.json"
    if not path.exists():  # a cache that is complete may be one that can only be read
        _keep(path, json.dumps(about, indent=1).encode())


def _keep(path: Path, content: bytes) -> None:
    # Under a name of its own first: two commands may embed the same set side by side.
    own = path.with_name(f"{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(own) as file:
            file.write(content)
        try:
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
        return
    except OSError as error:
        failed = write_error(path.parent, error)
    except UniclError as error:
        failed = error
    raise UniclError(f"{failed} (--cache DIR), or remember nothing (--cache none)") from failed
