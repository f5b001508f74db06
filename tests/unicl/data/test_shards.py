import errno
import gc
import io
import json
import os
import pickle
import tarfile
from glob import glob
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset

from unicl.data.atomic import PARTIAL_PREFIX
from unicl.data.hash_table import text_label
from unicl.data.shards import SampleError, ShardSet, ShardWriter, index_shards
from unicl.errors import UniclError, UsageError

SAMPLES = [
    (f"class/{n:03d}", bytes([n]) * (100 + 77 * n), "png" if n % 2 else "jpg", f"täxt {n % 4}")
    for n in range(10)
]


def write(folder, samples=SAMPLES, **settings):
    with ShardWriter(folder, samples_per_shard=4, **settings) as writer:
        for sample in samples:
            writer.write(*sample)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def make_tar(path, members, **settings):
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_every_sample_comes_back_in_any_order(tmp_path):
    shards = ShardSet.open(write(tmp_path / "new" / "set", info={"credit": "me"}), strict=True)
    assert shards.num_samples == 10
    np.testing.assert_array_equal(shards.shard_sizes, [4, 4, 2])
    assert shards.shard_sizes.dtype == np.int64
    assert shards.info == {"credit": "me"}
    for index in (9, 0, 4, 3, 8, 7, 1, 2, 5, 6, 9):
        sample = shards.read(index)
        key, image, _, text = SAMPLES[index]
        assert (sample.key, sample.image, sample.text) == (key, image, text.encode())
    with pytest.raises(IndexError):
        shards.read(10)
    assert shards.locate(8) == ("shard-000002.tar", 0)
    assert shards.problems() == []


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same(tmp_path):
    write(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in read] == [key for key, *_ in SAMPLES]
    for sample, (_, image, extension, text) in zip(read, SAMPLES, strict=True):
        assert sample[extension] == image
        assert sample["txt"].decode() == text


def test_table_lies_beside_the_shards(tmp_path):
    table = ShardSet.open(write(tmp_path)).table()
    assert table.texts == ("täxt 0", "täxt 1", "täxt 2", "täxt 3")
    assert table.count("täxt 1") == 3
    assert table.label("täxt 1", "") == text_label("täxt 1", "")
    described = json.loads((tmp_path / "dataset.json").read_text("utf-8"))
    assert described["texts"]["num_texts"] == 4
    assert [shard["num_samples"] for shard in described["shards"]] == [4, 4, 2]


def test_same_samples_make_the_same_bytes(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    assert names(one) == names(other)
    for name in names(one):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_nothing_is_named_shard_before_it_is_whole(tmp_path):
    def interrupted():
        yield from SAMPLES[:6]
        assert names(tmp_path) == [
            f"{PARTIAL_PREFIX}shard-000001.tar",
            "shard-000000.index",
            "shard-000000.tar",
        ]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted())
    assert names(tmp_path) == ["shard-000000.index", "shard-000000.tar"]
    with pytest.raises(UsageError, match=r"has no dataset\.json; make such a folder with: "):
        ShardSet.open(tmp_path)


def test_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UniclError, match=r"000000\.tar: No space left .* free space") as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_failed_write_is_one_line(tmp_path):
    def refuse(data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    writer = ShardWriter(tmp_path)
    writer.write(*SAMPLES[0])
    writer._stream = SimpleNamespace(write=refuse)
    with pytest.raises(UniclError, match=r"cannot write .*000000\.tar: Read-only"):
        writer.write(*SAMPLES[1])
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UniclError, match=r"cannot write .*file/set: Not a directory"):
        ShardWriter(tmp_path / "file" / "set")


def test_finished_shards_are_not_overwritten(tmp_path):
    write(tmp_path)
    before = (tmp_path / "shard-000000.tar").read_bytes()
    with pytest.raises(UsageError, match="holds shards already; remove it or choose another"):
        ShardWriter(tmp_path)
    assert (tmp_path / "shard-000000.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "extension", "message"),
    [
        ("a.b", "jpg", "has a dot"),
        ("", "jpg", "is empty"),
        ("folder.1/", "jpg", "is empty"),
        ("a\0", "jpg", "is empty or"),
        ("a", "txt", "extension 'txt' of 'a' is not one of: jpg"),
        ("x" * 300, "jpg", "too long"),
    ],
)
def test_key_that_webdataset_could_not_read(tmp_path, key, extension, message):
    writer = ShardWriter(tmp_path)
    with pytest.raises(UsageError, match=message):
        writer.write(key, b"", extension, "text")
    assert names(tmp_path) == []


