"""What published video sets say of their videos: Kinetics, lists of paths, MSR-VTT; without torch.

Annotations lie in the folder of the set or in one of `annotations`, `annotation` and `msrvtt_data`
there; the videos lie anywhere below the folder of the set.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from unicl.data.shard_index import VIDEO_EXTENSIONS
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

_INNER = ("annotations", "annotation", "msrvtt_data")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_LINE = re.compile(rf"(.+\.(?:{'|'.join(VIDEO_EXTENSIONS)}))\s+(\d+)", re.IGNORECASE)


def split_of(name: str) -> str:
    """Return the split that a file or folder is called after: train, val, test, or none of them."""
    words = re.findall("[a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


@dataclass(frozen=True)
class Clip:
    """A row of a table of Kinetics."""

    stem: str
    """Name of the video's file before its suffix: {youtube_id}_{start:06d}_{end:06d}."""
    label: str
    """Name of the class; empty where the table has none, as Kinetics' test part."""
    split: str
    """train, val, test, or empty."""


@dataclass(frozen=True)
class Kinetics:
    """Tables with the columns label, youtube_id, time_start, time_end, split of one data set.

    The classes are those of all tables together, in alphabetical order. A table without splits is
    of the one that its file is called after.
    """

    folder: Path
    """What the videos lie below."""
    tables: tuple[Path, ...]

    @staticmethod
    def is_table(path: Path) -> bool:
        """Say whether a file is such a table, by its first line."""
        columns = {column.strip(' "') for column in _first_line(path).split(",")}
        return path.suffix.lower() == ".csv" and columns >= {"youtube_id", "time_start", "time_end"}

    def read(self) -> list[Clip]:
        """Return the clips of all tables.

        Raises:
            UniclError: A table is damaged.
        """
        return [clip for table in self.tables for clip in self._clips(table)]

    @staticmethod
    def _clips(table: Path) -> Iterator[Clip]:
        for number, row in _rows(table):
            try:
                times = [int(float(row[column])) for column in ("time_start", "time_end")]
            except (ValueError, OverflowError) as error:
                raise UniclError(f"{table}, line {number} has a time that is no number") from error
            yield Clip(
                "{}_{:06d}_{:06d}".format(row["youtube_id"], *times),
                row.get("label", ""),
                split_of(row.get("split", "")) or split_of(table.stem),
            )


@dataclass(frozen=True)
class VideoLists:
    """Lists of one video a line, `path number-of-class`, as mmaction2 and Video-Swin have them."""

    folder: Path
    """What the paths start at, or one of `videos`, `videos_SPLIT` and `SPLIT` in it."""
    lists: dict[str, Path]
    """By split; one list that names no split has an empty one."""

    @staticmethod
    def is_list(path: Path) -> bool:
        """Say whether a file is such a list, by its first line."""
        return path.suffix.lower() == ".txt" and bool(_LINE.fullmatch(_first_line(path)))

    def read(self, split: str) -> list[tuple[str, int]]:
        """Return path and class of each video.

        Raises:
            UniclError: A line is neither empty nor a path of a video and a number.
        """
        found = []
        for number, line in enumerate(_text(self.lists[split]).splitlines(), start=1):
            if not line.strip():
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise UniclError(
                    f"{self.lists[split]}, line {number} is not the path of a video and the number "
                    f"of its class: {line.strip()[:80]!r}"
                )
            found.append((match[1], int(match[2])))
        return found


