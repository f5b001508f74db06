"""Frames of an encoded video by their number, exactly, and only those that it takes to get them.

PyAV decodes. A frame's number is its place in the order of presentation; what the header says of
number, rate and duration of the frames is never asked. All packets are read first, which costs
little, and their presentation times say which of them a frame needs. Where that may be wrong, the
video is decoded from its start and the frames are counted.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import chain, pairwise
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from adapters.video.files import video_type
from unicl.data.shards import SampleError
from unicl.errors import UsageError

try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError as error:
    raise UsageError(f'videos need PyAV: pip install "unicl[video]" ({error})') from error

# Formats are named, not left to libav's guess: it also knows play lists, which open other files.
_FORMATS = {
    "mp4": "mov", "m4v": "mov", "mov": "mov", "3gp": "mov", "mkv": "matroska", "webm": "matroska",
    "avi": "avi", "mpg": "mpeg", "ts": "mpegts", "flv": "flv", "wmv": "asf", "ogv": "ogg",
}  # fmt: skip
# One packet, one frame; but for hidden ones of VP8 and for those that MPEG-4 part 2 leaves out.
_COUNTED = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "mpeg4")
_MPEG4_LEFT_OUT = 10
"""Bytes that a frame of MPEG-4 part 2 takes at most if it only repeats the one before."""
# Others (AVI) know the order of decoding only.
_TIMED = ("mov", "matroska", "mpegts", "flv")
# Their decoder can leave out what no other frame refers to, without changing any other frame.
_SKIPPING = ("h264",)
_KEY_FRAME_QUALITY = 90
_KEY_FRAME_PIXELS = 1 << 26

Frame = UInt8[Tensor, "height width 3"]
Value = TypeVar("Value")


def key_frame(encoded: bytes) -> bytes:
    """Return the frame in the middle of a video as a JPEG.

    Raises:
        SampleError: As `decode_frames`.
    """
    (frame,) = decode_frames(
        encoded, lambda count: [count // 2], Tensor.clone, max_pixels=_KEY_FRAME_PIXELS
    )
    file = BytesIO()
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=_KEY_FRAME_QUALITY)
    return file.getvalue()


def decode_frames(
    encoded: bytes,
    choose: Callable[[int], Sequence[int]],
    convert: Callable[[Frame], Value],
    *,
    max_pixels: int,
) -> list[Value]:
    """Decode the chosen frames of a video, upright and in RGB.

    A frame is the same as in a plain decoding of the whole video. A truncated video ends where its
    data ends. What a decoder makes of other damage is taken as it is, and frames that are lost to
    it are counted unless they are needed. Pixels are taken for square.

    Args:
        encoded: A whole video file.
        choose: Numbers of frames, given how many there are; in any order, also repeatedly. It is
            asked again if there turn out to be more or fewer.
        convert: Makes of a frame what is kept. All frames of a video have the same size.
        max_pixels: A video with larger frames is refused.

    Returns:
        One value for each number chosen; equal numbers share theirs.

    Raises:
        SampleError: "undecodable video", "no video stream", "no frames", "video too large".
    """
    with _open(encoded, max_pixels) as (stream, demuxed):
        packets = list(demuxed)
        if not packets:
            raise SampleError("no frames")
        schedule = _Schedule.of(stream, packets)
        if schedule is not None:
            chosen = list(choose(len(schedule.order)))
            with suppress(_Surprise):
                values = schedule.decode(stream, set(chosen), _Upright(max_pixels, convert))
                return [values[index] for index in chosen]
        count = len(packets)
        del packets, schedule
    # Once to count and, if that was not what the packets promised, once more.
    for _ in range(2):
        chosen = list(choose(count))
        with _open(encoded, max_pixels) as (stream, demuxed):
            upright = _Upright(max_pixels, convert)
            values, found = _decode_all(stream, demuxed, set(chosen), upright)
        if found == count:
            return [values[index] for index in chosen]
        if not found:
            break
        count = found
    raise SampleError("undecodable video")


class _Surprise(Exception):
    """The decoder gives other frames than the packets promised."""


class _Upright(Generic[Value]):
    """Makes RGB of frames, all of the first one's size, and hands them on."""

    def __init__(self, max_pixels: int, convert: Callable[[Frame], Value]) -> None:
        self._max_pixels = max_pixels
        self._convert = convert
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: av.VideoFrame) -> Value:
        _check_size(frame.width, frame.height, self._max_pixels)
        if self._size is None:
            self._size = (frame.width, frame.height)
        try:
            rgb = self._reformatter.reformat(frame, *self._size, "rgb24", threads=1)
            pixels: np.ndarray = rgb.to_ndarray()
        except av.FFmpegError as error:
            raise SampleError("undecodable video") from error
        quarters = round(frame.rotation / 90) % 4
        if quarters:
            pixels = np.ascontiguousarray(np.rot90(pixels, quarters))
        return self._convert(torch.from_numpy(pixels))


@contextmanager
def _open(encoded: bytes, max_pixels: int) -> Iterator[tuple[av.VideoStream, Iterator[av.Packet]]]:
    """Open the first video stream that is no cover picture, and read its packets one by one."""
    name = video_type(encoded)
    if name is None:
        raise SampleError("undecodable video")
    # Larger frames that are met on the way are refused by libav itself, before it allocates them.
    options = {"max_pixels": str(max_pixels)}
    try:
        container = av.open(
            BytesIO(encoded),
            "r",
            format=_FORMATS[name],
            options=options,
            metadata_errors="replace",
        )
    except Exception as error:  # Only PyAV runs here; bad files make it raise all, MemoryError too.
        raise SampleError("undecodable video") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise SampleError("no video stream")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise SampleError("undecodable video")
        _check_size(context.width, context.height, max_pixels)
        context.options = options
        context.thread_type = "NONE"
        context.thread_count = 1
        yield stream, _packets(container.demux(stream), len(encoded))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleError("video too large")


