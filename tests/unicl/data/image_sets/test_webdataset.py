import pickle
import sys
from importlib.util import find_spec
from io import BytesIO
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.unicl.data.image_sets.layouts import lines
from unicl.data.image_sets import CaptionSet, ClassificationSet, open_image_set
from unicl.errors import UniclError, UsageError

webdataset = pytest.importorskip("webdataset")

NAMES = ("cat", "dog", "crane", "crane")


def encoded(number):
    buffer = BytesIO()
    Image.new("RGB", (4, 3), (number * 20, 7, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, labels, extension, *, split="test", per_tar=3):
    """Write tars as `clip_benchmark_export_wds` does."""
    (folder / split).mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / split / "%d.tar"), maxcount=per_tar, verbose=0) as out:
        for number, label in enumerate(labels):
            out.write({"__key__": f"s{number:07d}", "png": encoded(number), extension: label})
        num_tars = out.shard
    lines(folder / split / "nshards.txt", [str(num_tars)])
    return folder


def classification(folder, labels=(0, 3, 1, 2, 2, 0, 1)):
    write(folder, labels, "cls")
    lines(folder / "classnames.txt", NAMES)
    lines(folder / "zeroshot_classification_templates.txt", ["a {c}.", "the {c}."])
    return folder


@pytest.fixture
def theirs(monkeypatch):
    """CLIP_benchmark's own reader of this layout."""
    if find_spec("clip_benchmark") is None:
        pytest.skip("clip_benchmark is not installed")
    if find_spec("requests") is None:  # It imports it for another data set's sake.
        monkeypatch.setitem(sys.modules, "requests", ModuleType("requests"))
    from clip_benchmark.datasets.builder import build_wds_dataset

    return lambda folder: build_wds_dataset("any", lambda image: image, data_dir=str(folder))


@pytest.mark.filterwarnings("ignore")
def test_classification_as_clip_benchmark_reads_it(tmp_path, theirs):
    folder = classification(tmp_path)
    opened = open_image_set(str(folder), root=tmp_path)
    expected = theirs(folder)
    pairs = list(expected)
    assert isinstance(opened, ClassificationSet)
    assert opened.num_samples == len(pairs) == 7
    assert opened.targets.tolist() == [label for _, label in pairs]
    assert list(opened.class_names) == expected.classes
    assert [text.replace("{}", "{c}") for text in opened.templates] == expected.templates
    for index, (image, _) in enumerate(pairs):
        assert Image.open(BytesIO(opened.read(index).image)).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("ignore")
def test_retrieval_as_clip_benchmark_reads_it(tmp_path, theirs):
    captions = (["a cat", "my cat, ünd more"], ["a dog"], ["x", "y", "z"], ["last"])
    write(tmp_path, ["\n".join(each) for each in captions], "txt")
    lines(tmp_path / "dataset_type.txt", ["retrieval"])
    opened = open_image_set(str(tmp_path), root=tmp_path)
    pairs = list(theirs(tmp_path))
    assert isinstance(opened, CaptionSet)
    assert [list(each) for each in opened.captions] == [each for _, each in pairs]
    assert [list(each) for each in opened.captions] == list(captions)


@pytest.mark.filterwarnings("ignore")
def test_several_classes_as_clip_benchmark_reads_them(tmp_path, theirs):
    labels = [np.array(row, np.float32) for row in ([1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0])]
    write(tmp_path, labels, "npy")
    lines(tmp_path / "classnames.txt", NAMES)
    lines(tmp_path / "dataset_type.txt", ["multilabel"])
    opened = open_image_set(str(tmp_path), root=tmp_path)
    assert np.array_equal(opened.targets, np.array(labels) > 0)
    assert opened.metric == "map"
    lines(tmp_path / "classnames.txt", NAMES[:3])
    with pytest.raises(UsageError, match=r"names 3 classes, but a label is of shape \(4,\)"):
        open_image_set(str(tmp_path), root=tmp_path)
    assert len(list(theirs(tmp_path))) == 3