@dataclass(frozen=True)
class MsrVtt:
    """MSR-VTT's captions in the 1k-A split of JSFusion.

    `test` is the 1,000 videos of MSRVTT_JSFUSION_test.csv with its one caption each. `train` is
    those of MSRVTT_train.9k.csv, else of MSRVTT_train.7k.csv, else all others, with all captions
    (20 each) of the JSON. Nobody published a `val`: it is the videos of MSRVTT_val.csv, for whom
    writes one (`video_id`, and `sentence` if not all captions are wanted), and they are not trained
    on.
    """

    folder: Path
    """What the videos lie below."""
    captions: Path
    """The JSON; the tables lie beside it."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The parts that can be opened."""
        return ("train", "val", "test") if self._val.is_file() else ("train", "test")

    @property
    def test(self) -> Path:
        """The table of 1k-A's test part, which the others are kept apart from."""
        return self.captions.with_name("MSRVTT_JSFUSION_test.csv")

    @property
    def _val(self) -> Path:
        return self.captions.with_name("MSRVTT_val.csv")

    def read(self, split: str) -> dict[str, tuple[str, ...]]:
        """Return the captions of each video of a part, perhaps none, by the video's id.

        Raises:
            UsageError: A table is missing, or a part has videos of the test part.
            UniclError: A file is damaged.
        """
        if not self.test.is_file():
            raise UsageError(
                f"{self.captions} needs {self.test.name} beside it, the 1,000 videos of 1k-A's "
                "test part; it is in msrvtt_data.zip of github.com/ArrowLuo/CLIP4Clip/releases"
            )
        tested = _sentences(self.test)
        if split == "test":
            return tested
        held_out = _sentences(self._val) if self._val.is_file() else {}
        self._refuse_tested(self._val, held_out, tested)
        of_all = self._of_all()
        if split == "val":
            return {video: texts or of_all.get(video, ()) for video, texts in held_out.items()}
        listed = self._listed(of_all, tested)
        return {video: of_all.get(video, ()) for video in listed if video not in held_out}

    def _listed(
        self, of_all: dict[str, tuple[str, ...]], tested: dict[str, tuple[str, ...]]
    ) -> list[str]:
        for name in ("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv"):
            path = self.captions.with_name(name)
            if path.is_file():
                listed = _sentences(path)
                self._refuse_tested(path, listed, tested)
                logger.info("the train part is the %d videos of %s", len(listed), path)
                return list(listed)
        rest = [video for video in of_all if video not in tested]
        logger.info(
            "%s has no MSRVTT_train.9k.csv; the train part is the %d videos that are not in %s",
            self.captions.parent,
            len(rest),
            self.test.name,
        )
        return rest

    def _refuse_tested(
        self, path: Path, listed: dict[str, tuple[str, ...]], tested: dict[str, tuple[str, ...]]
    ) -> None:
        if both := [video for video in listed if video in tested]:
            raise UsageError(
                f"{path} has {len(both)} videos of {self.test.name}, such as {both[0]}; take them "
                "out, or they are trained and tested on"
            )

    def _of_all(self) -> dict[str, tuple[str, ...]]:
        try:
            content = json.loads(_text(self.captions))
            found: dict[str, list[str]] = {video["video_id"]: [] for video in content["videos"]}
            for sentence in content["sentences"]:
                if text := sentence["caption"].strip():
                    found.setdefault(sentence["video_id"], []).append(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UniclError(
                f"{self.captions} lacks MSR-VTT's videos [video_id] and sentences [video_id, "
                "caption]; unpack it again"
            ) from error
        return {video: tuple(texts) for video, texts in found.items()}


Annotations = Kinetics | VideoLists | MsrVtt


def find_annotations(path: Path) -> Annotations | None:
    """Find the annotations that a file is, or that lie in a folder; None if there are none.

    Raises:
        UsageError: A folder has two lists of one split.
    """
    if path.is_file():
        folder = path.parent.parent if path.parent.name in _INNER else path.parent
        return _of_files([path], folder)
    for place in (path, *(path / name for name in _INNER)):
        if place.is_dir():
            files = _tables(place)
            # Where there are more they are captions, each of one file.
            if found := _of_files([file for file in files[:_MOST] if file.is_file()], path):
                return found
    return None


_MOST = 100


def _tables(folder: Path) -> list[Path]:
    try:
        return sorted(
            file for file in folder.iterdir() if file.suffix.lower() in (".csv", ".json", ".txt")
        )
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}") from error


def _of_files(files: list[Path], folder: Path) -> Annotations | None:
    for file in files:
        if _is_msr_vtt(file):
            return MsrVtt(folder, file)
    if tables := [file for file in files if Kinetics.is_table(file)]:
        return Kinetics(folder, tuple(tables))
    lists: dict[str, Path] = {}
    for file in files:
        if VideoLists.is_list(file):
            other = lists.setdefault(split_of(file.stem), file)
            if other != file:
                raise UsageError(f"{other} and {file.name} list one part; name the one to take")
    return VideoLists(folder, lists) if lists else None


def _is_msr_vtt(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    # The real file has 30 MB, in which the sentences may come first. Sets of frames have video_id,
    # too (COCO-VID), but no sentences.
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        return b'"video_id"' in start and b'"sentences"' in start + file.read()


def _first_line(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return next((line.strip() for line in islice(file, 10) if line.strip()), "")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8; save it as one") from error


def _sentences(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a table of MSR-VTT: the sentences of each video, if it has any."""
    found: dict[str, list[str]] = {}
    for _, row in _rows(path):
        if "video_id" not in row:
            raise UniclError(f"{path} has no column video_id; unpack it again")
        texts = found.setdefault(row["video_id"], [])
        if text := row.get("sentence", ""):
            texts.append(text)
    return {video: tuple(texts) for video, texts in found.items()}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Go through the rows of a CSV file, each with its line and all its columns, stripped."""
    # Not `splitlines`, which knows further line separators; a caption may have them.
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            yield (
                reader.line_num,
                {
                    column.strip(): (cell or "").strip()
                    for column, cell in row.items()
                    if column is not None  # cells beyond the last column
                },
            )
    except csv.Error as error:
        raise UniclError(f"{path} is no table of CSV: {error}") from error
