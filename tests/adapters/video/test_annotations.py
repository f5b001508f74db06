import json

import pytest

from adapters.video.annotations import Kinetics, MsrVtt, VideoLists, find_annotations, split_of
from tests.adapters.video.layouts import KINETICS, files, lines, msr_vtt
from unicl.errors import UniclError, UsageError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("kinetics400_val_list_videos", "val"),
        ("kinetics_700_2020_validate", "val"),
        ("Training", "train"),
        ("trainer", ""),
        ("videos", ""),
    ],
)
def test_split_of_a_name(name, split):
    assert split_of(name) == split


def test_kinetics_tables(tmp_path):
    lines(
        tmp_path / "train.csv",
        f"\ufeff{KINETICS}",
        "air drumming,-3B32lodo2M,59,69,train,0",
        '"pulling rope (game)",_dbcJuKJQNs,0.0,10.0,train,0',
    )
    # As Kinetics' own test part, without classes.
    lines(tmp_path / "test.csv", "youtube_id,time_start,time_end", "zzz,1,11")
    found = find_annotations(tmp_path)
    assert isinstance(found, Kinetics)
    assert [(clip.stem, clip.label, clip.split) for clip in found.read()] == [
        ("zzz_000001_000011", "", "test"),
        ("-3B32lodo2M_000059_000069", "air drumming", "train"),
        ("_dbcJuKJQNs_000000_000010", "pulling rope (game)", "train"),
    ]
    alone = find_annotations(tmp_path / "train.csv")
    assert alone == Kinetics(tmp_path, (tmp_path / "train.csv",))


@pytest.mark.parametrize("times", ["x,10", ",10", "5", "5,inf"])
def test_a_time_that_is_no_number(tmp_path, times):
    table = lines(tmp_path / "val.csv", KINETICS, "", f"archery,abc,{times}")
    with pytest.raises(UniclError, match=r"val\.csv, line 3 has a time that is no number"):
        Kinetics(tmp_path, (table,)).read()


def test_a_quote_that_is_not_closed(tmp_path):
    table = lines(tmp_path / "val.csv", KINETICS, '"archery,abc,1,2,val,0')
    with pytest.raises(UniclError, match=r"val\.csv is no table of CSV"):
        Kinetics(tmp_path, (table,)).read()


def test_lists_of_paths(tmp_path):
    path = lines(tmp_path / "val.txt", "", "a b/c d.MP4 3", "e.webm\t12 ", "")
    assert find_annotations(tmp_path) == VideoLists(tmp_path, {"val": path})
    assert VideoLists(tmp_path, {"": path}).read("") == [("a b/c d.MP4", 3), ("e.webm", 12)]
    lines(path, "a.mp4 1", "frames/a 300 1")  # mmaction2's lists of folders of frames
    with pytest.raises(UniclError, match=r"val\.txt, line 2 is not .*: 'frames/a 300 1'"):
        VideoLists(tmp_path, {"": path}).read("")
    lines(tmp_path / "val_split_2.txt", "a.mp4 1")
    with pytest.raises(UsageError, match=r"val\.txt and val_split_2\.txt list one part"):
        find_annotations(tmp_path)


@pytest.mark.parametrize("inner", ["annotations", "msrvtt_data"])
def test_annotations_in_a_folder_of_their_own(tmp_path, inner):
    table = lines(tmp_path / inner / "val.csv", KINETICS)
    expected = Kinetics(tmp_path, (table,))
    assert find_annotations(tmp_path) == expected
    assert find_annotations(table) == expected


def test_what_is_no_annotations(tmp_path):
    files(tmp_path, ["cat/1.mp4", "readme.csv", "cat.txt", "info.json", "empty.txt"])
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "image.csv").write_bytes(b"\xff\xd8\xff\xe0 image,caption")
    assert find_annotations(tmp_path) is None
    assert find_annotations(tmp_path / "cat/1.mp4") is None
    assert find_annotations(tmp_path / "absent") is None


