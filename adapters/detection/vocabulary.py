"""One vocabulary for sets whose classes are called the same (Florence 2.4: FLOD-9M)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from adapters.detection.detection_set import Annotations
from unicl.data.hash_table import text_label
from unicl.data.sources import class_name


@runtime_checkable
class Named(Protocol):
    """What has classes with names, such as a set or a detector's configuration."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""


@dataclass(frozen=True)
class Vocabulary:
    """The classes of several sets, joined by name."""

    names: tuple[str, ...]
    """One name per class, as the first set that has it spells it."""
    numbers: tuple[Int64[np.ndarray, " _"], ...]
    """Of each set, the number here of each of its classes."""

    @staticmethod
    def join(sets: Sequence[Named]) -> "Vocabulary":
        """Join the classes of sets, in the order in which they come.

        Names are one if the text hash table gives them one label in lower case, `_` as a space:
        "Dog" of OpenImages and "dog" of COCO. A class without a name stays alone.
        """
        names: list[str] = []
        known: dict[int, int] = {}
        numbers = []
        for place, each in enumerate(sets):
            found = []
            for number, name in enumerate(map(class_name, each.class_names)):
                label = text_label(name.casefold(), f"{place}/{number}")
                found.append(known.setdefault(label, len(names)))
                if found[-1] == len(names):
                    names.append(name)
            numbers.append(np.array(found, np.int64))
        return Vocabulary(tuple(names), tuple(numbers))

    @staticmethod
    def of_objects(sets: Sequence[Named]) -> "Vocabulary":
        """Take the objects of all classes for one class."""
        numbers = tuple(np.zeros(len(each.class_names), np.int64) for each in sets)
        return Vocabulary(("object",), numbers)

    def judged(self, set_number: int, annotations: Annotations) -> Bool[np.ndarray, " classes"]:
        """Return which classes were looked for in an image of a set.

        They are those of the set, or where it says so of each image (LVIS, OpenImages), of those
        the image's. Of all others nobody knows whether they are there.
        """
        judged = np.zeros(len(self.names), bool)
        own = self.numbers[set_number]
        judged[own if annotations.judged is None else own[annotations.judged]] = True
        return judged