def test_neighbours_must_differ(tmp_path):
    with pytest.raises(UsageError, match="two neighbouring samples are called 'class/000'"):
        write(tmp_path, SAMPLES[:1] * 2)
    assert names(tmp_path) == []


def test_truncated_tar_loses_only_what_is_gone(tmp_path):
    shards = ShardSet.open(write(tmp_path))
    # Within the third of four samples of the middle shard.
    places = [shards._load_index(1)[row] for row in range(4)]
    truncate(tmp_path / "shard-000001.tar", places[2].image[0] + 5)
    shards = ShardSet.open(tmp_path)
    for index in (6, 7):
        with pytest.raises(
            SampleError, match=r"000001\.tar ends before sample 'class/00"
        ) as caught:
            shards.read(index)
        assert caught.value.reason == "truncated tar"
    for index in (0, 1, 2, 3, 4, 5, 8, 9):
        assert shards.read(index).image == SAMPLES[index][1]
    assert len(shards.problems()) == 1
    with pytest.raises(UniclError, match=r"000001\.tar has .* \(1 of 3 shards are damaged\)"):
        ShardSet.open(tmp_path, strict=True)


def test_missing_tar_is_named(tmp_path):
    (write(tmp_path) / "shard-000001.tar").unlink()
    with pytest.raises(UniclError, match=r"lacks shard-000001\.tar \(1 of 3 tars are missing\)"):
        ShardSet.open(tmp_path)


def test_tar_that_vanishes_fails_its_samples(tmp_path):
    shards = ShardSet.open(write(tmp_path))
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(SampleError, match="No such file") as caught:
        shards.read(5)
    assert caught.value.reason == "unreadable tar"
    assert shards.read(9).key == "class/009"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "other", "gone", "pickle"])
def test_damaged_index_fails_its_samples_only(tmp_path, damage):
    path = write(tmp_path) / "shard-000000.index"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "pickle":
        with open(path, "wb") as file:
            np.savez(file, keys=np.array([print], dtype=object))
    else:
        half = len(whole) // 2
        path.write_bytes(
            {
                "empty": b"",
                "text": b"no index",
                "cut": whole[:half],
                "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
                "other": (tmp_path / "shard-000002.index").read_bytes(),
            }[damage]
        )
    shards = ShardSet.open(tmp_path)
    with pytest.raises(SampleError, match=r"000000\.index .* again$") as caught:
        shards.read(0)
    assert caught.value.reason == ("missing index" if damage == "gone" else "damaged index")
    assert shards.read(4).key == "class/004"
    with pytest.raises(UniclError, match=r"000000\.index"):
        ShardSet.open(tmp_path, strict=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "shards": [1], "info": {}}', "\xff"]
)
def test_damaged_description_is_one_line(tmp_path, text):
    (write(tmp_path) / "dataset.json").write_text(text, "latin-1")
    with pytest.raises(UniclError, match=r"dataset\.json is damaged; prepare") as caught:
        ShardSet.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_version_is_refused(tmp_path):
    path = write(tmp_path) / "dataset.json"
    path.write_text(path.read_text("utf-8").replace('"version": 1', '"version": 2'), "utf-8")
    with pytest.raises(UniclError, match="another version"):
        ShardSet.open(tmp_path)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="missing is no folder; make it with: unicl prepare"):
        ShardSet.open(tmp_path / "missing")
    write(tmp_path / "train")
    with pytest.raises(UsageError, match=r"did you mean .*/train\?"):
        ShardSet.open(tmp_path)


def test_empty_set_is_refused(tmp_path):
    write(tmp_path, samples=[])
    with pytest.raises(UniclError, match="holds no samples"):
        ShardSet.open(tmp_path)


