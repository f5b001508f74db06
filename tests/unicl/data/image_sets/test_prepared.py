import pytest

from tests.unicl.corpus import COLOURS, png, write_corpus
from unicl.data.image_sets import CaptionSet, ClassificationSet, open_image_set
from unicl.data.shards import ShardSet, ShardWriter
from unicl.errors import UniclError, UsageError


def opened(folder, kind=None, split="test"):
    return open_image_set(str(folder), split=split, root=folder, kind=kind)


def test_texts_are_the_classes(tmp_path):
    folder = write_corpus(tmp_path / "squares", num_samples=40)
    found = opened(folder, "classes")
    assert isinstance(found, ClassificationSet)
    assert found.class_names == tuple(sorted(f"{name} square" for name in COLOURS))
    shards = ShardSet.open(folder)
    for index, number in enumerate(found.targets.tolist()):
        sample = shards.read(index)
        assert found.class_names[number] == sample.text.decode()
        assert found.read(index).image == sample.image
        assert found.read(index).text == b""
        assert found.locate(index) == shards.locate(index)
    assert (found.split, found.splits) == ("", ())
    with pytest.raises(UsageError, match="is one part"):
        opened(folder, split="val")


def test_equal_images_are_one_with_several_captions(tmp_path):
    rows = [("red", 0, "a red one"), ("blue", 1, "blue"), ("red", 0, "red  again"), ("red", 2, "x")]
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number, (colour, seed, text) in enumerate(rows):
            writer.write(f"{number}", png(colour, seed), "png", text)
        writer.write("empty", png("black", 0), "png", "")
    found = opened(tmp_path)
    assert isinstance(found, CaptionSet), "a set that was not made of classes has captions"
    assert found.captions == (("a red one", "red again"), ("blue",), ("x",))
    assert [found.read(index).key for index in range(3)] == ["0", "1", "3"]
    assert found.locate(2) == ("shard-000001.tar", 1)
    assert found.skipped == {"no text": 1}
    classes = opened(tmp_path, "classes")
    assert classes.num_samples == 4
    assert classes.skipped == {"no text": 1}


def test_parts_share_their_classes(tmp_path):
    for part, texts in (("train", "abc"), ("held_out", "db")):
        with ShardWriter(tmp_path / part, info={"classes": ["a"]}) as writer:
            for number, text in enumerate(texts):
                writer.write(f"{number}", png("red", number), "png", text)
    found = opened(tmp_path, split="held_out")
    assert isinstance(found, ClassificationSet), "the shards were made of classes"
    assert found.class_names == ("a", "b", "c", "d")
    assert found.targets.tolist() == [3, 1]
    assert found.splits == ("held_out", "train")
    assert found.fingerprint != opened(tmp_path, split="train").fingerprint
    with pytest.raises(UsageError, match="has no split 'test'; it has held_out, train"):
        opened(tmp_path)


def test_a_damaged_set_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "squares")
    tar = folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    with pytest.raises(UniclError, match=r"shard-000001\.tar has .* bytes"):
        opened(folder)
