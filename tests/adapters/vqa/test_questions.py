import json
import logging
import os
import pickle

import numpy as np
import pytest

from adapters.vqa.questions import open_question_set
from tests.adapters.vqa.layouts import (
    TEN,
    annotate,
    ask,
    own_part,
    picture,
    vqav2_part,
    write,
    write_annotations,
    write_questions,
)
from unicl.data.image_sets import MissingSetError
from unicl.errors import UniclError, UsageError


def opened(folder, split="val"):
    return open_question_set(str(folder), split=split, root=folder)


@pytest.fixture
def vqav2(tmp_path):
    folder = tmp_path / "vqav2"
    vqav2_part(folder, "train", [9, 25])
    vqav2_part(folder, "val", range(40, 52))
    vqav2_part(folder, "test", [1, 16], annotated=False, year="test2015")
    vqav2_part(folder, "test", [16], annotated=False, year="test-dev2015")
    return tmp_path


def test_parts_as_published(vqav2):
    train = open_question_set("vqav2", split="train", root=vqav2)
    assert (train.name, train.split, str(train)) == ("vqav2", "train", "vqav2 (train)")
    assert train.images.names == [f"train2014/COCO_train2014_{n:012d}.jpg" for n in (9, 25)]
    assert train.question_ids.tolist() == [9000, 9001, 25000, 25001]
    assert train.rows.tolist() == [0, 0, 1, 1]
    assert train.questions[2] == "Is this 25000?"
    assert train.answers == (TEN,) * 4
    assert train.main_answers == ("red",) * 4
    assert (train.question_types[0], train.answer_types[0]) == ("what", "other")
    assert train.num_questions == 4
    assert train.annotated
    assert train.skipped == {}
    assert train.images.read(0).image[:2] == b"\xff\xd8"


def test_both_parts_of_the_test_share_a_folder_and_have_no_answers(vqav2):
    test = open_question_set("vqav2", split="test", root=vqav2)
    dev = open_question_set("vqav2", split="test-dev", root=vqav2)
    assert (test.num_questions, dev.num_questions) == (4, 2)
    assert dev.images.names == ["test2015/COCO_test2015_000000000016.jpg"]
    assert not dev.annotated
    assert dev.answers == ((), ())
    assert dev.main_answers == dev.question_types == dev.answer_types == ("", "")


def test_trainval_and_minival_share_no_image(vqav2):
    trainval = open_question_set("vqav2", split="trainval", root=vqav2)
    minival = open_question_set("vqav2", split="minival", root=vqav2)
    # A quarter of the twelve images of val.
    assert (minival.images.num_samples, minival.num_questions) == (3, 6)
    assert (trainval.images.num_samples, trainval.num_questions) == (2 + 9, 4 + 18)
    assert not set(trainval.images.names) & set(minival.images.names)
    both = np.concatenate((trainval.question_ids, minival.question_ids))
    assert len(set(both.tolist())) == 4 + 24
    assert trainval.split == "trainval"
    names = np.array(trainval.images.names)[trainval.rows]
    assert all(f"{n // 1000:012d}.jpg" in name for n, name in zip(both, names, strict=False))


def test_minival_does_not_depend_on_order_or_files(tmp_path):
    images = list(range(100, 140))
    vqav2_part(tmp_path / "a", "val", images)
    vqav2_part(tmp_path / "b", "val", images[::-1], each=1)
    one, two = (opened(tmp_path / name, "minival") for name in "ab")
    assert sorted(one.images.names) == sorted(two.images.names)
    assert sorted(one.images.names) != [f"val2014/COCO_val2014_{n:012d}.jpg" for n in images[:10]]
    lost = one.images.names[0]
    (tmp_path / "a" / lost).unlink()
    again = opened(tmp_path / "a", "minival")
    assert sorted([*again.images.names, lost]) == sorted(one.images.names)
    assert again.skipped == {"no image": 2}


@pytest.mark.parametrize(("images", "kept"), [(1, 1), (7, 1), (8, 2), (1999, 499), (2000, 1000)])
def test_how_many_images_are_kept(tmp_path, images, kept):
    (tmp_path / "val2014").mkdir()
    for number in range(images):
        (tmp_path / f"val2014/{number}.jpg").touch()
    write_questions(tmp_path / "val_questions.json", [ask(n, n) for n in range(images)])
    assert opened(tmp_path, "minival").images.num_samples == kept


def test_an_image_kept_to_measure_is_not_trained_on_in_the_other_part(tmp_path):
    numbers = range(1, 9)
    pairs = [(number, number) for number in numbers]
    for part in ("train", "val"):
        questions, annotations = [ask(*p) for p in pairs], [annotate(*p) for p in pairs]
        own_part(tmp_path, questions, annotations, images=numbers, part=part)
    trainval, minival = opened(tmp_path, "trainval"), opened(tmp_path, "minival")
    assert minival.images.num_samples == 2
    assert trainval.images.num_samples == 6
    assert trainval.num_questions == 12
    assert not set(trainval.images.names) & set(minival.images.names)


