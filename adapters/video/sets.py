"""Sets of videos to evaluate and train on, with classes or captions (Florence 3.8, 3.9).

They are sets of images whose files are videos: `read` gives the bytes of a video file.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np

from adapters.video.annotations import (
    Annotations,
    Kinetics,
    MsrVtt,
    VideoLists,
    find_annotations,
    split_of,
)
from adapters.video.files import (
    FILE_EXTENSIONS,
    KNOWN_VIDEO_SETS,
    find_videos,
    refuse_pictures,
)
from unicl.data.atomic import atomic_file
from unicl.data.image_sets import CaptionSet, ClassificationSet, ImageSet, MissingSetError
from unicl.data.image_sets.class_folder import (
    Medium,
    is_parted,
    open_class_folder,
    open_loose_files,
    read_class_names,
    read_templates,
)
from unicl.data.image_sets.image_set import choose_split, require_whole
from unicl.data.image_sets.images import ImageFiles, TarImages
from unicl.data.image_sets.prepared import open_prepared, prepared_parts
from unicl.data.image_sets.samples import SetSamples
from unicl.data.image_sets.webdataset import is_webdataset, open_webdataset
from unicl.data.sources import class_name
from unicl.errors import UsageError

logger = logging.getLogger("unicl")

# Of Kinetics700 in CLIP's data/prompts.md, in its order.
VIDEO_TEMPLATES = tuple(
    f"a {medium} of {action}."
    for medium in ("photo", "video", "example", "demonstration")
    for action in (
        "{}",
        "a person {}",
        "a person using {}",
        "a person doing {}",
        "a person during {}",
        "a person performing {}",
        "a person practicing {}",
    )
)
"""The prompt ensemble of a set of videos that has no templates.txt."""

VIDEOS = Medium(
    "video",
    FILE_EXTENSIONS,
    VIDEO_TEMPLATES,
    "CLASS/VIDEO.mp4 in it (or in train, val, test), a table of Kinetics, MSRVTT_data.json, a list "
    "of `path number`, CLIP_benchmark's test/nshards.txt, or dataset.json of prepared shards",
)


def open_video_set(
    spec: str,
    *,
    split: str = "test",
    root: Path,
    kind: Literal["classes", "captions"] | None = None,
) -> ClassificationSet | CaptionSet:
    """Open one split of a set of videos.

    Args:
        spec: A name in `KNOWN_VIDEO_SETS`, or a folder: of one folder of videos per class, with
            annotations as in `adapters.video.annotations`, of CLIP_benchmark's WebDataset tars, or
            of prepared shards; or the file of the annotations. A folder that is itself called by a
            known name is `./NAME`.
        split: `train`, `val` or `test`. A set without parts is its own `test`; of a set with `val`
            and no `test`, as Kinetics mostly is, it is `val`.
        root: Known sets lie in `root/NAME`.
        kind: What is needed, to be refused if the set has something else.

    A video that the annotations name and that is not there is skipped as "missing file".

    Raises:
        UsageError: There is no such set or split, none of its videos is there, it is of the other
            kind, or its tars hold pictures, too.
        UniclError: The annotations are damaged.
    """
    path = _locate(spec, root)
    opened = _open(path, split, kind)
    if isinstance(opened.images, TarImages):
        refuse_pictures(opened.images.shards.first_tar)
    if spec in KNOWN_VIDEO_SETS:
        opened = replace(opened, name=spec, where=path.absolute())
    else:
        opened = replace(opened, name=_own_name(opened.name))
    found = "captions" if isinstance(opened, CaptionSet) else "classes"
    if kind not in (None, found):
        raise UsageError(f"{spec} has {found}, but {kind} are needed; choose another set")
    if opened.split not in (split, ""):
        logger.info("%s has no %s part, its %s is taken", opened.name, split, opened.split)
    return opened


def open_video_samples(spec: str, *, split: str, root: Path) -> SetSamples:
    """Open a split of a set of videos to train on; see `open_video_set`.

    A set without parts is taken as a whole. What the set lacks is told at once.

    Raises:
        UsageError: There is no such set or split, or its videos have several classes each.
        UniclError: The annotations are damaged.
    """
    try:
        videos = open_video_set(spec, split=split, root=root)
    except UsageError:
        videos = open_video_set(spec, root=root)
        if videos.splits:
            raise
    if videos.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in videos.skipped.items())
        logger.warning("%s has %d of its videos (%s)", videos, videos.num_samples, reasons)
    return SetSamples(videos)


def open_videos(spec: str, *, split: str = "test", root: Path) -> ImageSet:
    """Open videos without asking for classes or captions: a set, or any folder of videos.

    Class folders are taken as a set where they lie in parts; without, they may as well be albums.

    Args:
        spec: As in `open_video_set`, or a folder with videos anywhere below it.
        split: As in `open_video_set`.
        root: As in `open_video_set`.

    Raises:
        UsageError: There is no such set or folder, or no video in it.
        UniclError: The annotations are damaged.
    """
    path = _locate(spec, root)
    if spec in KNOWN_VIDEO_SETS or _is_set(path) or is_parted(path, VIDEOS):
        return open_video_set(spec, split=split, root=root)
    opened = open_loose_files(path, VIDEOS)
    return replace(opened, name=_own_name(opened.name))


def write_list(videos: ClassificationSet, path: Path) -> None:
    """Write which videos a figure is of: a line `path number-of-class` each, as `VideoLists` reads.

    Of Kinetics everybody has other videos, as they vanish one by one; figures compare where lists
    do.

    Raises:
        UsageError: The videos are not files of their own.
        UniclError: The list cannot be written.
    """
    if videos.path(0) is None:
        raise UsageError(f"the videos of {videos} lie in tars; there is no list of files")
    names = (videos.locate(index)[0] for index in range(videos.num_samples))
    rows = zip(names, videos.targets.tolist(), strict=True)
    with atomic_file(path) as file:
        file.write("".join(f"{name} {number}\n" for name, number in rows).encode())


def _locate(spec: str, root: Path) -> Path:
    if spec in KNOWN_VIDEO_SETS:
        if not (root / spec).is_dir():
            raise MissingSetError(
                f"{spec} needs its annotations and videos in {root / spec}; its publisher offers "
                "no videos, so they can be had by hand only"
            )
        return root / spec
    if spec and Path(spec).exists():
        return Path(spec)
    near = get_close_matches(spec, KNOWN_VIDEO_SETS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(KNOWN_VIDEO_SETS)}"
    raise UsageError(f"there is no set of videos and no folder {spec!r}; {hint}")


def _own_name(name: str) -> str:
    """Tell a folder that is called like a known set from that set."""
    return f"./{name}" if name in KNOWN_VIDEO_SETS else name


def _is_set(path: Path) -> bool:
    if path.is_file() or prepared_parts(path) is not None or is_webdataset(path):
        return True
    return find_annotations(path) is not None or bool(_tars(path))


def _tars(folder: Path) -> list[Path]:
    return sorted((*folder.glob("*.tar"), *folder.glob("*/*.tar")))


def _open(path: Path, split: str, kind: str | None) -> ClassificationSet | CaptionSet:
    if path.is_dir() and prepared_parts(path) is not None:
        return _with_templates(open_prepared(path, split=split, kind=kind))
    if path.is_dir() and is_webdataset(path):
        opened = open_webdataset(path, split=split)
        own = path / "zeroshot_classification_templates.txt"
        return opened if own.exists() else _with_templates(opened)
    annotations = find_annotations(path)
    if annotations is not None:
        return _annotated(annotations, name=str(path), split=split)
    if path.is_file():
        raise UsageError(f"{path} is no set of videos; expected a folder with {VIDEOS.expected}")
    if tars := _tars(path):
        folder = tars[0].parent
        raise UsageError(f"{folder} has tars and no index; write it with: unicl prepare {folder}")
    return open_class_folder(path, split=split, medium=VIDEOS)


def _with_templates(
    opened: ClassificationSet | CaptionSet,
) -> ClassificationSet | CaptionSet:
    if isinstance(opened, CaptionSet):
        return opened
    # The names of actions are often longer than the words that recipes put into templates.
    return replace(opened, templates=VIDEO_TEMPLATES, short_text_words=None)


def _annotated(
    annotations: Annotations, *, name: str, split: str
) -> ClassificationSet | CaptionSet:
    if isinstance(annotations, MsrVtt):
        return _msr_vtt(annotations, name=name, split=split)
    if isinstance(annotations, Kinetics):
        return _kinetics(annotations, name=name, split=split)
    return _listed(annotations, name=name, split=split)


def _kinetics(annotations: Kinetics, *, name: str, split: str) -> ClassificationSet:
    clips = annotations.read()
    # Of the test part its publisher keeps the classes: it cannot be tested on.
    labelled = [clip for clip in clips if clip.label] or clips
    split, splits = _choose(name, split, {clip.split for clip in labelled})
    files = find_videos(annotations.folder)
    labels = sorted({clip.label for clip in clips if clip.label})
    present = {clip.label for clip in clips if clip.stem in files}
    numbers = {label: number for number, label in enumerate(labels)}
    chosen = [clip for clip in clips if clip.split == split]
    found: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for clip in chosen:
        if not clip.label:
            skipped["no class"] += 1
        elif clip.stem not in files:
            skipped["missing file"] += 1
        else:
            # What lies in a folder of the split is that split's, should there be two.
            paths = files[clip.stem]
            path = min(paths, key=lambda path: split_of(os.path.dirname(path)) != split)
            if path in found:
                skipped["named twice"] += 1
            found.setdefault(path, numbers[clip.label])
    _require_any(found, [clip.stem for clip in chosen], skipped, name, annotations.folder)
    return ClassificationSet(
        name=name,
        split=split,
        splits=splits,
        images=ImageFiles(annotations.folder, list(found)),
        skipped=dict(skipped),
        class_names=tuple(class_name(label) for label in labels),
        empty_classes=tuple(label for label in labels if label not in present),
        templates=read_templates(annotations.folder / "templates.txt", VIDEO_TEMPLATES),
        targets=np.array(list(found.values()), np.int64),
        metric="top1",
    )


def _listed(annotations: VideoLists, *, name: str, split: str) -> ClassificationSet:
    split, splits = _choose(name, split, set(annotations.lists))
    path = annotations.lists[split]
    rows = annotations.read(split)
    names = _class_names(path.parent)
    beyond = next((number for _, number in rows if number >= len(names)), None)
    if beyond is not None:
        raise UsageError(
            f"{path} has a class {beyond}, but only 0 to {len(names) - 1} have a name beside it"
        )
    folder = _start(annotations.folder, split, [row for row, _ in rows])
    found = [row for row in rows if (folder / row[0]).is_file()]
    skipped = {"missing file": len(rows) - len(found)} if len(found) < len(rows) else {}
    _require_any(found, [row for row, _ in rows], skipped, name, annotations.folder)
    return ClassificationSet(
        name=name,
        split=split,
        splits=splits,
        images=ImageFiles(folder, [row for row, _ in found]),
        skipped=skipped,
        class_names=names,
        templates=read_templates(annotations.folder / "templates.txt", VIDEO_TEMPLATES),
        targets=np.array([number for _, number in found], np.int64),
        metric="top1",
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    for path in (folder / "classnames.txt", *sorted(folder.glob("label_map*.txt"))):
        names = read_class_names(path)
        if names:
            return tuple(class_name(name) for name in names)
    raise UsageError(
        f"{folder} lacks classnames.txt (or label_map_....txt) with a class name per line, in the "
        "order of the numbers in its lists"
    )


def _start(folder: Path, split: str, paths: Sequence[str]) -> Path:
    """Return the folder at which the paths of a list start, judged by the first hundred."""
    starts = [folder / name for name in ("", "videos", f"videos_{split}", split)]
    found = (start for start in starts if any((start / path).is_file() for path in paths[:100]))
    return next(found, folder)


def _msr_vtt(annotations: MsrVtt, *, name: str, split: str) -> CaptionSet:
    if split == "val" and split not in annotations.splits:
        raise UsageError(
            f"{name} has no val part, as 1k-A has none; write MSRVTT_val.csv with a column "
            "video_id beside the other tables, and its videos are kept out of train"
        )
    split = choose_split(name, split, annotations.splits)
    captions = annotations.read(split)
    files = find_videos(annotations.folder)
    found: dict[str, tuple[str, ...]] = {}
    skipped: Counter[str] = Counter()
    for video, texts in captions.items():
        if video not in files:
            skipped["missing file"] += 1
        elif not texts:
            skipped["no caption"] += 1
        else:
            found[files[video][0]] = texts
    _require_any(found, list(captions), skipped, name, annotations.folder)
    return CaptionSet(
        name=name,
        split=split,
        splits=annotations.splits,
        images=ImageFiles(annotations.folder, list(found)),
        skipped=dict(skipped),
        captions=tuple(found.values()),
    )


def _choose(name: str, split: str, found: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Return the split to open and all splits; a set that names none is one part."""
    splits = tuple(each for each in ("train", "val", "test") if each in found)
    if splits:
        return choose_split(name, split, splits), splits
    require_whole(name, split)
    return "", ()


def _require_any(
    found: Sized,
    named: Sequence[str],
    skipped: Mapping[str, int],
    name: str,
    folder: Path,
) -> None:
    if found:
        return
    if skipped.get("missing file"):
        raise UsageError(
            f"none of the {len(named)} videos of {name} is below {folder}, such as {named[0]}; put "
            "them there"
        )
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    raise UsageError(f"{name} holds no videos ({reasons or 'its annotations name none'})")
