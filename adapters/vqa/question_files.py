"""The JSON files that VQAv2 is published in: questions, and what people answered."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from unicl.errors import UniclError

_KINDS = {int: "whole number", str: "text", list: "list"}


class Asked(NamedTuple):
    """An entry of a file of questions."""

    question_id: int
    image_id: int
    text: str


class Annotation(NamedTuple):
    """An entry of a file of annotations."""

    question_id: int
    image_id: int
    question_type: str
    answer_type: str
    main_answer: str
    answers: tuple[str, ...]


Entry = TypeVar("Entry", Asked, Annotation)
Value = TypeVar("Value")


def read_questions(path: Path) -> list[Asked]:
    """Read a file of questions.

    Raises:
        UniclError: It cannot be read, or is damaged.
    """
    return _read(path, "questions", _asked)


def read_annotations(path: Path) -> list[Annotation]:
    """Read a file of annotations.

    Raises:
        UniclError: It cannot be read, or is damaged.
    """
    return _read(path, "annotations", _annotation)


def _read(path: Path, key: str, convert: Callable[[Path, dict[str, Any]], Entry]) -> list[Entry]:
    """Read the list under a key of a JSON file, each of whose entries has a question_id.

    They are converted while the file is parsed: as dicts VQAv2's answers would take 2 GiB.
    """

    def take(found: dict[str, Any]) -> Any:
        if "question_id" in found:
            return convert(path, found)
        answer = found.get("answer")
        return sys.intern(answer) if type(answer) is str else found

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=take)
    except OSError as error:
        raise UniclError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UniclError(f"{path} is no JSON, or damaged: {error}; unpack it again") from error
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UniclError(f"{path} has no list of {key}; expected an object as VQAv2's files are")
    for number, entry in enumerate(entries):
        if not isinstance(entry, tuple):  # which JSON has none of
            raise UniclError(f"{path}: entry {number} of {key} has no question_id")
    return entries


def _asked(path: Path, found: dict[str, Any]) -> Asked:
    return Asked(
        _question_id(path, found),
        _field(path, found, "image_id", int),
        _text(path, found, "question").strip(),
    )


def _annotation(path: Path, found: dict[str, Any]) -> Annotation:
    answers = _field(path, found, "answers", list)
    if not all(type(answer) is str for answer in answers):
        raise UniclError(
            f"{path}: the answers of question {found['question_id']!r} must be objects whose "
            "answer is a text"
        )
    return Annotation(
        _question_id(path, found),
        _field(path, found, "image_id", int),
        sys.intern(_text(path, found, "question_type")),
        sys.intern(_text(path, found, "answer_type")),
        sys.intern(_text(path, found, "multiple_choice_answer")),
        tuple(answers),
    )


def _question_id(path: Path, found: dict[str, Any]) -> int:
    number = _field(path, found, "question_id", int)
    if not -(2**63) <= number < 2**63:
        raise UniclError(f"{path}: question_id {number} has more than 64 bits; number it anew")
    return number


def _text(path: Path, found: dict[str, Any], key: str) -> str:
    text = _field(path, found, key, str)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates
        raise UniclError(
            f"{path}: {key} of question {found['question_id']!r} is no text: {text[:80]!a}"
        ) from error
    return text


def _field(path: Path, found: dict[str, Any], key: str, kind: type[Value]) -> Value:
    """Return the value of a key, of just the kind: JSON's `true` is no number."""
    value = found.get(key)
    if type(value) is not kind:
        fault = f"is no {_KINDS[kind]}: {str(value)[:80]!a}" if key in found else "is missing"
        raise UniclError(f"{path}: {key} of question {found['question_id']!r} {fault}")
    return value