def test_trainval_needs_both_annotated(tmp_path):
    vqav2_part(tmp_path, "train", [1], annotated=False)
    vqav2_part(tmp_path, "val", [2, 3])
    with pytest.raises(UsageError, match=r"\(trainval\) needs annotations of both train and val"):
        opened(tmp_path, "trainval")


def test_splits_that_are_not_there(tmp_path, caplog):
    vqav2_part(tmp_path, "val", [1, 2])
    with caplog.at_level(logging.INFO, "unicl"):
        assert opened(tmp_path, "test").split == "val"
    assert "has no test part, its val is taken" in caplog.text
    for split in ("train", "trainval", "test-dev", "dev"):
        with pytest.raises(UsageError, match=rf"no split '{split}'; it has val, minival$"):
            opened(tmp_path, split)


def test_a_folder_without_parts(tmp_path):
    write_questions(tmp_path / "my questions.json", [ask(1, 7)])
    write_annotations(tmp_path / "my annotations 2014.json", [annotate(1, 7)])
    picture(tmp_path / "photos/summer/IMG_3_0007b.PNG")
    found = opened(tmp_path, "test")
    assert (found.split, found.images.names) == ("", ["photos/summer/IMG_3_0007b.PNG"])
    assert found.annotated
    assert str(found) == str(tmp_path)
    with pytest.raises(UsageError, match="its files name no part"):
        opened(tmp_path, "minival")


def test_a_file_without_a_part_beside_those_of_parts_is_passed_over(tmp_path, caplog):
    own_part(tmp_path, [ask(1, 1)])
    write_questions(tmp_path / "all_questions.json", [ask(1, 1), ask(2, 1)])
    assert opened(tmp_path).num_questions == 1
    assert "all_questions.json is of no part and is passed over" in caplog.text


def test_files_in_folders(tmp_path):
    # As VQA's own tools have them, and by the names of the folders.
    write_questions(tmp_path / "Questions/v2_OpenEnded_val2014_questions.json", [ask(1, 1)])
    write_annotations(tmp_path / "Annotations/v2_val2014_annotations.json", [annotate(1, 1)])
    write_questions(tmp_path / "train/questions.json", [ask(2, 2)])
    write_annotations(tmp_path / "train/annotations.json", [annotate(2, 2)])
    write(tmp_path / "Questions/._val2014_questions.json", "hidden")
    picture(tmp_path / "Images/mscoco/val2014/COCO_val2014_000000000001.jpg")
    picture(tmp_path / "Images/mscoco/val2014/._COCO_val2014_000000000001.jpg")
    picture(tmp_path / "Images/.cache/val2014/1.jpg")
    picture(tmp_path / "train/2.jpg")
    assert opened(tmp_path).answers == (TEN,)
    assert opened(tmp_path, "train").images.names == ["train/2.jpg"]


def test_two_files_of_one_part(tmp_path):
    own_part(tmp_path, [ask(1, 1)])
    write_questions(tmp_path / "validation_questions.json", [ask(1, 1)])
    with pytest.raises(UsageError, match=r"val_questions.* and .*validation_questions.* part val"):
        opened(tmp_path)


