import csv
from collections import Counter
from itertools import pairwise

import pytest
from PIL import Image

from unicl.data.sources import (
    ClassFolder,
    Entry,
    SkippedEntry,
    Source,
    Table,
    image_type,
    open_source,
)
from unicl.errors import UniclError, UsageError


def picture(path, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), "red").save(path, kind)
    return path.read_bytes()


def table(path, *rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def split(source):
    entries = list(source.entries(""))
    good = [entry for entry in entries if isinstance(entry, Entry)]
    return good, Counter(e.reason for e in entries if isinstance(e, SkippedEntry))


def test_class_folder(tmp_path):
    image = picture(tmp_path / "golden_retriever" / "a.1.png")
    picture(tmp_path / "cat" / "deeper" / "b.png", "JPEG")
    picture(tmp_path / "cat" / "ü ß.webp", "WEBP")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".DS_Store").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.md").write_text("")
    source = open_source(str(tmp_path))
    assert isinstance(source, Source)
    good, skipped = split(source)
    assert {(e.text, e.extension) for e in good} == {
        ("golden retriever", "png"),
        ("cat", "jpg"),
        ("cat", "webp"),
    }
    assert skipped == {"not an image": 1}
    assert source.num_entries("") == 4
    assert source.info["classes"] == ["cat", "golden retriever"]
    dog = next(entry for entry in good if entry.text != "cat")
    assert dog.image == image, "the bytes are kept as they were"
    assert dog.key.endswith("-a_1")
    assert len({entry.key for entry in good}) == 3
    assert all("." not in entry.key and entry.key.isascii() for entry in good)


def test_classes_are_mixed_in_a_fixed_order(tmp_path):
    for number in range(40):
        picture(tmp_path / f"class_{number % 2}" / f"{number:02d}.png")
    first, again = (split(ClassFolder(tmp_path))[0] for _ in range(2))
    assert first == again
    texts = [entry.text for entry in first]
    assert sum(one != other for one, other in pairwise(texts)) > 8


@pytest.mark.parametrize(
    ("columns", "delimiter"),
    [(("image", "caption"), ","), (("Title", "id", "filepath"), "\t"), (("path", "text"), ",")],
)
def test_table_finds_its_columns(tmp_path, columns, delimiter):
    image = picture(tmp_path / "images" / "1.jpg", "JPEG")
    values = {"id": "7", **dict.fromkeys(("image", "filepath", "path"), "images/1.jpg")}
    row = [values.get(column, "two words, one comma") for column in columns]
    suffix = ".tsv" if delimiter == "\t" else ".csv"
    path = table(tmp_path / f"table{suffix}", columns, row, delimiter=delimiter)
    good, skipped = split(open_source(str(path)))
    assert good == [Entry("00000000-1", image, "jpg", "two words, one comma")]
    assert not skipped


def test_named_columns_win(tmp_path):
    picture(tmp_path / "a.png")
    path = table(tmp_path / "t.csv", ("image", "caption", "Label"), ("x.png", "wrong", "cat"))
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow(("a.png", "wrong", "dog"))
    good, skipped = split(open_source(str(path), text_column="label"))
    assert [entry.text for entry in good] == ["dog"]
    assert skipped == {"missing file": 1}


def test_absolute_paths_and_byte_order_mark(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "t").mkdir()
    path = tmp_path / "t" / "t.csv"
    path.write_text(f"image,caption\n{tmp_path / 'elsewhere' / 'a.png'},cat\n", "utf-8-sig")
    assert [entry.text for entry in split(Table(path))[0]] == ["cat"]


def test_bad_rows_are_skipped_and_counted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    rows = [
        b"image,caption",
        b"a.png,good",
        b"a.png,caf\xe9",
        b"a.png,",
        b"a.png, \t ",
        b"missing.png,text",
        b"text.png,text",
        b"empty.png,text",
        b"folder.png,text",
        b"a\0.png,text",
        b"a.png",
        b"a.png,a red, round thing",
        b"a.png,good,,",
        b'a.png,"so" it is said',
        b'a.png,"in two',
        b'lines" it is said',
        b"",
        "a.png,grün".encode(),
    ]
    path = tmp_path / "t.csv"
    path.write_bytes(b"\n".join(rows))
    good, skipped = split(Table(path))
    assert [entry.text for entry in good] == ["good", "good", "grün"]
    assert skipped == {
        "text is not UTF-8": 1,
        "no text": 2,
        "missing file": 1,
        "not an image": 2,
        "unreadable file": 2,
        "row too short": 1,
        "row too long": 1,
        "malformed row": 2,
    }
    where = [entry.where for entry in Table(path).entries("") if isinstance(entry, SkippedEntry)]
    assert where[0] == "line 3: a.png"


def test_missing_column_names_those_there_are(tmp_path):
    path = table(tmp_path / "t.csv", ("url", "caption"), ("a", "b"))
    with pytest.raises(
        UsageError, match=r"no column image or .* it has url, caption: name the image col"
    ):
        open_source(str(path))
    with pytest.raises(UsageError, match=r"no column name; .*: name the text column"):
        open_source(str(path), image_column="url", text_column="name")
    with pytest.raises(UsageError, match="the column url cannot be image and text"):
        open_source(str(path), image_column="url", text_column="url")
    with pytest.raises(UsageError, match="columns are named for a"):
        open_source(str(tmp_path), image_column="url")


def test_what_is_no_source(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "quotes.csv").write_text('image,"te"xt\n')
    (tmp_path / "utf16.csv").write_text("image,caption\na.png,cat\n", "utf-16")
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.tar").touch()
    (tmp_path / "folder").mkdir()
    for spec, message in [
        ("missing", "does not exist; give a folder"),
        ("empty.csv", "is empty; expected a header"),
        ("utf16.csv", "is no table in UTF-8 text"),
        ("quotes.csv", "the header of .* is malformed"),
        ("a.tar", r"of tars, give the folder"),
        ("a.txt", r"is no folder, \.csv or \.tsv"),
        ("folder", "has no images; expected .*/CLASS_NAME/IMAGE"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            open_source(str(tmp_path / spec))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["b", "x" * 99 + "\n" + "x" * (1 << 24)])
def test_a_quote_that_never_closes_swallows_no_rows(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(f'image,caption\na.png,good\na.png,"{text}\n' + "a.png,good\n" * 3)
    with pytest.raises(UniclError, match=r"t\.csv: the row from line 3 on does not end: "):
        list(Table(path).entries(""))


def test_a_header_may_hold_any_text(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "t.csv"
    path.write_text('"of\u00a0whom\tand\nwhat",image,caption\nme,a.png,cat\n')
    assert [entry.text for entry in split(Table(path))[0]] == ["cat"]


def test_blank_lines_do_not_count(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "t.csv"
    path.write_text('\n\nimage,caption\n\na.png,"two\nlines"\n\nmissing.png,cat\n')
    good, missing = Table(path).entries("")
    assert good.text == "two\nlines"
    assert missing.where == "line 8: missing.png"


@pytest.mark.parametrize(
    ("kind", "extension"),
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("WEBP", "webp"),
        ("PPM", "ppm"),
    ],
)
def test_type_of_an_image_is_what_its_bytes_say(tmp_path, kind, extension):
    assert image_type(picture(tmp_path / "image.jpg", kind)) == extension
    assert image_type(b"text") is None
