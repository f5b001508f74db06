import struct
from io import BytesIO
from itertools import repeat

import av
import numpy as np
import pytest
from PIL import Image

from adapters.video import decoding
from adapters.video.decoding import decode_frames, key_frame, video_type
from tests.adapters.video.videos import draw, encode_audio, encode_video, plain_decoding
from unicl.data.shards import SampleError

MAX_PIXELS = 1 << 20
VARIABLE = np.cumsum(np.random.default_rng(0).integers(1, 9, 32)).tolist()

VIDEOS = {
    "b-frames": {"gop": 30, "bf": "3"},
    "short groups": {"gop": 5},
    "one group": {"gop": 250},
    "key frames only": {"gop": 1},
    "open groups": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"},
    "no key frames": {"container": "mpegts", "x264-params": "intra-refresh=1:keyint=12"},
    "variable rate": {"times": VARIABLE, "bf": "2"},
    "late start": {"times": range(100, 132)},
    "odd size": {"size": (65, 47), "pix_fmt": "yuv444p"},
    "10 bits": {"pix_fmt": "yuv420p10le"},
    "interlaced": {"container": "mpegts", "flags": "+ildct+ilme"},
    "fragmented": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "mov": {"container": "mov"},
    "mkv": {"container": "matroska"},
    "ts": {"container": "mpegts"},
    "flv": {"container": "flv"},
    "h264 in avi": {"container": "avi", "bf": "2"},
    "mpeg4 in avi": {"container": "avi", "codec": "mpeg4", "bf": "2"},
    "mpeg": {"container": "mpeg", "codec": "mpeg2video", "bf": "2"},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "vp8": {"container": "webm", "codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9": {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"},
    "hevc": {"codec": "libx265", "x265-params": "log-level=none:keyint=12"},
    "motion jpeg": {"codec": "mjpeg", "container": "matroska", "pix_fmt": "yuvj420p"},
}
CHOICES = [
    *([number] for number in range(0, 32, 3)),
    [31],
    [0, 1, 2, 3],
    [5, 5, 6, 6],
    [11, 12, 13, 20, 31],
    [30, 2, 30],
    list(range(7, 25)),
    list(range(0, 32, 7)),
]


def decode(encoded, choose, max_pixels=MAX_PIXELS):
    if not callable(choose):
        return decode_frames(encoded, lambda count: choose, copy, max_pixels=max_pixels)
    return decode_frames(encoded, choose, copy, max_pixels=max_pixels)


def copy(frame):
    return frame.numpy().copy()


def everything(encoded):
    return decode(encoded, range)


def reason(encoded, **options):
    with pytest.raises(SampleError) as caught:
        decode(encoded, range, **options)
    return caught.value.reason


@pytest.fixture(scope="module", params=VIDEOS)
def video(request):
    return encode_video(**VIDEOS[request.param])


def test_frames_are_those_of_a_plain_decoding(video):
    expected = plain_decoding(video)
    assert len(expected) == 32
    for choice in [*CHOICES, list(range(32))]:
        got = decode(video, choice)
        for number, frame in zip(choice, got, strict=True):
            np.testing.assert_array_equal(frame, expected[number])


def test_frames_are_those_that_were_encoded():
    video = encode_video(gop=8, bf="2", crf="1")
    for number, frame in zip((0, 7, 21), decode(video, [0, 7, 21]), strict=True):
        errors = [np.abs(frame - draw(other).astype(float)).mean() for other in range(32)]
        assert np.argmin(errors) == number


def count_packets(monkeypatch):
    """Return a list that grows by one for each packet a decoder is given."""
    fed = []
    frames = decoding._Schedule._frames

    def counted(self, context, start, stop, wanted):
        fed.extend(range(start, stop))
        return frames(self, context, start, stop, wanted)

    monkeypatch.setattr(decoding._Schedule, "_frames", counted)
    monkeypatch.setattr(decoding, "_decode_all", None)
    return fed


def test_only_what_is_needed_is_decoded(monkeypatch):
    fed = count_packets(monkeypatch)
    video = encode_video(96, gop=12, bf="0", sc_threshold="0")
    decode(video, [50])
    assert fed == [48, 49, 50]
    fed.clear()
    decode(video, [3, 20, 22, 24, 90])
    assert fed == [*range(4), *range(12, 23), 24, *range(84, 91)]


def with_tenth_packet(video, container, change):
    """Copy a video, but for the bytes of one packet."""
    file = BytesIO()
    with av.open(BytesIO(video)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if not packet.size:
                continue
            copied = av.Packet(change(bytes(packet)) if number == 10 else bytes(packet))
            copied.pts, copied.dts, copied.time_base = packet.pts, packet.dts, packet.time_base
            copied.is_keyframe = packet.is_keyframe
            copied.stream = stream
            output.mux(copied)
    return file.getvalue()


def test_frames_that_mpeg4_leaves_out_are_not_counted():
    # Start code, P, no whole second passed, marker, 10/30 s, marker, not coded, stuffing.
    bits = int("01" + "0" + "1" + f"{10:05b}" + "1" + "0" + "01111", 2)
    left_out = b"\x00\x00\x01\xb6" + bits.to_bytes(2)
    video = encode_video(container="avi", codec="mpeg4")
    video = with_tenth_packet(video, "avi", lambda data: left_out)
    assert_31_frames(video)


def test_hidden_frames_of_vp8_are_not_counted(monkeypatch):
    video = encode_video(**VIDEOS["vp8"])
    video = with_tenth_packet(video, "webm", lambda data: bytes([data[0] & ~0x10]) + data[1:])
    monkeypatch.setattr(decoding, "_decode_all", None)
    assert_31_frames(video)


def assert_31_frames(video):
    expected = plain_decoding(video)
    assert len(expected) == 31
    np.testing.assert_array_equal(everything(video), expected)
    for number in (9, 10, 30):
        (frame,) = decode(video, [number])
        np.testing.assert_array_equal(frame, expected[number])


def test_dropped_frames_of_avi_are_not_counted():
    video = encode_video(8, container="avi", codec="mpeg4", times=[0, 1, 2, 5, 6, 9, 10, 11])
    assert len(everything(video)) == 8


def test_frames_are_converted_once():
    calls = []
    video = encode_video()
    got = decode_frames(
        video, lambda count: [4, 4, 9, 4], lambda frame: calls.append(0), max_pixels=MAX_PIXELS
    )
    assert len(got) == 4
    assert len(calls) == 2


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_frames_stand_upright(degrees):
    video = encode_video(rotation=degrees)
    (plain, *_) = plain_decoding(video)
    (frame,) = decode(video, [0])
    with av.open(BytesIO(video)) as container:
        rotation = next(container.decode(video=0)).rotation
    assert abs(rotation) == abs(degrees)
    np.testing.assert_array_equal(frame, np.rot90(plain, rotation // 90))


def with_wrong_header(encoded):
    """Claim another number of seconds in an MP4's header."""
    changed = bytearray(encoded)
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        place = encoded.index(box) + offset
        changed[place : place + 4] = struct.pack(">I", 1)
    return bytes(changed)


def test_the_headers_duration_is_not_believed():
    video = encode_video(muxing={"movflags": "+negative_cts_offsets"}, bf="0")
    changed = with_wrong_header(video)
    assert len(everything(changed)) == len(plain_decoding(changed)) == 32


def test_a_truncated_video_ends_where_its_data_ends():
    for container in ("mpegts", "matroska"):
        video = encode_video(64, container=container)
        cut = video[: len(video) // 2]
        frames = everything(cut)
        whole = plain_decoding(video)
        assert 16 < len(frames) < 48
        for number, frame in enumerate(frames[:-5]):
            np.testing.assert_array_equal(frame, whole[number])


def test_a_truncated_mp4_is_decoded_up_to_there_if_its_index_comes_first():
    video = encode_video(64, muxing={"movflags": "frag_keyframe+empty_moov"})
    frames = everything(video[: len(video) // 2])
    whole = plain_decoding(video)
    assert 16 < len(frames) < 60
    for number, frame in enumerate(frames[:-5]):
        np.testing.assert_array_equal(frame, whole[number])
    video = encode_video(64)
    assert reason(video[: len(video) // 2]) == "undecodable video"


def test_all_frames_have_the_size_of_the_first():
    video = encode_video(8, container="mpegts") + encode_video(8, (96, 64), container="mpegts")
    expected = plain_decoding(video)
    assert [frame.shape for frame in expected] == [(48, 64, 3)] * 8 + [(64, 96, 3)] * 8
    frames = everything(video)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 16
    for number in range(8):
        np.testing.assert_array_equal(frames[number], expected[number])


@pytest.mark.parametrize("container", ["mp4", "mpegts", "avi", "matroska"])
def test_damage_in_the_middle_costs_no_more_than_frames(container):
    video = bytearray(encode_video(64, container=container, gop=8))
    middle = len(video) // 2
    video[middle : middle + 300] = bytes(300)
    asked = []
    frames = decode(bytes(video), lambda count: asked.append(count) or range(count))
    assert 32 < len(frames) <= 64
    assert asked[-1] == len(frames)


@pytest.mark.parametrize("container", ["mp4", "mpegts", "avi", "matroska"])
def test_random_damage_gives_frames_or_a_reason(container):
    generator = np.random.default_rng(0)
    video = np.frombuffer(encode_video(16, container=container), np.uint8)
    reasons = set()
    for _ in range(25):
        damaged = video.copy()
        places = generator.integers(12, len(video), 40)
        damaged[places] = generator.integers(0, 256, 40)
        try:
            assert everything(damaged.tobytes())
        except SampleError as error:
            reasons.add(error.reason)
    assert reasons <= {"undecodable video", "no frames", "no video stream", "video too large"}


def test_a_small_file_cannot_give_endless_packets():
    for packet in (av.Packet(b"packet"), av.Packet(b"")):
        with pytest.raises(SampleError, match="undecodable video"):
            list(decoding._packets(repeat(packet), 1000))


def test_what_cannot_be_used_is_named():
    assert reason(b"") == "undecodable video"
    assert reason(b"not a video at all" * 100) == "undecodable video"
    assert reason(encode_video()[:100] + bytes(5000)) == "undecodable video"
    assert reason(encode_audio()) == "no video stream"
    assert reason(encode_video(0)) in ("no frames", "undecodable video", "no video stream")
    assert reason(encode_video(size=(128, 96)), max_pixels=128 * 96 - 1) == "video too large"
    assert len(decode(encode_video(size=(128, 96)), range, max_pixels=128 * 96)) == 32


def test_a_header_cannot_understate_the_size():
    video = bytearray(encode_video(size=(128, 96)))
    place = video.rindex(b"avc1") + 28  # Its first place is in the list of brands.
    assert video[place : place + 2] == struct.pack(">H", 128)
    video[place : place + 2] = struct.pack(">H", 16)
    assert reason(bytes(video), max_pixels=5000) in ("video too large", "undecodable video")
    assert len(everything(bytes(video))) == 32


def test_packets_that_hold_nothing_are_undecodable():
    video = bytearray(encode_video())
    start, stop = video.index(b"mdat") + 4, video.index(b"moov") - 4
    video[start:stop] = bytes(stop - start)
    assert reason(bytes(video)) == "undecodable video"


def test_a_cover_picture_is_no_video():
    file = BytesIO()
    cover = BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "JPEG")
    with av.open(BytesIO(encode_audio())) as source, av.open(file, "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        picture = output.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        packets = [packet for packet in source.demux() if packet.size]
        image = av.Packet(cover.getvalue())
        image.stream = picture
        image.pts = image.dts = 0
        output.mux(image)
        for packet in packets:
            packet.stream = stream
            output.mux(packet)
    with av.open(BytesIO(file.getvalue())) as container:
        assert len(container.streams.video) == 1
    assert reason(file.getvalue()) == "no video stream"


def test_play_lists_are_not_followed(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(encode_video())
    path = tmp_path / "secret.mp4"
    for text in (f"#EXTM3U\n#EXTINF:1,\n{path}\n", f"ffconcat version 1.0\nfile {path}\n"):
        assert reason(text.encode()) == "undecodable video"


def test_nothing_is_written_to_the_terminal(capfd):
    video = bytearray(encode_video(64, gop=8, container="mpegts"))
    video[3000:6000] = bytes(3000)
    everything(bytes(video[:-500]))
    captured = capfd.readouterr()
    assert "h264" not in captured.err + captured.out


def test_types_are_told_by_content():
    assert video_type(encode_video(2)) == "mp4"
    assert video_type(encode_video(2, container="mov")) == "mov"
    assert video_type(encode_video(2, container="ipod")) == "m4v"
    assert video_type(encode_video(2, container="matroska")) == "mkv"
    assert video_type(encode_video(2, container="webm", codec="libvpx")) == "webm"
    assert video_type(encode_video(2, container="avi")) == "avi"
    assert video_type(encode_video(2, container="mpegts")) == "ts"
    assert video_type(encode_video(2, container="mpeg", codec="mpeg2video")) == "mpg"
    assert video_type(encode_video(2, container="flv")) == "flv"
    assert video_type(encode_video(2, container="asf", codec="wmv2")) == "wmv"
    for name in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP"):
        file = BytesIO()
        Image.new("RGB", (64, 64)).save(file, name)
        assert video_type(file.getvalue()) is None
    assert video_type(b"") is None
    assert video_type(b"\x00" * 1000) is None


def test_the_key_frame_is_the_middle_one():
    video = encode_video(32, crf="1")
    image = Image.open(BytesIO(key_frame(video)))
    assert image.format == "JPEG"
    expected = plain_decoding(video)[16]
    assert np.abs(np.asarray(image).astype(float) - expected).mean() < 12
    with pytest.raises(SampleError, match="undecodable video"):
        key_frame(b"nothing")
