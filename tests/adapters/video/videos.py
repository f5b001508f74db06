"""Small videos, encoded here, whose frames all differ; and their plain decoding."""

from fractions import Fraction
from io import BytesIO

import av
import numpy as np


def draw(number, width=64, height=48):
    """A frame with a bright bar whose place and colour tell its number."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = (x * 3 + number * 7) % 256
    green = (y * 4 + number * 3) % 256
    blue = np.where((x // 4) % 16 == number % 16, 255, number * 5 % 256)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def encode_video(
    num_frames=32,
    size=(64, 48),
    *,
    container="mp4",
    codec="libx264",
    gop=12,
    times=None,
    rotation=0,
    pix_fmt="yuv420p",
    muxing=None,
    **options,
):
    """Encode frames; `times` are their presentation times in 1/30 s, 0, 1, 2, ... unless given."""
    file = BytesIO()
    with av.open(file, "w", format=container, options=muxing or {}) as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 30)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(range(num_frames) if times is None else times):
            frame = av.VideoFrame.from_ndarray(draw(number, *size))
            frame.pts, frame.time_base = time, Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def encode_audio(container="mp4"):
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def plain_decoding(encoded):
    """All frames of a video in RGB, by nothing but PyAV's own loop."""
    with av.open(BytesIO(encoded)) as container:
        frames = container.decode(container.streams.video[0])
        return [frame.to_ndarray(format="rgb24") for frame in frames]
