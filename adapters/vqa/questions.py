"""Sets of questions about images, in the files of VQAv2 (Florence 3.7).

Of VQAv2's train and val together Florence keeps 1,000 images of val to measure on: these are
`minival`, all others `trainval`.
"""

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from adapters.vqa.question_files import Annotation, Asked, read_annotations, read_questions
from unicl.data.image_sets.image_set import MissingSetError, choose_split
from unicl.data.image_sets.images import ImageFiles
from unicl.data.shard_index import IMAGE_EXTENSIONS
from unicl.errors import UsageError

logger = logging.getLogger("unicl")

KNOWN_SET = "vqav2"
_ORIGIN = "https://visualqa.org/download.html"
_KEPT_IMAGES = 1000
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "testdev": "test-dev",
}
_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_LAST_DIGITS = re.compile(r"([0-9]+)[^0-9]*$")


@dataclass(frozen=True)
class QuestionSet:
    """Questions about images, and what people answered."""

    name: str
    """What it was opened by: a known name or a folder."""
    split: str
    """Which part of it this is; empty for a folder without parts."""
    images: ImageFiles
    """The images that are asked about, each once."""
    questions: tuple[str, ...]
    """Texts of the questions."""
    question_ids: Int64[np.ndarray, " num_questions"]
    """Their published numbers, each once; in `trainval`, once of either part."""
    rows: Int64[np.ndarray, " num_questions"]
    """Row of each question's image in `images`."""
    answers: tuple[tuple[str, ...], ...]
    """People's answers to each question, ten in VQAv2; () where none are published."""
    main_answers: tuple[str, ...]
    """The answer that most of them gave (`multiple_choice_answer`); empty without answers."""
    question_types: tuple[str, ...]
    """What the questions begin with, such as `how many`; empty without answers."""
    answer_types: tuple[str, ...]
    """`yes/no`, `number` or `other`; empty without answers."""
    skipped: Mapping[str, int]
    """What was left out, counted by reason."""

    def __str__(self) -> str:
        return _title(self.name, self.split)

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def annotated(self) -> bool:
        """Whether people's answers are published; they are for all questions or for none."""
        return any(self.answers)

    def digest(self) -> str:
        """Return hexadecimal digits that change with the images, questions or answers.

        Raises:
            UniclError: Images are missing.
        """
        digest = blake2b(self.images.digest().encode(), digest_size=16)
        digest.update(self.question_ids.tobytes() + self.rows.tobytes())
        # JSON, since any separator could be in a text.
        digest.update(json.dumps((self.questions, self.answers, self.main_answers)).encode())
        return digest.hexdigest()


class _Row(NamedTuple):
    """A question that can be used."""

    asked: Asked
    image: str
    """Path below the folder of the set."""
    annotation: Annotation | None


def open_question_set(spec: str, *, split: str, root: Path) -> QuestionSet:
    """Open one part of a set of questions.

    The files are VQAv2's, in the folder or in folders in it: JSON of questions and of annotations,
    each called so and by its part. In a folder of one's own they may have any such names, as
    `val_questions.json`; where one file of questions names no part, it is the whole set, whatever
    part is asked for. Images lie anywhere below the folder, best in one named like the part
    (`val2014`), and are found by the last digits of their names: `COCO_val2014_000000000042.jpg` is
    number 42.

    Args:
        spec: `vqav2`, or a folder; one that is itself called so is `./vqav2`.
        split: `train`, `val`, `test-dev` or `test`; where there is no `test` it is `val`. Or
            `minival`, the questions about 1,000 images of val (a quarter of them if it has fewer
            than 2,000), and `trainval`, those of train and val about other images.
        root: Where `vqav2` lies.

    Raises:
        MissingSetError: The known set is not there.
        UsageError: There is no such set or part, two files are of one part or image, or no
            question can be used.
        UniclError: A file is damaged.
    """
    folder = _locate(spec, root)
    parts = _find_parts(folder, spec)
    chosen = _choose(spec, split, tuple(parts))
    if chosen not in (split, ""):
        logger.info("%s has no %s part, its %s is taken", spec, split, chosen)
    skipped: Counter[str] = Counter()
    rows = _gather(parts, chosen, _list_images(folder), skipped)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
    title = _title(spec, chosen)
    if not rows:
        raise UsageError(
            f"{title} has no question that can be used ({reasons or 'it is empty'}); its images "
            f"belong below {folder}"
        )
    if len({row.annotation is None for row in rows}) > 1:
        raise UsageError(f"{title} needs annotations of both train and val in {folder}")
    if skipped:
        logger.warning("%s: questions or annotations are left out (%s)", title, reasons)
    return _build(rows, folder, name=spec, split=chosen, skipped=skipped)


