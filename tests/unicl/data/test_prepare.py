import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.unicl.data.test_sources import picture
from unicl.cli import main
from unicl.data.prepare import is_finished, prepare
from unicl.data.shards import ShardSet
from unicl.data.sources import Entry, SkippedEntry
from unicl.errors import UniclError, UsageError


class Letters:
    """Two splits of a few samples, with something to skip."""

    name = "letters"
    splits = ("train", "test")

    def __init__(self, fail_at=None):
        self.info = {"credit": "nobody"}
        self.fail_at = fail_at
        self.closed = 0

    def num_entries(self, split):
        return 120 if split == "train" else 20

    def entries(self, split):
        try:
            for number in range(self.num_entries(split)):
                if (split, number) == self.fail_at:
                    raise KeyboardInterrupt
                if number % 10 == 9:
                    yield SkippedEntry("no text", f"row {number}")
                else:
                    yield Entry(f"{number:03d}", b"\xff\xd8\xff", "jpg", "ab"[number % 2])
        finally:
            self.closed += 1


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def class_folder(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 9, 9)).save(folder / name / f"{number}.png")
    return folder


def test_splits_get_folders_of_their_own(tmp_path):
    seen = []
    out = tmp_path / "new" / "out"
    progress = seen.append
    prepared = prepare(
        Letters(), out, samples_per_shard=50, progress=lambda done, total: progress((done, total))
    )
    assert (prepared.num_samples, prepared.num_texts) == (126, 2)
    assert prepared.skipped == {"no text": 14}
    assert prepared.examples == {"no text": "row 9"}
    assert prepared.folders == {"train": out / "train", "test": out / "test"}
    assert str(prepared).endswith("; skipped 14: no text (first: row 9)")
    train = ShardSet.open(out / "train", strict=True)
    assert train.shard_sizes.tolist() == [50, 50, 8]
    assert train.info == {"credit": "nobody", "split": "train", "skipped": {"no text": 12}}
    assert ShardSet.open(out / "test").num_samples == 18
    assert seen == [(100, 140), (140, 140)]
    assert is_finished(out)


def test_class_folder_and_csv(tmp_path):
    source = class_folder(tmp_path / "images")
    prepared = prepare(source, tmp_path / "out")
    assert (prepared.num_samples, prepared.num_texts) == (6, 2)
    shards = ShardSet.open(prepared.folders[""])
    originals = {path.read_bytes() for path in source.glob("*/*.png")}
    assert {shards.read(index).image for index in range(6)} == originals
    assert is_finished(tmp_path / "out")
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nimages/cat/0.png,a cat\nimages/cat/1.png,a cat\n")
    prepared = prepare(str(table), tmp_path / "csv")
    assert (prepared.num_samples, prepared.num_texts) == (2, 1)
    assert ShardSet.open(tmp_path / "csv").table().num_shared == 2


def test_tars_are_indexed_in_place(tmp_path):
    prepare(Letters(), tmp_path / "out", samples_per_shard=50)
    folder = tmp_path / "out" / "train"
    with pytest.raises(UsageError, match="is prepared already"):
        prepare(folder, None)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    with pytest.raises(UsageError, match="indexed in place, without --out"):
        prepare(str(folder), tmp_path / "other")
    prepared = prepare(str(folder), None)
    assert (prepared.num_samples, prepared.num_texts, prepared.folders) == (108, 2, {"": folder})
    assert ShardSet.open(folder, strict=True).table().num_shared == 108


