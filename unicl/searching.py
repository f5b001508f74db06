"""`unicl embed`, `index`, `search`: from a folder of images to those that a text or image means."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from unicl.data.image_sets import CaptionSet, ClassificationSet, ImageSet, open_images
from unicl.distributed import joined
from unicl.errors import UsageError
from unicl.evaluation.cache import image_blocks
from unicl.evaluator import Options, setting_of
from unicl.models import choose_device, load
from unicl.predictor import Predictor, read_image
from unicl.search.collection import Collection
from unicl.search.gallery import Answer, write_gallery
from unicl.search.index import Found, SearchIndex
from unicl.search.items import Item
from unicl.search.state import Block

logger = logging.getLogger("unicl")


def embed(model: str | Path, data: str, options: Options) -> Collection | None:
    """Embed the images of a set or folder into `options.out`; several ranks share the work.

    Returns:
        What was written; None on every rank but the first, which writes.

    Raises:
        UsageError: there is no such set, or the folder is not empty.
        UniclError: the model cannot be loaded, or no image can be read.
    """
    if options.out is None:
        raise UsageError("where shall the embeddings go? name a folder with --out")
    device = choose_device(options.device)
    with joined(device, timeout_seconds=600, alone=True) as ranks:
        images = ranks.together(
            lambda: open_images(
                data, split=options.split, root=options.root, download=options.download
            )
        )
        loaded = ranks.together(lambda: load(model, device=str(device)))
        blocks = image_blocks(loaded, images, setting_of(options, ranks))
        if not ranks.first:
            for _ in blocks:  # the first rank writes; the others help it to embed
                pass
            return None
        with Progress(disable=not Console().is_terminal, transient=True) as bar:
            line = bar.add_task("embedding", total=images.num_samples)

            def with_items() -> Iterator[Block]:
                for block in blocks:
                    items = [_item(images, int(row), options) for row in block.rows]
                    yield block.embeddings.numpy(), items
                    bar.update(line, advance=len(block.rows) + sum(block.skipped.values()))

            written = Collection.write(
                options.out, with_items(), model=loaded.name, fingerprint=loaded.fingerprint
            )
        logger.info("%d embeddings of width %d in %s", written.num_items, written.dim, options.out)
        return written


def _item(images: ImageSet, row: int, options: Options) -> Item:
    """Say what a row is, and how its image is found again: by its path, or in its set."""
    key, number = images.locate(row)
    path = images.path(row)
    if path is not None:
        where = str(path)
    else:
        place = {
            "set": str(Path(images.name).absolute()) if Path(images.name).is_dir() else images.name,
            "root": str(options.root.absolute()),
            "split": options.split,
            "row": row,
        }
        where = json.dumps(place)
        key = f"{key}:{number}"
    return Item(f"{images.name}/{key}", where, _text(images, row))


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

    Raises:
        UsageError: a folder holds no embeddings, or they are of several models.
    """
    opened = _open_collections(collections)
    index = SearchIndex.build(
        folder,
        _blocks(opened),
        model=opened[0].model,
        fingerprint=opened[0].fingerprint,
        kind=kind,
        recall=recall,
        progress=_say,
    )
    logger.info("%d items in %s: %s", index.num_items, folder, index.facts.summary())
    return index


def add_to_index(folder: Path, collections: Sequence[Path]) -> SearchIndex:
    """Add collections to an index; items that it has already stay as they are.

    Raises:
        UsageError: a folder holds no embeddings or no index, or their models differ.
    """
    opened = _open_collections(collections)
    index = SearchIndex.open(folder)
    added = index.add(
        _blocks(opened), model=opened[0].model, fingerprint=opened[0].fingerprint, progress=_say
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
        images: paths or URLs of images to look for.
        k: images per query.
        model: the model that embedded; unset takes it from where it was then.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: there is no such index, or another model made it.
        UniclError: the model is not there any more, or an image cannot be read.
    """
    opened = SearchIndex.open(index)
    loaded = load(opened.model if model is None else model, device=device)
    opened.require_model(loaded.name, loaded.fingerprint)
    predictor = Predictor(loaded)
    queries = []
    if texts:
        queries.append(predictor.embed_texts(list(texts)))
    if images:
        queries.append(predictor.embed_images(list(images)))
    found = opened.search(np.concatenate(queries), k)
    shown = [*((text, None) for text in texts), *((str(i), read_image(str(i))) for i in images)]
    return Searched(
        opened,
        tuple(
            Answer(query, hits, image) for (query, image), hits in zip(shown, found, strict=True)
        ),
    )


def show(searched: Searched) -> None:
    """Print what was found, a table per query."""
    console = Console()
    for answer in searched.answers:
        table = Table(title=escape(answer.query), title_justify="left")
        table.add_column("similarity", justify="right")
        table.add_column("text")
        table.add_column("image", overflow="fold")
        for hit in answer.found:
            table.add_row(f"{hit.similarity:.3f}", escape(hit.item.text), escape(_where(hit)))
        console.print(table)


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
            sets[key] = open_images(place["set"], split=place["split"], root=Path(place["root"]))
        return sets[key].read(place["row"]).image

    index = searched.index
    summary = f"{index.num_items:,} images, embedded by {index.model}; {index.facts.summary()}"
    write_gallery(path, searched.answers, read, summary=summary)


def _where(hit: Found) -> str:
    return hit.item.key if hit.item.where.startswith("{") else hit.item.where
