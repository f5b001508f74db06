from pathlib import Path

import numpy as np

from adapters.detection.detection_set import Annotations, DetectionSet, ListedFiles
from adapters.detection.vocabulary import Vocabulary


def named(names):
    """Return a set of one image without objects."""
    return DetectionSet(
        name="it",
        split="",
        class_names=names,
        category_ids=tuple(range(len(names))),
        files=ListedFiles(Path("nowhere"), ["a.jpg"]),
        image_ids=np.array([1]),
        sizes=np.zeros((1, 2), np.int32),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int32),
        crowd=np.zeros(0, bool),
        offsets=np.zeros(2, np.int64),
        where=Path("nowhere"),
    )


def joined(*names):
    return Vocabulary.join([named(each) for each in names])


def annotations(judged=None):
    judged = None if judged is None else np.array(judged, np.int32)
    empty = np.zeros(0, np.int32)
    return Annotations(np.zeros((0, 4), np.float32), empty, empty.astype(bool), judged)


def test_join():
    found = joined(
        ("person", "dog"), ("Dog", "aerosol_can", "Person"), ("aerosol  can", "dog house")
    )
    assert found.names == ("person", "dog", "aerosol can", "dog house")
    assert [each.tolist() for each in found.numbers] == [[0, 1], [1, 2, 0], [2, 3]]


def test_names_that_a_person_cannot_tell_apart():
    assert joined(("\u00e9t\u00e9",), ("e\u0301te\u0301",)).names == ("\u00e9t\u00e9",)
    assert joined(
        ("bat_(animal)", "bat"),
    ).names == ("bat (animal)", "bat")
    assert joined(("", ""), ("",)).names == ("", "", "")
    assert joined(
        ("a", "A"),
    ).numbers[0].tolist() == [0, 0]


def test_judged():
    found = joined(("person", "dog"), ("Dog", "cup", "Person"))
    assert found.judged(0, annotations()).tolist() == [True, True, False]
    assert found.judged(1, annotations()).tolist() == [True, True, True]
    assert found.judged(1, annotations([1, 2])).tolist() == [True, False, True]
    assert found.judged(1, annotations([])).tolist() == [False, False, False]