def _title(name: str, split: str) -> str:
    return f"{name} ({split})" if split else name


def _build(
    rows: list[_Row], folder: Path, *, name: str, split: str, skipped: Mapping[str, int]
) -> QuestionSet:
    numbers: dict[str, int] = {}
    image_rows = [numbers.setdefault(row.image, len(numbers)) for row in rows]
    nothing = Annotation(0, 0, "", "", "", ())
    annotations = [row.annotation or nothing for row in rows]
    return QuestionSet(
        name=name,
        split=split,
        images=ImageFiles(folder, list(numbers)),
        questions=tuple(row.asked.text for row in rows),
        question_ids=np.array([row.asked.question_id for row in rows], np.int64),
        rows=np.array(image_rows, np.int64),
        answers=tuple(each.answers for each in annotations),
        main_answers=tuple(each.main_answer for each in annotations),
        question_types=tuple(each.question_type for each in annotations),
        answer_types=tuple(each.answer_type for each in annotations),
        skipped=dict(skipped),
    )


def _locate(spec: str, root: Path) -> Path:
    if spec == KNOWN_SET:
        if not (root / spec).is_dir():
            raise _missing(root / spec)
        return root / spec
    if spec and Path(spec).is_dir():
        return Path(spec)
    raise UsageError(f"there is no folder {spec!r} of questions, and no known set but {KNOWN_SET}")


def _missing(folder: Path) -> MissingSetError:
    return MissingSetError(
        f"{KNOWN_SET} needs its questions, annotations and images in {folder}; fetch VQA v2.0 by "
        f"hand from {_ORIGIN}"
    )


class _Files(NamedTuple):
    """The JSON files of a part."""

    questions: Path
    annotations: Path | None


def _part_of(name: str) -> str:
    """Return the part that a file or folder is called after; empty if none."""
    words = re.findall("[a-z]+", name.lower())
    for word, following in pairwise([*words, ""]):
        if part := _PARTS.get(word):
            return "test-dev" if (part, following) == ("test", "dev") else part
    return ""


def _find_parts(folder: Path, name: str) -> dict[str, _Files]:
    """Return the files of each part; the only key is empty where they name no part."""
    paths = sorted(
        path
        for path in (*folder.glob("*.json"), *folder.glob("*/*.json"))
        if not path.name.startswith(".")
    )
    annotations = _by_part(folder, paths, "annotation")
    taken = set(annotations.values())
    questions = _by_part(folder, (path for path in paths if path not in taken), "question")
    if not questions:
        if name == KNOWN_SET:
            raise _missing(folder)
        raise UsageError(
            f"{folder} has no questions; expected JSON files as VQAv2's, such as "
            "val_questions.json and val_annotations.json"
        )
    if len(questions) > 1 and "" in questions:
        logger.warning("%s is of no part and is passed over", questions.pop(""))
    if "" in questions and len(annotations) == 1:
        annotations = {"": next(iter(annotations.values()))}
    return {part: _Files(path, annotations.get(part)) for part, path in questions.items()}


def _by_part(folder: Path, paths: Iterable[Path], word: str) -> dict[str, Path]:
    """Return the files whose names contain a word, by part."""
    found: dict[str, Path] = {}
    for path in paths:
        if word not in path.name.lower():
            continue
        part = _part_of(path.name)
        if not part and path.parent != folder:
            part = _part_of(path.parent.name)
        other = found.setdefault(part, path)
        if other != path:
            raise UsageError(
                f"{other} and {path} are both files of {word}s of "
                f"{f'the part {part}' if part else 'no named part'}; keep one, or name their parts"
            )
    return found


def _choose(name: str, split: str, parts: tuple[str, ...]) -> str:
    if parts == ("",):
        if split in ("trainval", "minival"):
            raise UsageError(
                f"{name} has no split {split!r}: its files name no part; call them after train "
                "and val"
            )
        return ""
    made = {"trainval": {"train", "val"}, "minival": {"val"}}
    more = [each for each, needed in made.items() if needed.issubset(parts)]
    return choose_split(name, split, (*parts, *more))


