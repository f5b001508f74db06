"""`unicl embed`, `index`, `search`: from a folder of images to those that a text or image means."""

import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unicl.config import find_holder
from unicl.data.augment import open_image
from unicl.data.image_sets import (
    KNOWN_SETS,
    CaptionSet,
    ClassificationSet,
    ImageSet,
    open_images,
)
from unicl.distributed import joined
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import image_blocks
from unicl.evaluator import Options, check, setting_of
from unicl.models import choose_device, lasting_name, let_see, load
from unicl.predictor import ImageInput, Predictor, naming, read_image
from unicl.search.change import chosen_kind
from unicl.search.collection import Collection, require_empty
from unicl.search.folder import DamagedIndexError
from unicl.search.gallery import Answer, write_gallery
from unicl.search.index import Found, SearchIndex, require_setting
from unicl.search.items import Block, Item
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

# Different texts of a collection that recall is measured with: as many as images.
_NUM_TEXTS = 1000


def embed(
    model: str | Path,
    data: str,
    options: Options,
    overrides: Mapping[str, str] | None = None,
) -> Collection | None:
    """Embed the images of a set or folder into `options.out`; several ranks share the work.

    Where the set holds a plug-in's medium, such as videos, these are embedded.

    Args:
        model: what `unicl.models.load` takes.
        data: a set, or any folder.
        options: where and how.
        overrides: keys of the plug-in's section, such as {"video.num_frames": "8"}.

    Returns:
        What was written; None on every rank but the first, which writes.

    Raises:
        UsageError: there is no such set, the folder is not empty, or a setting is impossible.
        UniclError: the model cannot be loaded, or no image can be read.
    """
    out = options.out
    if out is None:
        raise UsageError("where shall the embeddings go? name a folder with --out")
    check(options)
    medium = find_holder(data)
    if overrides and medium is None:
        raise UsageError(f"--{next(iter(overrides))} has no effect on images; leave it out")
    device = choose_device(options.device)
    with joined(device, timeout_seconds=600, alone=True) as ranks:
        ranks.together(lambda: require_empty(out))
        images = ranks.together(
            lambda: _open(data, split=options.split, root=options.root, download=options.download)
        )
        options = replace(options, split=images.split or options.split)  # which may be another
        plain = ranks.together(lambda: load(model, device=str(device)))
        loaded = ranks.together(lambda: let_see(medium, plain, overrides or {}))
        ranks.together(lambda: _require_searchable(plain, loaded))
        blocks = image_blocks(loaded, images, setting_of(options, ranks))
        if not ranks.first:
            for _ in blocks:  # the first rank writes; the others help it to embed
                pass
            return None
        with_items = (
            (block.embeddings.numpy(), _items(images, block.rows.tolist(), options))
            for block in blocks
        )
        name = lasting_name(model)  # found again from any folder
        written = Collection.write(out, with_items, model=name, fingerprint=loaded.fingerprint)
        logger.info(
            "%d embeddings of width %d in %s%s",
            *(written.num_items, written.dim, out),
            "".join(f", {count} left out: {reason}" for reason, count in images.skipped.items()),
        )
        return written


def _require_searchable(plain: Pretrained, seeing: Pretrained) -> None:
    """Refuse what no search could compare a query with.

    Raises:
        UsageError: the model has a head in place of embeddings, or is another one by its overrides.
    """
    if plain.classes:
        raise UsageError(
            f"{plain.name} has a classification head, so it gives probabilities and no embeddings; "
            "embed with a model of two towers"
        )
    if plain.fingerprint != seeing.fingerprint:
        raise UsageError(
            f"{seeing.mark} makes another model of {plain.name}, which a search could not load "
            "again; train that one, and embed with its run"
        )


def _open(data: str, *, split: str, root: Path, download: bool = False) -> ImageSet:
    medium = find_holder(data)
    if medium is None:
        return open_images(data, split=split, root=root, download=download)
    opened: ImageSet = medium.open_items(data, split=split, root=root)
    return opened


def _items(images: ImageSet, rows: Iterable[int], options: Options) -> list[Item]:
    """Say what rows are, and how their images are found again: by their path, or in their set.

    The key is the same from whatever folder and by whatever path the set is opened, and another
    one in another part of it.
    """
    known = images.name in KNOWN_SETS
    source = images.name if known else str(Path(images.name).resolve())
    items = []
    for row in rows:
        place, number = images.locate(row)
        path = images.path(row)
        if path is not None:
            where = str(path)
        else:
            root = str(options.root.absolute())
            where = json.dumps({"set": source, "root": root, "split": options.split, "row": row})
            place = f"{place}:{number}"
        key = "/".join(part for part in (source, images.split, place) if part)
        items.append(Item(key, where, _text(images, row)))
    return items


