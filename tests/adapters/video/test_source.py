import tarfile

from adapters.video.files import holds_videos
from adapters.video.source import open_video_source
from tests.adapters.video.videos import encode_video
from unicl.data.prepare import prepare
from unicl.data.shards import ShardSet


def test_a_transport_stream_is_written_as_one(tmp_path):
    (tmp_path / "set/train/yoga").mkdir(parents=True)
    video = encode_video(4, container="mpegts")
    (tmp_path / "set/train/yoga/a.mp4").write_bytes(video)
    prepare(open_video_source(str(tmp_path / "set")), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/shard-000000.tar") as tar:
        assert tar.getnames() == ["00000000.ts", "00000000.txt"]
    assert ShardSet.open(tmp_path / "out/train", strict=True).read(0).image == video
    assert holds_videos(str(tmp_path / "out/train"))
