import os
import subprocess
import sys
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicl.data.hash_table import (
    COLLISIONS_FILE,
    TEXTS_FILE,
    TextHashTable,
    normalise,
    text_label,
)
from unicl.errors import UniclError

TEXTS = st.lists(st.text(max_size=8), max_size=60)


def test_label_is_what_it_was():
    # Runs and tables of earlier days rely on these numbers.
    digest = blake2b(b"a photo of a cat", digest_size=16).digest()
    assert int.from_bytes(digest[:8], "little", signed=True) == 6762350213917716847
    assert text_label("a photo of a cat", "key") == 6762350213917716847
    assert text_label("", "key") == -3724001473390595389


def test_label_is_the_same_in_another_process():
    code = "from unicl.data.hash_table import text_label; print(text_label('héllo wörld', 'k'))"
    for seed in ("0", "1234"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert int(output) == text_label("héllo wörld", "another key")


def test_texts_that_look_equal_have_one_label():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert text_label(composed, "1") == text_label(decomposed, "2")
    assert text_label(" a \t cat\n", "1") == text_label("a cat", "2")
    assert text_label("A cat", "1") != text_label("a cat", "1")


def test_empty_texts_have_labels_of_their_own():
    labels = {
        text_label("", "1"),
        text_label(" \n", "2"),
        text_label("1", "1"),
        text_label("1", "2"),
    }
    assert len(labels) == 3
    assert text_label("", "1") == text_label(" ", "1")


@given(st.text(), st.text(), st.text(max_size=3))
def test_labels_agree_exactly_when_normalised_texts_do(one, other, key):
    agree = normalise(one) == normalise(other)
    assert (text_label(one, key) == text_label(other, key)) == agree
    assert -(2**63) <= text_label(one, key) < 2**63
    assert normalise(normalise(one)) == normalise(one)


@given(TEXTS)
@settings(max_examples=50)
def test_narrow_labels_never_merge_different_texts(texts):
    table = TextHashTable(bits=8)
    labels = {}
    for number, text in enumerate(texts):
        identity = normalise(text) or number
        label = table.add(text, str(number))
        assert labels.setdefault(identity, label) == label
        assert -128 <= label < 128
    assert len(set(labels.values())) == len(labels)
    for number, text in enumerate(texts):
        assert table.label(text, str(number)) == labels[normalise(text) or number]
    assert table.num_samples == len(texts)


@given(texts=TEXTS)
@settings(max_examples=30)
def test_saved_table_answers_as_the_original(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("table")
    table = TextHashTable(bits=8)
    labels = [table.add(text, f"key\t{number}\n") for number, text in enumerate(texts)]
    table.save(folder)
    loaded = TextHashTable.load(folder, bits=8)
    assert [loaded.label(text, f"key\t{n}\n") for n, text in enumerate(texts)] == labels
    assert loaded.texts == table.texts
    assert loaded.summary() == table.summary()
    assert loaded.collisions == table.collisions
    assert [loaded.count(text) for text in texts] == [table.count(text) for text in texts]
    # Adding goes on where it stopped.
    assert [loaded.add(text, f"key\t{n}\n") for n, text in enumerate(texts)] == labels


def colliding_texts(bits):
    table = TextHashTable(bits=bits)
    owners = {}
    for number in range(1000):
        first = owners.setdefault(table.label(f"text {number}", ""), number)
        if first != number:
            return f"text {first}", f"text {number}"
    raise AssertionError("no collision")


def test_collision_is_separated_recorded_and_counted(tmp_path):
    first, second = colliding_texts(bits=8)
    table = TextHashTable(bits=8)
    assert table.label(first, "") == table.label(second, "")
    label = table.add(first, "1")
    moved = table.add(second, "2")
    assert moved != label
    assert table.add(second, "3") == moved
    assert table.collisions == {second: moved}
    table.save(tmp_path)
    loaded = TextHashTable.load(tmp_path, bits=8)
    assert (loaded.label(first, ""), loaded.label(second, "")) == (label, moved)
    assert second in (tmp_path / COLLISIONS_FILE).read_text("utf-8")
    assert (table.count(first), table.count(second)) == (1, 2)


def test_text_whose_label_a_moved_one_took_moves_too():
    table = TextHashTable(bits=3)
    labels = [table.add(f"text {number}", "") for number in range(8)]
    assert sorted(labels) == list(range(-4, 4))
    with pytest.raises(UniclError, match="8 texts do not fit"):
        table.add("one more", "")


def test_counts_and_order():
    table = TextHashTable()
    for number, text in enumerate(["b", "a", "c", "a", "", " ", "c  ", "a"]):
        table.add(text, str(number))
    assert table.texts == ("a", "c", "b")
    assert [table.count(text) for text in ("a", "b", "c", "d", "")] == [3, 1, 2, 0, 2]
    assert (table.num_samples, table.num_texts, table.num_empty) == (8, 3, 2)
    # Three samples with "a" and two with "c" share their text; the empty ones do not.
    assert table.num_shared == 5
    assert table.collisions == {}


def test_file_can_be_read_by_a_person(tmp_path):
    table = TextHashTable()
    table.add("grüne  Äpfel", "1")
    table.save(tmp_path)
    lines = (tmp_path / TEXTS_FILE).read_text("utf-8").splitlines()
    assert lines == ["label\tcount\ttext", f"{text_label('grüne Äpfel', '')}\t1\tgrüne Äpfel"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"label\tcount\ttext\n12\t",
        b"label\tcount\ttext\nx\t1\ta\n",
        b"label\tcount\n",
        b"\xff\n",
    ],
)
def test_damaged_file_is_named(tmp_path, damage):
    TextHashTable().save(tmp_path)
    (tmp_path / TEXTS_FILE).write_bytes(damage)
    with pytest.raises(UniclError, match=rf"{TEXTS_FILE}.* damaged; prepare") as caught:
        assert TextHashTable.load(tmp_path).texts
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    TextHashTable().save(tmp_path)
    (tmp_path / TEXTS_FILE).unlink()
    with pytest.raises(UniclError, match=TEXTS_FILE):
        TextHashTable.load(tmp_path)