def _text(images: ImageSet, row: int) -> str:
    if isinstance(images, CaptionSet):
        return images.captions[row][0]
    if isinstance(images, ClassificationSet) and images.targets.ndim == 1:
        return images.class_names[int(images.targets[row])]
    return ""


def build_index(
    folder: Path, collections: Sequence[Path], *, kind: str = "auto", recall: float = 0.95
) -> SearchIndex:
    """Build an index of one collection or several of one model.

    The recall of an approximate one is held to for the items' texts, too, if the model is there.
    A damaged index that is there is replaced, a sound one never.

    Raises:
        UsageError: a folder holds no embeddings, they are of several models, a setting is
            impossible, or there is an index already.
        UniclError: embeddings are damaged, or the index cannot be written, or that which is there
            cannot be read now.
    """
    require_setting(kind, recall)
    _require_no_index(folder)
    opened = _open_collections(collections)
    num_items = sum(collection.num_items for collection in opened)
    approximate = chosen_kind(kind, num_items, opened[0].dim) == "approximate"
    index = SearchIndex.build(
        folder,
        _blocks(opened),
        model=opened[0].model,
        fingerprint=opened[0].fingerprint,
        kind=kind,
        recall=recall,
        texts=_embedded_texts(opened) if approximate else None,
        progress=_say,
    )
    logger.info(
        "%d items in %s%s: %s",
        index.num_items,
        folder,
        f", {index.num_skipped} were there twice" if index.num_skipped else "",
        index.facts.summary(),
    )
    return index


def _require_no_index(folder: Path) -> None:
    try:
        there = SearchIndex.open(folder)
    except (UsageError, DamagedIndexError):  # none, or one that says that it has to be built again
        return
    raise UsageError(
        f"{folder} holds an index of {there.num_items:,} items already; add to it by --add, "
        "choose another --out, or remove it and build it anew"
    )


def _embedded_texts(
    collections: Sequence[Collection],
) -> Float[np.ndarray, "num_texts dim"] | None:
    """Embed some of the items' texts, as a search will embed its own; None if that cannot be."""
    items = (item for _, block in _blocks(collections) for item in block)
    texts = list(dict.fromkeys(item.text for item in items if item.text))
    if not texts:
        return None
    _say("embedding texts to measure recall with")
    first = collections[0]
    try:
        loaded = load(first.model, device="auto")
        if loaded.fingerprint != first.fingerprint:
            raise UniclError(f"{first.model} is not what it was when it embedded the images")
        chosen = random.Random(0).sample(texts, min(len(texts), _NUM_TEXTS))
        return Predictor(loaded).embed_texts(chosen)
    except UniclError as error:
        logger.warning("recall is measured for images only, not for texts: %s", error)
        return None


def add_to_index(folder: Path, collections: Sequence[Path]) -> SearchIndex:
    """Add collections to an index; items that it has already stay as they are.

    Raises:
        UsageError: a folder holds no embeddings or no index, or their models differ.
    """
    opened = _open_collections(collections)
    index = SearchIndex.open(folder)
    index.require_model(opened[0].model, opened[0].fingerprint)
    num_more = sum(collection.num_items for collection in opened)
    turns = index.kind == "exact" and index.kind_with(num_more) == "approximate"
    added = index.add(
        _blocks(opened),
        model=opened[0].model,
        fingerprint=opened[0].fingerprint,
        texts=_embedded_texts(opened) if turns else None,
        progress=_say,
    )
    logger.info(
        "added %d items, %d were there; %d in %s: %s",
        added.num_added,
        added.num_skipped,
        index.num_items,
        folder,
        index.facts.summary(),
    )
    return index


def _say(words: str) -> None:
    logger.info("%s", words)


def _open_collections(folders: Sequence[Path]) -> list[Collection]:
    opened = [Collection.open(folder) for folder in folders]
    for other in opened[1:]:
        if other.fingerprint != opened[0].fingerprint:
            raise UsageError(
                f"{opened[0].folder} was embedded by {opened[0].model} (width {opened[0].dim}), "
                f"{other.folder} by {other.model} (width {other.dim}) or other weights of it: "
                "an index holds one model's embeddings"
            )
    return opened


def _blocks(collections: Sequence[Collection]) -> Iterator[Block]:
    for collection in collections:
        yield from collection.blocks()


@dataclass(frozen=True)
class Searched:
    """What was found in an index."""

    index: SearchIndex
    """Where."""
    answers: tuple[Answer, ...]
    """One per query."""