def test_what_is_there_is_never_touched(tmp_path):
    prepare(Letters(), tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(UsageError, match="out is already there; remove it or choose another --out"):
        prepare(Letters(), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-000000.tar").write_text("precious")
    with pytest.raises(UsageError, match="already there"):
        prepare(Letters(), tmp_path / "mine")
    with pytest.raises(UsageError, match="is a file"):
        prepare(Letters(), tmp_path / "mine" / "shard-000000.tar")
    assert files(tmp_path) == ["mine/shard-000000.tar", *before]
    with pytest.raises(UsageError, match="name a folder with --out"):
        prepare(Letters(), None)


def test_shards_among_the_images_are_refused(tmp_path):
    picture(tmp_path / "photos" / "cat" / "a.png")
    for out in (tmp_path / "photos", tmp_path / "photos" / "shards"):
        with pytest.raises(UsageError, match=r"lies inside .*photos, among the images"):
            prepare(tmp_path / "photos", out)
    prepared = prepare(tmp_path / "photos", tmp_path / "photos" / ".." / "photos-shards")
    assert str(prepared).startswith("1 sample with 1 different text in ")
    with pytest.raises(UsageError, match="the source is empty"):
        prepare("", tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        prepare("missing", tmp_path / "missing" / "out")


def test_columns_of_a_table_can_be_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.tsv").write_text("name\tfile\ncat\ta.png\n")
    words = ["prepare", str(tmp_path / "t.tsv"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert main([*words, "--image-column", "file", "--text-column", "name"]) == 0
    assert ShardSet.open(tmp_path / "out").table().texts == ("cat",)


@pytest.mark.parametrize("fail_at", [("train", 0), ("train", 105), ("test", 5)])
def test_interrupted_preparation_leaves_nothing(tmp_path, fail_at):
    source = Letters(fail_at)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", samples_per_shard=50)
    assert not (tmp_path / "out").exists()
    assert source.closed == 1 + (fail_at[0] == "test")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    source = Letters()
    with pytest.raises(
        UniclError, match=r"cannot write .*: No space left on device; free"
    ) as caught:
        prepare(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert source.closed == 1, "a source's processes are ended at once"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UniclError, match=r"cannot write .*: Permission denied"):
        prepare(Letters(), tmp_path / "out")


def test_folder_that_refuses_is_one_line(tmp_path, monkeypatch):
    def mkdir(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    with pytest.raises(UniclError, match=r"cannot write .*: Read-only file system; choose another"):
        prepare(Letters(), tmp_path / "out")


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\nb.png,\nc.png,y\n")
    message = (
        r"none of the 3 entries of .*t\.csv can be used; 2: missing file \(first: line 2: a\.png\)"
    )
    with pytest.raises(UniclError, match=message):
        prepare(tmp_path / "t.csv", tmp_path / "out")
    (tmp_path / "t.csv").write_text("image,caption\n")
    with pytest.raises(UniclError, match="has no entries"):
        prepare(tmp_path / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from pathlib import Path
from tests.unicl.data.test_prepare import Letters
from unicl.data.prepare import prepare
class Slow(Letters):
    def entries(self, split):
        for entry in super().entries(split):
            if split == "test":
                Path(sys.argv[2]).touch()
                time.sleep(60)
            yield entry
prepare(Slow(), Path(sys.argv[1]), samples_per_shard=50)
"""


TERMINATED = """
import sys
import unicl.data.prepare
from pathlib import Path
from tests.unicl.data.test_prepare import Letters
from unicl.cli import main
from time import sleep
class Slow(Letters):
    def entries(self, split):
        yield from super().entries(split)
        Path(sys.argv[2]).touch()
        sleep(60)
unicl.data.prepare.open_source = lambda spec, **columns: Slow()
sys.exit(main(["prepare", "letters", "--out", sys.argv[1]]))
"""


def test_terminated_preparation_leaves_nothing(tmp_path):
    out, signpost = tmp_path / "out", tmp_path / "signpost"
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(out), str(signpost)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 30
    while not signpost.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert b"interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert not out.exists()


def test_killed_preparation_starts_afresh_in_its_folder(tmp_path):
    out, signpost = tmp_path / "out", tmp_path / "signpost"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(signpost)])
    deadline = time.monotonic() + 30
    while not signpost.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "train/shard-000001.tar" in files(out)
    assert not is_finished(out)
    assert prepare(Letters(), out).num_samples == 126
    assert is_finished(out)
    assert ShardSet.open(out / "train", strict=True).shard_sizes.tolist() == [108]