def test_a_blank_line_is_no_class(tmp_path):
    folder = classification(tmp_path)
    lines(folder / "classnames.txt", [*NAMES, "", " "])
    assert open_image_set(str(folder), root=tmp_path).class_names == NAMES
    lines(folder / "classnames.txt", [*NAMES[:2], "", *NAMES[2:]])
    with pytest.raises(UsageError, match=r"classnames\.txt has no name in line 3"):
        open_image_set(str(folder), root=tmp_path)
    lines(folder / "classnames.txt", [""])
    with pytest.raises(UsageError, match=r"lacks classnames\.txt"):
        open_image_set(str(folder), root=tmp_path)


def test_samples_are_read_in_any_order_and_after_pickling(tmp_path):
    opened = open_image_set(str(classification(tmp_path)), root=tmp_path)
    copy = pickle.loads(pickle.dumps(opened))
    for index in (6, 0, 3, 2):
        for one in (opened, copy):
            sample = one.read(index)
            assert sample.image == encoded(index)
            assert (sample.key, sample.text) == (f"s{index:07d}", b"")
    assert opened.locate(4) == ("1.tar", 1)
    assert copy.fingerprint == opened.fingerprint
    assert opened.splits == ("test",)
    with pytest.raises(UsageError, match="has no split 'train'; it has test"):
        open_image_set(str(tmp_path), split="train", root=tmp_path)


def test_samples_without_a_label_are_left_out_and_counted(tmp_path):
    folder = classification(tmp_path)
    with webdataset.TarWriter(str(folder / "test/1.tar")) as out:
        out.write({"__key__": "a", "png": encoded(1)})
        out.write({"__key__": "b", "cls": 3})
        out.write({"__key__": "none", "png": encoded(4), "cls": b""})
        out.write({"__key__": "c", "webp": encoded(2), "cls": 3, "json": {}})
    opened = open_image_set(str(folder), root=tmp_path)
    assert opened.skipped == {"no label": 2, "no image": 1}
    assert opened.targets.tolist() == [0, 3, 1, 3, 1]
    assert [opened.read(index).key for index in range(5)][3] == "c"
    assert opened.locate(3) == ("1.tar", 3)


def test_damage_is_named(tmp_path):
    folder = classification(tmp_path)
    lines(folder / "classnames.txt", NAMES[:3])
    with pytest.raises(UsageError, match=r"classnames\.txt names 3 classes, but a label is 3"):
        open_image_set(str(folder), root=tmp_path)
    (folder / "classnames.txt").unlink()
    with pytest.raises(UsageError, match=r"lacks classnames\.txt"):
        open_image_set(str(folder), root=tmp_path)
    lines(folder / "classnames.txt", NAMES)
    tar = (folder / "test/0.tar").read_bytes()
    (folder / "test/0.tar").write_bytes(tar[:5000])
    with pytest.raises(UniclError, match=r"0\.tar is cut short"):
        open_image_set(str(folder), root=tmp_path)
    (folder / "test/0.tar").unlink()
    with pytest.raises(UniclError, match=r"cannot read .*0\.tar"):
        open_image_set(str(folder), root=tmp_path)
    lines(folder / "test/nshards.txt", ["many"])
    with pytest.raises(UniclError, match=r"nshards\.txt holds no number"):
        open_image_set(str(folder), root=tmp_path)
    lines(folder / "dataset_type.txt", ["video"])
    with pytest.raises(UsageError, match="says 'video', not classification or multilabel"):
        open_image_set(str(folder), root=tmp_path)


def test_no_pickled_label_is_opened(tmp_path):
    rows = BytesIO()
    np.save(rows, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write(tmp_path, [np.zeros(4, np.float32)], "npy")
    lines(tmp_path / "classnames.txt", NAMES)
    lines(tmp_path / "dataset_type.txt", ["multilabel"])
    with webdataset.TarWriter(str(tmp_path / "test/0.tar"), encoder=False) as out:
        out.write({"__key__": "a", "png": encoded(0), "npy": rows.getvalue()})
    with pytest.raises(UniclError, match=r"has a label that is no multilabel one: .*pickle"):
        open_image_set(str(tmp_path), root=tmp_path)