def _packets(demuxed: Iterator[av.Packet], num_bytes: int) -> Iterator[av.Packet]:
    """Read packets up to the video's end or to where it is damaged."""
    read = 0
    # PyAV raises the latter where damage makes a stream appear that was not there at first.
    with suppress(av.FFmpegError, IndexError):
        for packet in demuxed:
            # An index may name the same bytes for any number of packets.
            read += packet.size + 1
            if read > 2 * num_bytes:
                raise SampleError("undecodable video")
            if packet.size:  # An empty one would tell the decoder that the video is over.
                yield packet


@dataclass(frozen=True)
class _Schedule:
    """Which packets a frame needs.

    Args:
        packets: In the order of decoding.
        times: Presentation time of each.
        order: Number of the packet of each frame, in the order of presentation.
        keys: Numbers of the packets from which on decoding can start.
    """

    packets: list[av.Packet]
    times: list[int]
    order: list[int]
    keys: list[int]

    @classmethod
    def of(cls, stream: av.VideoStream, packets: list[av.Packet]) -> "_Schedule | None":
        """Make a schedule, or none where packets are not known to be frames one by one."""
        context = stream.codec_context
        codec = context.codec.canonical_name
        timed = stream.container.format.name in _TIMED or not context.has_b_frames
        times = [packet.pts for packet in packets if packet.pts is not None]
        if codec not in _COUNTED or not timed or len(times) < len(packets):
            return None
        if codec == "mpeg4" and min(packet.size for packet in packets) <= _MPEG4_LEFT_OUT:
            return None
        shown = [number for number, packet in enumerate(packets) if _is_shown(packet, codec)]
        order = sorted(shown, key=times.__getitem__)
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        sound = (
            order
            and keys[:1] == [0]
            and times[0] <= times[order[0]]
            and all(times[one] < times[two] for one, two in pairwise(order))
            and all(times[one] < times[two] for one, two in pairwise(keys))
            and not any(packet.is_corrupt for packet in packets)
        )
        return cls(packets, times, order, keys) if sound else None

    @cached_property
    def _shown(self) -> set[int]:
        return set(self.order)

    def decode(
        self, stream: av.VideoStream, indices: set[int], convert: Callable[[av.VideoFrame], Value]
    ) -> dict[int, Value]:
        """Decode frames by their numbers; raises `_Surprise` if others come than should."""
        values: dict[int, Value] = {}
        number = {self.times[self.order[index]]: index for index in indices}
        context = stream.codec_context
        for start, stop in self._stretches(sorted(indices)):
            came = []
            for time, frame in self._frames(context, start, stop, number):
                # Before the first key frame's time there may be some that lack their reference.
                if time >= self.times[start]:
                    if time == self.times[start] and not frame.key_frame:
                        raise _Surprise
                    came.append(time)
                    if time in number:
                        values[number[time]] = convert(frame)
            self._check(came, start, stop, number, context.name in _SKIPPING)
            context.flush_buffers()
        if values.keys() != indices:
            raise _Surprise
        return values

    def _stretches(self, indices: list[int]) -> list[tuple[int, int]]:
        """Return runs of packets [start, stop), each from a key frame to the last that is needed.

        The decoder is emptied after each and begins the next one anew.
        """
        key_times = [self.times[key] for key in self.keys]
        stretches: list[tuple[int, int]] = []
        for index in indices:
            packet = self.order[index]
            key = self.keys[bisect_right(key_times, self.times[packet]) - 1]
            if stretches and key <= stretches[-1][1]:
                start, stop = stretches.pop()
                stretches.append((start, max(stop, packet + 1)))
            else:
                stretches.append((key, packet + 1))
        return stretches

    def _frames(
        self, context: av.VideoCodecContext, start: int, stop: int, wanted: dict[int, int]
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        skipping = context.name in _SKIPPING
        for packet in [*self.packets[start:stop], None]:
            if skipping and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            try:
                frames = context.decode(packet)
            except av.FFmpegError as error:
                raise _Surprise from error
            for frame in frames:
                # The two fields of an interlaced frame may lie in two packets.
                if frame.pts is None or frame.interlaced_frame:
                    raise _Surprise
                yield frame.pts, frame

    def _check(
        self, came: list[int], start: int, stop: int, wanted: dict[int, int], skipping: bool
    ) -> None:
        """Compare the times of frames that came with those that the packets promised."""
        promised = sorted(
            self.times[packet]
            for packet in range(start, stop)
            if packet in self._shown and self.times[packet] >= self.times[start]
        )
        if skipping:
            present = set(came)
            promised = [time for time in promised if time in wanted or time in present]
        if came != promised:
            raise _Surprise


def _is_shown(packet: av.Packet, codec: str) -> bool:
    # The fifth bit of a VP8 frame; what it hides is there for others to refer to.
    return not packet.is_discard and (codec != "vp8" or bool(memoryview(packet)[0] & 0x10))


def _decode_all(
    stream: av.VideoStream,
    packets: Iterator[av.Packet],
    indices: set[int],
    convert: Callable[[av.VideoFrame], Value],
) -> tuple[dict[int, Value], int]:
    """Decode from the start to the end; return the wanted frames, and how many there are."""
    values: dict[int, Value] = {}
    count = 0
    for packet in chain(packets, [None]):
        with suppress(av.FFmpegError):
            for frame in stream.codec_context.decode(packet):
                if count in indices:
                    values[count] = convert(frame)
                count += 1
    return values, count