def test_frames_that_know_their_video_are_images(tmp_path):
    # COCO-VID's.
    coco = '{"videos": [{"id": 1}], "images": [{"video_id": 1}], "annotations": [{"video_id": 1}]}'
    lines(tmp_path / "train.json", coco)
    lines(tmp_path / "meta.json", '[{"video_id": "a", "caption": "b"}]')
    assert find_annotations(tmp_path) is None
    assert find_annotations(tmp_path / "train.json") is None


def test_msr_vtt_may_begin_with_its_sentences_or_its_videos(tmp_path):
    many = [{"video_id": f"video{number}"} for number in range(9000)]
    one = [{"video_id": "video1", "caption": "one"}]
    for content in ({"videos": many, "sentences": one}, {"sentences": many, "videos": one}):
        lines(tmp_path / "MSRVTT_data.json", json.dumps(content))
        assert isinstance(find_annotations(tmp_path), MsrVtt)


@pytest.fixture
def captions():
    return {f"video{number}": [f"{number} a", f" {number} b "] for number in range(6)}


def opened(folder):
    found = find_annotations(folder)
    assert isinstance(found, MsrVtt)
    return found


def test_msr_vtt_has_one_caption_to_test_and_all_to_train(tmp_path, captions):
    msr_vtt(tmp_path, captions, {"video4": "four,\u2028tested"}, train_9k="video0 video3")
    found = opened(tmp_path)
    assert found.splits == ("train", "test")
    assert found.read("test") == {"video4": ("four,\u2028tested",)}
    assert found.read("train") == {"video0": ("0 a", "0 b"), "video3": ("3 a", "3 b")}
    assert opened(tmp_path / "MSRVTT_data.json") == found


def test_msr_vtt_takes_9k_before_7k_and_all_others_without(tmp_path, captions):
    tested = {"video4": "four"}
    msr_vtt(tmp_path, captions, tested, train_7k="video1", train_9k="video1 video2")
    assert list(opened(tmp_path).read("train")) == ["video1", "video2"]
    (tmp_path / "MSRVTT_train.9k.csv").unlink()
    assert list(opened(tmp_path).read("train")) == ["video1"]
    (tmp_path / "MSRVTT_train.7k.csv").unlink()
    assert list(opened(tmp_path).read("train")) == [f"video{n}" for n in (0, 1, 2, 3, 5)]


def test_msr_vtt_never_trains_on_what_is_tested_or_held_out(tmp_path, captions):
    msr_vtt(tmp_path, captions, {"video4": "four"}, train_9k="video1 video4")
    with pytest.raises(UsageError, match=r"9k\.csv has 1 videos of .*_test\.csv, such as video4"):
        opened(tmp_path).read("train")
    msr_vtt(tmp_path, captions, {"video4": "four"}, train_9k="video1 video2", val="video2 video3")
    found = opened(tmp_path)
    assert found.splits == ("train", "val", "test")
    assert list(found.read("train")) == ["video1"]
    assert found.read("val") == {"video2": ("2 a", "2 b"), "video3": ("3 a", "3 b")}
    lines(tmp_path / "MSRVTT_val.csv", "video_id,sentence", "video2,two", "video2,too")
    assert found.read("val") == {"video2": ("two", "too")}
    lines(tmp_path / "MSRVTT_val.csv", "video_id", "video4")
    for split in ("train", "val"):
        with pytest.raises(UsageError, match=r"MSRVTT_val\.csv has 1 videos"):
            found.read(split)


def test_msr_vtt_needs_its_tables(tmp_path, captions):
    msr_vtt(tmp_path, captions, {"video4": "four"}, train_9k="video1")
    found = opened(tmp_path)
    lines(tmp_path / "MSRVTT_train.9k.csv", "id", "video1")
    with pytest.raises(UniclError, match="has no column video_id"):
        found.read("train")
    (tmp_path / "MSRVTT_data.json").write_text('{"videos": [{"video_id": "video1"}]}')
    with pytest.raises(UniclError, match=r"MSRVTT_data\.json lacks MSR-VTT's videos"):
        found.read("train")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").unlink()
    with pytest.raises(UsageError, match=r"needs MSRVTT_JSFUSION_test\.csv beside it"):
        found.read("train")