def test_set_travels_to_other_processes(tmp_path):
    shards = ShardSet.open(write(tmp_path))
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(7) == shards.read(7)
    assert pickle.loads(pickle.dumps(SampleError("reason", "message"))).reason == "reason"
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        os._exit(0 if shards.read(1).image == SAMPLES[1][1] else 1)
    if child is not None:
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_few_files_stay_open_however_many_shards(tmp_path, monkeypatch):
    def open_tars():
        files = [os.path.realpath(entry) for entry in glob("/proc/self/fd/*")]
        return [os.path.basename(file) for file in files if file.startswith(str(tmp_path))]

    monkeypatch.setattr("unicl.data.shards._OPEN_SHARDS", 1)
    shards = ShardSet.open(write(tmp_path))
    assert open_tars() == []
    assert [shards.read(index).key for index in range(10)] == [key for key, *_ in SAMPLES]
    assert open_tars() == ["shard-000002.tar"]
    del shards
    gc.collect()
    assert open_tars() == []


FOREIGN = [
    ("b/1.jpg", b"image 1"),
    ("b/1.json", b"{}"),
    ("b/1.txt", b"text 1"),
    ("2.txt", b"text without image"),
    ("3.jpeg", b"image without text"),
    ("4.cls", b"7"),
    ("5.TXT", b"\xff"),
    ("5.seg.png", b"no picture of the sample"),
    ("5.webp", b"image 5"),
]


def test_foreign_tars_are_indexed_where_they_lie(tmp_path):
    make_tar(tmp_path / "z.tar", [("9.png", b"nine"), ("9.txt", b"text 1")])
    make_tar(tmp_path / "a.tar", FOREIGN, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"})
    make_tar(tmp_path / "m.tar", [])
    long = "folder/" * 40
    make_tar(tmp_path / "n.tar", [(f"{long}0.jpg", b"long")], format=tarfile.GNU_FORMAT)
    seen = []
    index_shards(tmp_path, progress=lambda done, total: seen.append((done, total)))
    shards = ShardSet.open(tmp_path, strict=True)
    np.testing.assert_array_equal(shards.shard_sizes, [5, 0, 1, 1])
    read = [shards.read(index) for index in range(7)]
    assert [(sample.key, sample.image, sample.text) for sample in read] == [
        ("b/1", b"image 1", b"text 1"),
        ("2", b"", b"text without image"),
        ("3", b"image without text", None),
        ("4", b"", None),
        ("5", b"image 5", b"\xff"),
        (f"{long}0", b"long", None),
        ("9", b"nine", b"text 1"),
    ]
    assert shards.table().texts == ("text 1",)
    assert shards.info["truncated"] == []
    assert shards.info["skipped"] == {"no text": 3, "no image": 1, "text is not UTF-8": 1}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("members", [[("readme.md", b"hello")], [("1.jpg", b"one")], []])
def test_tars_without_any_pair_are_refused(tmp_path, members):
    make_tar(tmp_path / "a.tar", members)
    with pytest.raises(UniclError, match="no sample with an image and a text"):
        index_shards(tmp_path)
    assert "dataset.json" not in names(tmp_path)


def test_our_shards_can_be_indexed_again(tmp_path):
    write(tmp_path)
    index = (tmp_path / "shard-000001.index").read_bytes()
    for path in tmp_path.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    index_shards(tmp_path)
    assert (tmp_path / "shard-000001.index").read_bytes() == index


@pytest.mark.parametrize("damage", ["cut in data", "cut in header", "noise"])
def test_damaged_foreign_tar_keeps_what_is_before(tmp_path, damage):
    path = tmp_path / "a.tar"
    make_tar(path, [(f"{n}.{kind}", b"x" * 600) for n in range(3) for kind in ("jpg", "txt")])
    # A member takes 512 + 1024 bytes, a sample twice that.
    if damage == "noise":
        with open(path, "r+b") as file:
            file.seek(2 * 3072)
            file.write(b"noise" * 300)
    else:
        truncate(path, 2 * 3072 + (512 + 100 if damage == "cut in data" else 100))
    index_shards(tmp_path)
    shards = ShardSet.open(tmp_path)
    assert shards.info["truncated"] == ["a.tar"]
    assert [shards.read(index).key for index in range(2)] == ["0", "1"]
    if damage == "cut in data":
        with pytest.raises(SampleError, match="ends before sample '2'"):
            shards.read(2)
    else:
        assert shards.num_samples == 2


def test_what_is_no_tar_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"has no \*\.tar to index"):
        index_shards(tmp_path)
    make_tar(tmp_path / "a.tar", FOREIGN)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar")
    with pytest.raises(UniclError, match=r"b\.tar is not an uncompressed tar"):
        index_shards(tmp_path)