def search(
    index: str | Path,
    *,
    texts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    k: int = 10,
    model: str | Path | None = None,
    device: str = "auto",
) -> Searched:
    """Find the images of an index that are nearest to texts or to images.

    Args:
        index: the index's folder.
        texts: what to look for, in words.
        images: paths or URLs of images to look for, or paths of a plug-in's medium, such as videos.
        k: images per query.
        model: the model that embedded; unset takes it from where it was then.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: there is no such index, another model made it, the model is not there any more,
            or a text is empty.
        UniclError: an image cannot be read.
    """
    if not all(text.strip() for text in texts):
        raise UsageError("a text to look for is empty; give it words")
    opened = SearchIndex.open(index)
    holders = (find_holder(str(image)) for image in images)
    medium = next((holder for holder in holders if holder is not None), None)
    read = [_read(str(image)) for image in images]
    chosen = str(choose_device(device))
    try:
        loaded = load(opened.model if model is None else model, device=chosen)
    except UsageError as error:
        if model is not None:
            raise
        raise UsageError(
            f"{error}; where the model of {index} has moved, name it: --model"
        ) from error
    opened.require_model(loaded.name, loaded.fingerprint)
    if medium is not None:
        loaded = medium.adapt(loaded, {})
    predictor = Predictor(loaded)
    queries = []
    if texts:
        queries.append(predictor.embed_texts(list(texts)))
    if images:
        queries.append(predictor.embed_images([picture for _, picture in read]))
    found = opened.search(np.concatenate(queries), k)
    shown: list[tuple[str, bytes | None]] = [(text, None) for text in texts]
    shown += [(str(image), file) for image, (file, _) in zip(images, read, strict=True)]
    return Searched(
        opened,
        tuple(
            Answer(query, hits, image) for (query, image), hits in zip(shown, found, strict=True)
        ),
    )


def _read(place: str) -> tuple[bytes, ImageInput]:
    """Read an image once: its bytes to be shown, and what they hold to be embedded."""
    with naming(place):
        file = read_image(place)
        if find_holder(place) is not None:
            return file, place  # the model's own way of reading takes the file
        picture = open_image(file)
    picture.filename = place  # type: ignore[attr-defined]  # what an error will call it
    return file, picture


def show(searched: Searched) -> None:
    """Print what was found, a table per query."""
    console = Console()
    folder = _common_folder([_where(hit) for answer in searched.answers for hit in answer.found])
    below = f"image in {folder}" if folder and folder != Path.cwd() else "image"
    for answer in searched.answers:
        has_texts = any(hit.item.text for hit in answer.found)
        table = Table(title=escape(answer.query), title_justify="left")
        table.add_column("similarity", justify="right")
        if has_texts:
            table.add_column("text")
        table.add_column(escape(below), overflow="fold")
        for hit in answer.found:
            place = _where(hit)
            shown = os.path.relpath(place, folder) if folder else place
            texts = [escape(hit.item.text)] if has_texts else []
            table.add_row(f"{hit.similarity:.3f}", *texts, escape(shown))
        console.print(table)


def _common_folder(places: Sequence[str]) -> Path | None:
    """Return the deepest folder that holds all paths, or the working directory if it does, too.

    None if one of them is not absolute.
    """
    if not places or not all(Path(place).is_absolute() for place in places):
        return None
    folder = Path(os.path.commonpath([os.path.dirname(place) for place in places]))
    return Path.cwd() if folder.is_relative_to(Path.cwd()) else folder


def to_json(searched: Searched) -> str:
    """Return what was found as JSON: per query the hits, best first."""
    return json.dumps(
        [
            {
                "query": answer.query,
                "found": [
                    {
                        "similarity": round(hit.similarity, 6),
                        "key": hit.item.key,
                        "text": hit.item.text,
                        "where": hit.item.where,
                    }
                    for hit in answer.found
                ],
            }
            for answer in searched.answers
        ],
        indent=1,
        ensure_ascii=False,
    )


def write_page(path: Path, searched: Searched) -> None:
    """Write what was found as one self-contained HTML page."""
    sets: dict[tuple[str, str, str], ImageSet] = {}

    def read(item: Item) -> bytes:
        if not item.where.startswith("{"):
            return Path(item.where).read_bytes()
        place = json.loads(item.where)
        key = (place["set"], place["root"], place["split"])
        if key not in sets:
            sets[key] = _open(place["set"], split=place["split"], root=Path(place["root"]))
        return sets[key].read(place["row"]).image

    index = searched.index
    summary = f"{index.num_items:,} items, embedded by {index.model}; {index.facts.summary()}"
    write_gallery(path, searched.answers, read, summary=summary)


def _where(hit: Found) -> str:
    return hit.item.key if hit.item.where.startswith("{") else hit.item.where
