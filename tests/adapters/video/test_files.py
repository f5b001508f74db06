import os
import subprocess
import sys
import tarfile

import pytest

from adapters.video.files import find_videos, holds_videos
from tests.adapters.video.layouts import KINETICS, files, lines, msr_vtt


def test_videos_are_found_wherever_they_lie(tmp_path):
    files(tmp_path, ["b/video1.mp4", "a/x/video1.webm", "video2.MKV", "a/notes.txt", ".c/v.mp4"])
    os.symlink(tmp_path, tmp_path / "a/loop")  # ends
    assert find_videos(tmp_path) == {
        "video1": ["a/x/video1.webm", "b/video1.mp4"],
        "video2": ["video2.MKV"],
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/1.mp4", "dog/2.avi"], True),
        (["train/cat/1.mp4"], True),
        (["empty/readme.txt", "full/deep/1.mov"], True),
        (["clip.mp4", "thumb.jpg", "other.mp4"], True),
        (["clip.mp4", "1.jpg", "2.jpg"], False),
        (["cat/1.jpg", "dog/2.png"], False),
        (["cat/1.mp4", "cat/other.tar"], True),
        (["other.tar"], False),  # it is none
        (["readme.txt"], False),
        ([".hidden.mp4", "1.png"], False),
        (["src/index.ts", "src/main.ts"], False),
    ],
)
def test_a_folder_holds_videos_or_images(tmp_path, names, expected):
    files(tmp_path, names)
    assert holds_videos(str(tmp_path)) is expected


@pytest.mark.parametrize(("extension", "expected"), [("mp4", True), ("jpg", False)])
@pytest.mark.parametrize("inner", ["", "train"])
def test_tars_hold_what_their_first_sample_is(tmp_path, extension, expected, inner):
    files(tmp_path, [f"1.{extension}", "1.txt"])
    (tmp_path / "set" / inner).mkdir(parents=True)
    with tarfile.open(tmp_path / "set" / inner / "0.tar", "w") as tar:
        for name in ("1.txt", f"1.{extension}"):
            tar.add(tmp_path / name, name)
    assert holds_videos(str(tmp_path / "set")) is expected


def test_annotations_are_of_videos(tmp_path):
    table = lines(tmp_path / "k400/val.csv", KINETICS)
    msr_vtt(tmp_path / "msr", {}, {"video1": "one"})
    lines(tmp_path / "msr/MSRVTT_data.json", '{"videos": [{"video_id": "1"}], "sentences": []}')
    for spec in (table, table.parent, tmp_path / "msr", tmp_path / "msr/MSRVTT_data.json"):
        assert holds_videos(str(spec)) is True
    assert holds_videos(str(lines(tmp_path / "a.csv", "image,caption"))) is False


def test_names_and_what_is_not_there(tmp_path):
    assert holds_videos("msrvtt")
    assert not holds_videos("digits")
    assert not holds_videos("")
    assert not holds_videos(str(tmp_path / "absent"))


def test_to_ask_imports_no_torch():
    code = "import sys, adapters.video.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