def test_the_folder_of_the_part_goes_first(tmp_path):
    own_part(tmp_path, [ask(1, 1), ask(2, 2), ask(3, 3)], images=(1, 2))
    picture(tmp_path / "val2014/COCO_val2014_000000000001.jpg")
    for number in (1, 3):
        picture(tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg")
    found = opened(tmp_path)
    assert found.images.names == ["val2014/COCO_val2014_000000000001.jpg", "images/2.png"]
    assert found.skipped == {"no image": 1}


def test_two_images_of_one_number(tmp_path):
    own_part(tmp_path, [ask(1, 1)])
    picture(tmp_path / "more/image_2.jpg")
    assert opened(tmp_path).num_questions == 1
    picture(tmp_path / "more/image_0001.jpg")
    message = r"images/1\.png and more/image_0001\.jpg may be image 1 of question 1"
    with pytest.raises(UsageError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("questions", "annotations", "reason"),
    [
        ([ask(2, 3)], [annotate(2, 3)], "no image"),
        ([ask(2, 2)], [], "no annotation"),
        ([ask(2, 2)], [annotate(2, 2, ())], "no answers"),
        ([ask(2, 2, " \n")], [annotate(2, 2)], "no question"),
        ([ask(1, 2)], [], "repeated question"),
        ([ask(2, 2)], [annotate(2, 1)], "other image"),
        ([], [annotate(2, 2)], "annotation without question"),
        ([], [annotate(1, 1, ("blue",))], "repeated annotation"),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, caplog, questions, annotations, reason):
    own_part(tmp_path, [ask(1, 1), *questions], [annotate(1, 1), *annotations])
    found = opened(tmp_path)
    assert found.skipped == {reason: 1}
    assert found.question_ids.tolist() == [1]
    assert found.answers == (TEN,)
    assert found.images.names == ["images/1.png"]
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"(val): questions or annotations are left out ({reason}: 1)"
    )


def test_nothing_is_left(tmp_path):
    own_part(tmp_path, [ask(1, 3), ask(2, 3), ask(3, 1, "")])
    with pytest.raises(UsageError, match=r"\(no image: 2, no question: 1\); its images belong"):
        opened(tmp_path)
    write_questions(tmp_path / "val_questions.json", [])
    with pytest.raises(UsageError, match=r"no question that can be used \(it is empty\)"):
        opened(tmp_path)


def test_sets_that_are_not_there(tmp_path):
    for _ in range(2):
        with pytest.raises(MissingSetError, match=r"vqav2 needs its .*visualqa\.org"):
            open_question_set("vqav2", split="val", root=tmp_path)
        (tmp_path / "vqav2").mkdir(exist_ok=True)
    with pytest.raises(UsageError, match="there is no folder 'vqa2' of questions"):
        open_question_set("vqa2", split="val", root=tmp_path)
    with pytest.raises(UsageError, match="has no questions; expected JSON"):
        opened(tmp_path)


def test_a_digest_changes_with_images_questions_and_answers(tmp_path):
    def digest(text="Why?", answers=TEN, main="red"):
        own_part(tmp_path, [ask(1, 1, text)], [annotate(1, 1, answers, main)], images=())
        return opened(tmp_path).digest()

    picture(tmp_path / "images/1.png")
    first = digest()
    assert digest() == first
    others = {
        digest("Who?"),
        digest(answers=("\ud800",)),
        digest(answers=TEN[1:]),
        digest(main="blue"),
    }
    os.utime(tmp_path / "images/1.png", (1, 1))
    assert len({first, *others, digest()}) == 6


def test_it_can_be_pickled(tmp_path):
    found = opened(own_part(tmp_path, [ask(1, 1)], [annotate(1, 1)]))
    again = pickle.loads(pickle.dumps(found))
    assert (again.questions, again.digest()) == (found.questions, found.digest())


WRONG = (
    None,
    True,
    1.5,
    "text",
    7,
    [],
    {},
    [7],
    [{"answer": 7}],
    [{}],
    ["yes", None],
    2**63,
    "\ud800",
)


def damaged():
    for entry, kind in ((ask(5, 1), "questions"), (annotate(5, 1), "annotations")):
        for key in entry:
            yield kind, key, {each: entry[each] for each in entry if each != key}
            for wrong in WRONG:
                if not fits(key, wrong):
                    yield kind, key, {**entry, key: wrong}


def fits(key, value):
    if key.endswith("_id"):
        return value == 7 or (key == "image_id" and value == 2**63)
    return value == [] if key == "answers" else value == "text"


@pytest.mark.parametrize(("kind", "key", "entry"), list(damaged()))
def test_a_damaged_entry_is_one_line(tmp_path, kind, key, entry):
    own_part(tmp_path, [ask(4, 1), ask(5, 1)], [annotate(4, 1), annotate(5, 1)])
    path = tmp_path / f"val_{kind}.json"
    content = json.loads(path.read_text())
    content[kind][1] = entry
    write(path, content)
    with pytest.raises(UniclError) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"val_{kind}.json" in message
    assert key.removesuffix("s") in message
    # Each names the question; where that is what is missing, its place.
    name = ascii(entry["question_id"]) if "question_id" in entry else "entry 1"
    assert name in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"[]",
        b"7",
        b"null",
        b'{"questions": {}}',
        b'{"questions": [7]}',
        b'{"questions": [null]}',
        b'{"questions": [[]]}',
        b'{"questions": ["a"]}',
        b'{"annotations": []}',
        b'{"question_id": 1}',
        b'{"question_id": 1, "image_id": 1, "question": "?"}',
        b'{"answer": "questions"}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    own_part(tmp_path, [ask(1, 1)])
    (tmp_path / "val_questions.json").write_bytes(content)
    with pytest.raises(UniclError, match=r"val_questions\.json") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    own_part(tmp_path, [ask(1, 1)])
    (tmp_path / "val_questions.json").unlink()
    (tmp_path / "val_questions.json").mkdir()
    with pytest.raises(UniclError, match=r"cannot read .*val_questions\.json: Is a directory"):
        opened(tmp_path)


def test_answers_may_be_plain_texts(tmp_path):
    own_part(tmp_path, [ask(1, 1)], [{**annotate(1, 1), "answers": ["red", "blue"]}])
    assert opened(tmp_path).answers == (("red", "blue"),)