def _gather(
    parts: Mapping[str, _Files],
    split: str,
    listed: list[tuple[str, str]],
    skipped: Counter[str],
) -> list[_Row]:
    """Return the questions of a split, of `listed` images: the part and path of each."""

    def load(part: str) -> _Part:
        return _Part.load(parts[part], _images_of(part, listed))

    if split in parts:
        return load(split).rows(lambda _: True, skipped)
    val = load("val")
    kept = _kept_images(asked.image_id for asked in val.asked)
    if split == "minival":
        return val.rows(kept.__contains__, skipped)
    # Where parts share a folder of images, train may ask about the same image.
    paths = {path for image_id in kept for path in val.images.get(image_id, ())}
    train = load("train")
    rows = train.rows(lambda each: paths.isdisjoint(train.images.get(each, ())), skipped)
    return rows + val.rows(lambda each: each not in kept, skipped)


def _kept_images(image_ids: Iterable[int]) -> set[int]:
    """Choose the images of val to measure on, by hashes, so that order and files do not matter."""
    different = set(image_ids)
    few = len(different) < 2 * _KEPT_IMAGES
    count = max(len(different) // 4, 1) if few else _KEPT_IMAGES

    def hashed(image_id: int) -> bytes:
        return blake2b(b"%d" % image_id, digest_size=16).digest()

    return set(sorted(different, key=hashed)[:count])


@dataclass(frozen=True)
class _Part:
    """A part as its files have it."""

    asked: list[Asked]
    annotations: dict[int, Annotation] | None
    """By question; None without a file of them."""
    images: Mapping[int, list[str]]
    """Paths by the number of an image, to which one should belong."""
    unused: Counter[str]
    """Annotations that belong to no question, by reason."""

    @staticmethod
    def load(files: _Files, images: Mapping[int, list[str]]) -> "_Part":
        asked = read_questions(files.questions)
        if files.annotations is None:
            return _Part(asked, None, images, Counter())
        annotations: dict[int, Annotation] = {}
        known = {each.question_id for each in asked}
        unused: Counter[str] = Counter()
        for each in read_annotations(files.annotations):
            if each.question_id not in known:
                unused["annotation without question"] += 1
            elif annotations.setdefault(each.question_id, each) is not each:
                unused["repeated annotation"] += 1
        return _Part(asked, annotations, images, unused)

    def rows(self, chosen: Callable[[int], bool], skipped: Counter[str]) -> list[_Row]:
        """Return the questions about the images chosen, and count those that cannot be used."""
        rows = []
        seen: set[int] = set()
        skipped.update(self.unused)
        for asked in self.asked:
            if not chosen(asked.image_id):
                continue
            row = _Row(asked, self._image(asked), self._annotation(asked))
            reason = "repeated question" if asked.question_id in seen else self._fault(row)
            seen.add(asked.question_id)
            if reason:
                skipped[reason] += 1
            else:
                rows.append(row)
        return rows

    def _image(self, asked: Asked) -> str:
        paths = self.images.get(asked.image_id, ())
        if len(paths) > 1:
            raise UsageError(
                f"both {paths[0]} and {paths[1]} may be image {asked.image_id} of question "
                f"{asked.question_id}; remove or rename one"
            )
        return paths[0] if paths else ""

    def _annotation(self, asked: Asked) -> Annotation | None:
        return self.annotations.get(asked.question_id) if self.annotations is not None else None

    def _fault(self, row: _Row) -> str:
        """Say why a question cannot be used; empty if it can."""
        if not row.asked.text:
            return "no question"
        if not row.image:
            return "no image"
        if self.annotations is None:
            return ""
        if row.annotation is None:
            return "no annotation"
        if row.annotation.image_id != row.asked.image_id:
            return "other image"
        return "" if row.annotation.answers else "no answers"


def _list_images(folder: Path) -> list[tuple[str, str]]:
    """Return each image below a folder: the part that it lies in, if any, and its path."""
    listed = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(place).relative_to(folder)
        part = next(filter(None, map(_part_of, reversed(inner.parts))), "")
        listed += [(part, str(inner / name)) for name in sorted(names) if _is_image(name)]
    return listed


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _images_of(split: str, listed: list[tuple[str, str]]) -> Mapping[int, list[str]]:
    """Return the paths of a part's images by their numbers."""
    # The two parts of VQAv2's test share one folder.
    place = split.removesuffix("-dev")
    own = _by_number(path for part, path in listed if part.removesuffix("-dev") == place)
    if not place:
        return _by_number(path for _, path in listed)
    # Another part's folder may have another image of that number.
    return _by_number(path for part, path in listed if not part) | own


def _by_number(paths: Iterable[str]) -> dict[int, list[str]]:
    found: defaultdict[int, list[str]] = defaultdict(list)
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        if match := _LAST_DIGITS.search(stem):
            found[int(match[1])].append(path)
    return dict(found)
