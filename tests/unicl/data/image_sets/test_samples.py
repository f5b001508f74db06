import io
import itertools
import logging
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.video.sets import open_video_samples
from tests.adapters.video.layouts import files, lines, msr_vtt
from unicl.build import TextSamples
from unicl.data.augment import TrainTransform
from unicl.data.hash_table import text_label
from unicl.data.image_sets import ClassificationSet
from unicl.data.image_sets.images import ImageFiles
from unicl.data.image_sets.samples import Numbered, SetSamples
from unicl.data.image_sets.source import SetSource
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prepare import prepare
from unicl.data.prompts import PromptSampler
from unicl.data.reader import ImageDecoder
from unicl.data.shards import SampleError, ShardSet
from unicl.errors import UniclError, UsageError


def picture(path, shade):
    """A file that is called a video; what is in it does not matter here, and shards take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("L", (2, 2), shade).save(file, "PNG")
    path.write_bytes(file.getvalue())


@pytest.fixture
def captioned(tmp_path):
    captions = {f"video{number}": [f"{number}", "both", f"{number} c"] for number in range(4)}
    captions["video2"] = ["alone"]
    msr_vtt(tmp_path, captions, {"video3": "three"}, train_9k="video2 video1 video0 video7")
    for number in range(4):
        picture(tmp_path / f"all/video{number}.mp4", number)
    return tmp_path


def texts(samples):
    return [samples.read(index).text.decode() for index in range(samples.num_samples)]


def test_a_sample_per_caption(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    assert isinstance(samples, TextSamples)
    assert texts(samples) == ["alone", "1", "both", "1 c", "0", "both", "0 c"]
    assert [samples.locate(index)[0] for index in (0, 3, 4)] == [
        f"all/video{number}.mp4" for number in (2, 1, 0)
    ]
    for index in range(samples.num_samples):
        sample = samples.read(index)
        assert sample.key == samples.locate(index)[0]
        assert sample.image == (captioned / sample.key).read_bytes()
    assert samples.shard_sizes.tolist() == [7]
    for index in (-1, 7):
        with pytest.raises(IndexError):
            samples.read(index)


def test_a_sample_per_video_of_a_class(tmp_path):
    files(tmp_path, ["train/ice_skating/1.mp4", "train/archery/2.mp4", "test/yoga/3.mp4"])
    samples = open_video_samples(str(tmp_path), split="train", root=tmp_path)
    assert texts(samples) == ["archery", "ice skating"]
    assert samples.label(0, "archery", "") == text_label("archery", "")
    assert samples.table().texts == ("archery", "ice skating")
    (tmp_path / "train/archery/2.mp4").unlink()
    with pytest.raises(SampleError, match="is not in"):
        samples.read(0)


def test_a_set_without_parts_is_trained_on_as_a_whole(tmp_path):
    files(tmp_path, ["a/1.mp4", "b/2.mp4"])
    assert texts(open_video_samples(str(tmp_path), split="train", root=tmp_path)) == ["a", "b"]
    files(tmp_path / "parts", ["val/a/1.mp4", "test/b/2.mp4"])
    with pytest.raises(UsageError, match="no split 'train'"):
        open_video_samples(str(tmp_path / "parts"), split="train", root=tmp_path)


def test_samples_are_those_of_shards_of_the_set(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    prepare(SetSource({"": samples.images}), captioned / "shards")
    shards = ShardSet.open(captioned / "shards")
    assert samples.num_samples == shards.num_samples
    for index in range(shards.num_samples):
        own, theirs = samples.read(index), shards.read(index)
        assert (own.image, own.text) == (theirs.image, theirs.text)
        text = own.text.decode()
        assert samples.label(index, text, own.key) == shards.label(index, text, theirs.key)
    own, theirs = samples.table(), shards.table()
    assert own.texts == theirs.texts
    assert [own.count(text) for text in own.texts] == [theirs.count(text) for text in theirs.texts]


def test_all_samples_are_shuffled_with_each_other(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    order = SampleOrder(samples.shard_sizes, seed=1, window=1)
    epochs = [order.indices(epoch * 7, 7).tolist() for epoch in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert {epoch[0] for epoch in epochs} == set(range(7))


def test_a_process_of_its_own_reads_the_same(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    copy = pickle.loads(pickle.dumps(samples))
    assert [copy.read(index) for index in range(7)] == [samples.read(index) for index in range(7)]
    assert copy.label(2, "both", "") == samples.label(2, "both", "")


def tokenize(texts):
    return torch.tensor([[len(text)] for text in texts])


def make_loader(samples, *, num_workers=0, max_skipped_share=0.5):
    return Loader(
        samples,
        SampleOrder(samples.shard_sizes, seed=5, window=1),
        decode=ImageDecoder(TrainTransform(4, flip=True), 100),
        tokenize=tokenize,
        prompts=PromptSampler("simple", short_text_words=2, seed=5),
        batch_size=3,
        num_workers=num_workers,
        seed=5,
        max_skipped_share=max_skipped_share,
    )


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(one, two):
    assert (one.keys, one.texts, one.consumed, one.skipped) == (
        two.keys,
        two.texts,
        two.consumed,
        two.skipped,
    )
    for name in ("images", "tokens", "labels"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_where_it_stopped(captioned, num_workers):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    whole = take(make_loader(samples), 5)
    again = take(make_loader(samples, num_workers=num_workers), 5)
    later = take(make_loader(samples, num_workers=num_workers), 2, start=whole[2].consumed)
    for one, two in zip(whole + whole[3:], again + later, strict=True):
        same(one, two)
    seen = [text for batch in whole for text in batch.texts][:7]
    assert sorted(seen) == sorted(texts(samples))


def test_defects_are_counted_and_named(captioned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    (captioned / "all/video1.mp4").unlink()
    (captioned / "all/video2.mp4").write_bytes(b"no video")
    batches = list(make_loader(samples, max_skipped_share=1.0).epoch())
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    assert skipped == {"missing file": 3, "undecodable image": 1}
    assert Counter(key for batch in batches for key in batch.keys) == {"all/video0.mp4": 3}
    assert "3 of them in all/video1.mp4, such as sample number" in caplog.messages[-1]
    with pytest.raises(UniclError, match="4 of 7 samples were skipped"):
        list(make_loader(samples).epoch())


def test_the_digest_is_of_files_and_texts(captioned, tmp_path_factory):
    def digest(folder):
        return open_video_samples(str(folder), split="train", root=folder).digest()

    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(captioned, copy, dirs_exist_ok=True)
    picture(copy / "all/video0.mp4", 99)  # neither contents nor times are looked at
    before = digest(captioned)
    assert digest(copy) == before
    (copy / "all/video1.mp4").rename(copy / "all/video9.mp4")
    without = digest(copy)
    data = captioned / "MSRVTT_data.json"
    data.write_text(data.read_text().replace("alone", "lonely"))
    assert len({before, without, digest(captioned)}) == 3


def test_what_the_set_lacks_is_told(captioned, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)
    open_video_samples(str(captioned), split="train", root=captioned)
    assert f"{captioned} (train) has 3 of its videos (missing file: 1)" in caplog.messages


def test_several_classes_of_a_video_are_refused(tmp_path):
    files(tmp_path, ["1.mp4"])
    several = ClassificationSet(
        name="several",
        split="",
        splits=(),
        images=ImageFiles(tmp_path, ["1.mp4"]),
        class_names=("a", "b"),
        templates=("{}",),
        targets=np.ones((1, 2), np.bool_),
        metric="map",
    )
    with pytest.raises(UsageError, match="needs one class per sample; several has several"):
        SetSamples(several)


def test_texts_that_only_look_different_share_a_label(tmp_path):
    lines(tmp_path / "train.txt", "a.mp4 0", "b.mp4 1")
    lines(tmp_path / "classnames.txt", "ice skating", "ice  skating")
    files(tmp_path, ["a.mp4", "b.mp4"])
    samples = open_video_samples(str(tmp_path), split="train", root=tmp_path)
    labels = [samples.label(index, text, "") for index, text in enumerate(texts(samples))]
    assert labels[0] == labels[1]
    assert samples.table().num_texts == 1


def test_numbered_samples_are_the_same_but_for_their_labels(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    numbered = Numbered(samples)
    assert numbered.num_samples == samples.num_samples
    assert numbered.shard_sizes.tolist() == samples.shard_sizes.tolist()
    assert numbered.digest() == samples.digest()
    for index in range(samples.num_samples):
        assert numbered.read(index) == samples.read(index)
        assert numbered.locate(index) == samples.locate(index)
        assert numbered.label(index, "both", "key") == index
        silent = Numbered(samples, texts=False).read(index)
        assert (silent.image, silent.text) == (samples.read(index).image, b"")


def test_a_sample_knows_all_texts_of_its_file(captioned):
    samples = open_video_samples(str(captioned), split="train", root=captioned)
    for index, text in enumerate(texts(samples)):
        assert text in samples.texts_of(index)
    assert {len(samples.texts_of(index)) for index in range(samples.num_samples)} == {1, 3}
