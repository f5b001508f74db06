"""From a source to folders of shards: what `unicl prepare` does (Florence, section 2.1)."""

from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from unicl.data.atomic import PARTIAL_PREFIX, write_error
from unicl.data.hash_table import COLLISIONS_FILE, TEXTS_FILE
from unicl.data.progress import Progress
from unicl.data.shard_index import DATASET_FILE
from unicl.data.shards import ShardSet, ShardWriter, index_shards
from unicl.data.sources import SkippedEntry, Source, open_source
from unicl.errors import UniclError, UsageError

_MARKER = ".unfinished"
_PRODUCTS = (
    "shard-*.tar",
    "shard-*.index",
    TEXTS_FILE,
    COLLISIONS_FILE,
    DATASET_FILE,
    f"{PARTIAL_PREFIX}*",
    _MARKER,
)
_PROGRESS_EVERY = 100


@dataclass(frozen=True)
class Prepared:
    """What a preparation has made."""

    num_samples: int
    """Samples in all folders."""
    num_texts: int
    """Unique texts in all folders."""
    skipped: dict[str, int]
    """Entries that could not be used, by reason."""
    examples: dict[str, str]
    """The first entry of each reason."""
    folders: dict[str, Path]
    """The folders of shards, by split; a source without splits has one, called ""."""

    def __str__(self) -> str:
        folders = ", ".join(str(folder) for folder in self.folders.values())
        samples = _count(self.num_samples, "sample")
        texts = _count(self.num_texts, "different text")
        text = f"{samples} with {texts} in {folders}"
        for reason, count in sorted(self.skipped.items()):
            text += f"; skipped {count}: {reason}"
            text += f" (first: {self.examples[reason]})" if reason in self.examples else ""
        return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_finished(out: Path) -> bool:
    """Say whether `prepare` has run to its end in a folder."""
    return not (out / _MARKER).exists() and any(
        path.exists() for path in (out / DATASET_FILE, *out.glob(f"*/{DATASET_FILE}"))
    )


def prepare(
    source: Source | str | Path,
    out: Path | None,
    *,
    samples_per_shard: int = 10_000,
    image_column: str | None = None,
    text_column: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Write a source's images and texts into shards, with indices and text hash table.

    A source with splits gets a folder per split inside `out`. Entries that cannot be used are
    counted and left out. A preparation that was interrupted starts afresh in the same folder; any
    other folder that is not empty is refused.

    Args:
        source: A source, or what `open_source` takes, or a folder of WebDataset tars, which are
            indexed in place.
        out: Where the shards go; None for tars that are indexed in place.
        samples_per_shard: Samples of every shard but a split's last.
        image_column: Column of a table with the images' paths; unset takes the first it knows.
        text_column: Column of a table with the texts; unset takes the first it knows.
        progress: Called now and then with the entries that are done, and of all, if that is known.

    Raises:
        UsageError: There is no such source, or `out` is not empty, or lies inside of the source.
        UniclError: No entry could be used, the disk is full, the folder is read-only, ...
    """
    if isinstance(source, str | Path):
        # A Path is always a path, even one called twemoji.
        spec = source if isinstance(source, str) else str(source.absolute())
        if spec not in ("", "twemoji") and any(Path(spec).glob("*.tar")):
            return _index(Path(spec), out, progress)
        inside = out is not None and out.resolve().is_relative_to(Path(spec).resolve())
        if spec != "twemoji" and Path(spec).is_dir() and inside:
            raise UsageError(f"{out} lies inside {spec}, among the images; choose another --out")
        source = open_source(spec, image_column=image_column, text_column=text_column)
    if out is None:
        raise UsageError(f"where shall the shards of {source.name} go? name a folder with --out")
    _claim(out)
    try:
        prepared = _write(source, out, samples_per_shard, progress)
        (out / _MARKER).unlink()
    except BaseException:
        # What there is of it is of no use, and a full disk wants the space back.
        _clean(out)
        raise
    return prepared


def _write(
    source: Source, out: Path, samples_per_shard: int, progress: Progress | None
) -> Prepared:
    folders = {split: out / split for split in source.splits}
    totals = [source.num_entries(split) for split in source.splits]
    total = None if None in totals else sum(number or 0 for number in totals)
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    texts: set[str] = set()
    num_samples = 0
    done = 0
    for split, folder in folders.items():
        of_split: Counter[str] = Counter()
        info = {**source.info, "split": split, "skipped": of_split}
        with ShardWriter(folder, samples_per_shard=samples_per_shard, info=info) as writer:
            # Closed at once when writing fails: a source may have processes at work.
            with closing(source.entries(split)) as entries:
                for entry in entries:
                    done += 1
                    if isinstance(entry, SkippedEntry):
                        of_split[entry.reason] += 1
                        examples.setdefault(entry.reason, entry.where)
                    else:
                        writer.write(entry.key, entry.image, entry.extension, entry.text)
                    if progress is not None and done % _PROGRESS_EVERY == 0:
                        progress(done, total)
            if not writer.table.num_samples:
                raise UniclError(_nothing_usable(source, of_split, examples))
        num_samples += writer.table.num_samples
        texts.update(writer.table.texts)
        skipped += of_split
    if progress is not None:
        progress(done, total)
    return Prepared(num_samples, len(texts), dict(skipped), examples, folders)


def _nothing_usable(source: Source, skipped: Counter[str], examples: dict[str, str]) -> str:
    if not skipped:
        return f"{source.name} has no entries; give it at least one image with a text"
    reason, count = skipped.most_common(1)[0]
    return (
        f"none of the {skipped.total()} entries of {source.name} can be used; "
        f"{count}: {reason} (first: {examples[reason]})"
    )


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / _MARKER).exists():
            _clean(out)
            out.mkdir(exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"{out} is already there; remove it or choose another --out")
        (out / _MARKER).touch()
    except FileExistsError as error:
        raise UsageError(f"{out} is a file; choose another --out") from error
    except OSError as error:
        raise write_error(out, error) from error


def _clean(out: Path) -> None:
    """Remove what a preparation wrote, by name, and the folders that are empty then."""
    inner = [path for path in out.iterdir() if path.is_dir()]
    for folder in (*inner, out):
        for pattern in _PRODUCTS:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _index(folder: Path, out: Path | None, progress: Progress | None) -> Prepared:
    if out is not None and out.resolve() != folder.resolve():
        raise UsageError(f"{folder} has tars already; they are indexed in place, without --out")
    if (folder / DATASET_FILE).exists():
        raise UsageError(
            f"{folder} is prepared already; remove its {DATASET_FILE} to index it again"
        )
    index_shards(folder, progress=progress)
    shards = ShardSet.open(folder)
    skipped, truncated = Counter(shards.info["skipped"]), shards.info["truncated"]
    if truncated:
        skipped["truncated tar"] = len(truncated)
    examples = {"truncated tar": truncated[0]} if truncated else {}
    table = shards.table()
    return Prepared(table.num_samples, table.num_texts, dict(skipped), examples, {"": folder})
