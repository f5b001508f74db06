import io
import logging
import tarfile

import av
import numpy as np
import pytest

from adapters.video.building import open_samples
from adapters.video.files import holds_videos
from adapters.video.sets import VIDEO_TEMPLATES, open_video_set, open_videos, write_list
from tests.adapters.video.layouts import KINETICS, files, lines, msr_vtt
from unicl.data.image_sets import CaptionSet, ClassificationSet, MissingSetError
from unicl.data.image_sets.images import TarImages
from unicl.data.shards import ShardSet, index_shards
from unicl.errors import UsageError
from unicl.evaluator import Options, evaluate


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What was told, line by line."""
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    return lambda: caplog.messages


def opened(folder, split="test", **more):
    return open_video_set(str(folder), split=split, root=folder, **more)


def named(found):
    assert isinstance(found, ClassificationSet)
    names = [found.class_names[number] for number in found.targets]
    return {found.locate(index)[0]: name for index, name in enumerate(names)}


def test_templates():
    assert len(set(VIDEO_TEMPLATES)) == 28
    assert VIDEO_TEMPLATES[0] == "a photo of {}."
    assert VIDEO_TEMPLATES[-1] == "a demonstration of a person practicing {}."


def test_class_folders(tmp_path):
    files(tmp_path, ["train/ice_skating/1.mp4", "train/archery/2.AVI", "test/archery/x/3.mkv"])
    files(tmp_path, ["train/archery/thumb.jpg", "train/archery/.4.mp4"])
    train = opened(tmp_path, "train")
    assert named(train) == {"archery/2.AVI": "archery", "ice_skating/1.mp4": "ice skating"}
    assert train.templates == VIDEO_TEMPLATES
    assert train.read(0).image == b"train/archery/2.AVI"
    assert train.splits == ("train", "test")
    assert train.metric == "top1"
    test = opened(tmp_path)
    assert test.class_names == train.class_names
    assert named(test) == {"archery/x/3.mkv": "archery"}
    lines(tmp_path / "templates.txt", "a clip of {}.")
    assert opened(tmp_path).templates == ("a clip of {}.",)


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(UsageError, match=r"is no video set; expected CLASS/VIDEO\.mp4"):
        opened(tmp_path)
    files(tmp_path, ["cat/1.jpg"])
    with pytest.raises(UsageError, match=r"holds no videos; expected \.mp4, "):
        opened(tmp_path)
    with pytest.raises(UsageError, match=r"has no video; expected \.mp4, "):
        open_videos(str(tmp_path), root=tmp_path)


def test_any_folder_of_videos(tmp_path):
    files(tmp_path, ["b/2.mp4", "a/deep/1.webm", "3.txt"])
    found = open_videos(str(tmp_path), root=tmp_path)
    assert [found.locate(index)[0] for index in range(found.num_samples)] == [
        "a/deep/1.webm",
        "b/2.mp4",
    ]
    assert not isinstance(found, ClassificationSet | CaptionSet)
    files(tmp_path / "set", ["train/a/1.mp4"])
    in_parts = open_videos(str(tmp_path / "set"), split="train", root=tmp_path)
    assert isinstance(in_parts, ClassificationSet)


def kinetics(folder):
    lines(
        folder / "annotations/train.csv",
        KINETICS,
        "archery,AAA,5,15,train,0",
        "yoga,BBB,0,10,train,0",
        "zumba,CCC,1,11,train,0",
    )
    lines(
        folder / "annotations/val.csv",
        KINETICS,
        "yoga,-DD_d,100,110,validate,0",
        "air drumming,EEE,7,17,validate,1",
        "yoga,-DD_d,100,110,validate,0",
    )
    files(folder, ["train/archery/AAA_000005_000015.mp4", "train/BBB_000000_000010.webm"])
    files(folder, ["val/EEE_000007_000017.mp4", "-DD_d_000100_000110.mp4", "train/other.mp4"])


def test_kinetics(tmp_path, said):
    kinetics(tmp_path / "kinetics400")
    train = open_video_set("kinetics400", split="train", root=tmp_path)
    assert str(train) == "kinetics400 (train)"
    assert train.where == tmp_path / "kinetics400"
    again = opened(train.where, "train")
    assert (named(again), again.where) == (named(train), None)
    assert train.class_names == ("air drumming", "archery", "yoga", "zumba")
    assert named(train) == {
        "train/archery/AAA_000005_000015.mp4": "archery",
        "train/BBB_000000_000010.webm": "yoga",
    }
    assert train.skipped == {"missing file": 1}
    assert train.empty_classes == ("zumba",)
    assert (train.templates, train.metric) == (VIDEO_TEMPLATES, "top1")
    val = open_video_set("kinetics400", root=tmp_path)
    assert said() == ["kinetics400 has no test part, its val is taken"]
    assert named(val) == {
        "-DD_d_000100_000110.mp4": "yoga",
        "val/EEE_000007_000017.mp4": "air drumming",
    }
    assert val.skipped == {"named twice": 1}
    assert val.class_names == train.class_names
    alone = opened(tmp_path / "kinetics400/annotations/val.csv", "val")
    assert named(alone) == named(val)
    with pytest.raises(UsageError, match="has no split 'train'; it has val"):
        opened(tmp_path / "kinetics400/annotations/val.csv", "train")
    assert open_videos("kinetics400", split="val", root=tmp_path).num_samples == 2


def test_kinetics_in_one_table_without_splits(tmp_path):
    lines(tmp_path / "mine.csv", "label,youtube_id,time_start,time_end", "yoga,A,0,10")
    files(tmp_path, ["x/A_000000_000010.mp4"])
    found = opened(tmp_path)
    assert (found.split, found.splits) == ("", ())
    with pytest.raises(UsageError, match="is one part"):
        opened(tmp_path, "train")


def test_a_clip_lies_in_the_folder_of_its_split(tmp_path):
    lines(tmp_path / "all.csv", KINETICS, "yoga,A,0,10,val,0", "yoga,A,0,10,train,0")
    files(tmp_path, [f"videos_{split}/yoga/A_000000_000010.mp4" for split in ("train", "val")])
    for split in ("train", "val"):
        assert list(named(opened(tmp_path, split))) == [f"videos_{split}/yoga/A_000000_000010.mp4"]


def test_a_part_without_classes_or_videos(tmp_path):
    lines(tmp_path / "test.csv", "youtube_id,time_start,time_end", "A,0,10")
    files(tmp_path, ["A_000000_000010.mp4"])
    with pytest.raises(UsageError, match=r"holds no videos \(no class: 1\)"):
        opened(tmp_path)
    msr_vtt(tmp_path / "m", {"video1": ["one"]}, {})
    with pytest.raises(UsageError, match=r"holds no videos \(its annotations name none\)"):
        opened(tmp_path / "m")


def test_a_test_part_without_classes_is_none(tmp_path):
    lines(tmp_path / "test.csv", "youtube_id,time_start,time_end", "A,0,10")
    lines(tmp_path / "val.csv", KINETICS, "yoga,B,0,10,val,0")
    files(tmp_path, ["A_000000_000010.mp4", "B_000000_000010.mp4"])
    found = opened(tmp_path)
    assert (found.split, found.splits) == ("val", ("val",))
    assert named(found) == {"B_000000_000010.mp4": "yoga"}


def test_no_video_is_there(tmp_path):
    lines(tmp_path / "val.csv", KINETICS, "yoga,A,0,10,val,0")
    with pytest.raises(UsageError, match=r"none of the 1 videos .*, such as A_000000_000010; put"):
        opened(tmp_path)
    msr_vtt(tmp_path / "m", {}, {"video7": "seven"})
    lines(tmp_path / "m/MSRVTT_data.json", '{"videos": [{"video_id": "7"}], "sentences": []}')
    with pytest.raises(UsageError, match=r"none of the 1 videos .*, such as video7; put"):
        opened(tmp_path / "m")
    with pytest.raises(MissingSetError, match="msrvtt needs its annotations and videos in "):
        open_video_set("msrvtt", root=tmp_path)
    with pytest.raises(UsageError, match="no folder 'kinetics'; did you mean kinetics"):
        open_video_set("kinetics", root=tmp_path)
    files(tmp_path, ["clip.mp4"])
    with pytest.raises(UsageError, match=r"clip\.mp4 is no set of videos; expected a folder with"):
        open_videos(str(tmp_path / "clip.mp4"), root=tmp_path)


def test_lists(tmp_path):
    lines(tmp_path / "k400_train_list_videos.txt", "yoga/a b.mp4 1", "zumba/c.mp4 2")
    lines(tmp_path / "k400_val_list_videos.txt", "d.mp4 0", "e.mp4 1", "f.mp4 1")
    lines(tmp_path / "label_map_k400.txt", "air_drumming", "yoga", "zumba")
    files(tmp_path, ["videos_train/yoga/a b.mp4", "videos_train/zumba/c.mp4"])
    files(tmp_path, ["videos_val/d.mp4", "videos_val/f.mp4"])
    assert named(opened(tmp_path, "train")) == {"yoga/a b.mp4": "yoga", "zumba/c.mp4": "zumba"}
    val = opened(tmp_path, "val")
    assert named(val) == {"d.mp4": "air drumming", "f.mp4": "yoga"}
    assert val.skipped == {"missing file": 1}
    assert val.splits == ("train", "val")
    assert val.read(0).image == b"videos_val/d.mp4"
    (tmp_path / "used").mkdir()
    write_list(val, tmp_path / "used/val_list.txt")
    assert (tmp_path / "used/val_list.txt").read_text() == "d.mp4 0\nf.mp4 1\n"
    files(tmp_path / "used", ["d.mp4", "f.mp4"])
    with pytest.raises(UsageError, match=r"lacks classnames\.txt"):
        opened(tmp_path / "used")
    lines(tmp_path / "used/classnames.txt", "air drumming")
    with pytest.raises(UsageError, match="has a class 1, but only 0 to 0 have a name"):
        opened(tmp_path / "used")
    lines(tmp_path / "used/classnames.txt", "air drumming", "yoga", "zumba")
    again = opened(tmp_path / "used/val_list.txt", "val")
    assert named(again) == named(val)


@pytest.fixture
def retrieval(tmp_path):
    captions = {f"video{number}": [f"{number} a", f"{number} b"] for number in range(4)}
    captions["video9"] = []
    tested = {"video3": "three", "video2": "two", "video8": "eight"}
    msr_vtt(tmp_path / "msrvtt_data", captions, tested, train_9k="video1 video0 video5 video9")
    files(tmp_path / "videos", [f"all/video{number}.mp4" for number in (0, 1, 2, 9)])
    files(tmp_path / "videos", ["TestVideo/video3.avi"])
    return tmp_path


def test_msr_vtt(retrieval):
    test = opened(retrieval, kind="captions")
    assert isinstance(test, CaptionSet)
    assert test.captions == (("three",), ("two",))
    assert [test.locate(index)[0] for index in (0, 1)] == [
        "videos/TestVideo/video3.avi",
        "videos/all/video2.mp4",
    ]
    assert test.skipped == {"missing file": 1}
    assert test.splits == ("train", "test")
    train = opened(retrieval, "train")
    assert train.captions == (("1 a", "1 b"), ("0 a", "0 b"))
    assert train.skipped == {"missing file": 1, "no caption": 1}
    assert train.read(0).image == b"all/video1.mp4"
    assert opened(retrieval / "msrvtt_data/MSRVTT_data.json").captions == test.captions
    with pytest.raises(UsageError, match="has captions, but classes are needed"):
        opened(retrieval, kind="classes")


def test_msr_vtt_says_what_it_trains_on_without_a_list(retrieval, said):
    (retrieval / "msrvtt_data/MSRVTT_train.9k.csv").unlink()
    assert opened(retrieval, "train").captions == (("0 a", "0 b"), ("1 a", "1 b"))
    assert "train part is the 3 videos that are not in MSRVTT_JSFUSION_test.csv" in said()[0]


def test_msr_vtt_has_no_val_part_but_ones_own(retrieval):
    with pytest.raises(UsageError, match=r"no val part, .*; write MSRVTT_val\.csv"):
        opened(retrieval, "val")
    lines(retrieval / "msrvtt_data/MSRVTT_val.csv", "video_id", "video0")
    assert opened(retrieval, "val").captions == (("0 a", "0 b"),)
    assert opened(retrieval, "train").captions == (("1 a", "1 b"),)


def clip(shade):
    """A real video of four frames, 64 x 64."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def shade(encoded):
    with av.open(io.BytesIO(encoded)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4
    return round(float(np.mean(frames)))


def test_tars_of_clips(tmp_path):
    # As video2dataset writes them: a clip and its caption.
    tar(tmp_path / "0.tar", {"1.mp4": clip(40), "1.txt": b"dark", "2.mp4": clip(200)})
    tar(tmp_path / "1.tar", {"3.mp4": clip(200), "3.txt": b"bright"})
    with pytest.raises(UsageError, match=r"has tars and no index; write it with: unicl prepare"):
        opened(tmp_path)
    index_shards(tmp_path)
    found = opened(tmp_path)
    assert isinstance(found, CaptionSet)
    assert isinstance(found.images, TarImages)
    assert found.captions == (("dark",), ("bright",))
    assert found.skipped == {"no text": 1}
    assert abs(shade(found.read(0).image) - 40) <= 2
    classes = opened(tmp_path, kind="classes")
    assert named(classes).keys() == {"0.tar", "1.tar"}
    assert (classes.templates, classes.short_text_words) == (VIDEO_TEMPLATES, None)
    with pytest.raises(UsageError, match="lie in tars"):
        write_list(classes, tmp_path / "list.txt")


def test_clips_with_pictures_beside_them_are_images(tmp_path):
    tar(tmp_path / "0.tar", {"1.mp4": clip(40), "1.jpg": b"picture", "1.txt": b"dark"})
    assert not holds_videos(str(tmp_path))
    index_shards(tmp_path)
    assert ShardSet.open(tmp_path).read(0).image == b"picture"
    told = r"0\.tar has pictures beside its clips \(jpg and mp4\), and pictures are taken first"
    with pytest.raises(UsageError, match=told):
        opened(tmp_path)
    with pytest.raises(UsageError, match=told):
        open_samples(tmp_path, split="train")


def test_tars_of_clip_benchmark(tmp_path):
    tar(tmp_path / "test/0.tar", {"1.webm": clip(90), "1.cls": b"1"})
    lines(tmp_path / "test/nshards.txt", "1")
    lines(tmp_path / "classnames.txt", "yoga", "zumba")
    found = opened(tmp_path)
    assert named(found) == {"0.tar": "zumba"}
    assert found.templates == VIDEO_TEMPLATES
    assert abs(shade(found.read(0).image) - 90) <= 2
    lines(tmp_path / "zeroshot_classification_templates.txt", "a clip of {c}.")
    assert opened(tmp_path).templates == ("a clip of {}.",)


def test_who_evaluates_videos_as_images_is_told_how_to(tmp_path):
    files(tmp_path, ["a/1.mp4", "b/2.mp4"])
    with pytest.raises(
        UsageError, match=r"no images.*; for what it holds there is video-zero-shot"
    ):
        evaluate("any", "zero-shot", [str(tmp_path)], Options(device="cpu"))
