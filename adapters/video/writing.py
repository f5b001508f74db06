"""Frames as files of videos, for clips that are drawn here."""

from io import BytesIO

import av
from jaxtyping import UInt8
from numpy import ndarray


def encode(frames: UInt8[ndarray, "time height width 3"], *, frames_per_second: int = 8) -> bytes:
    """Return the frames as an H.264 file; what is lost is some two levels of 255."""
    buffer = BytesIO()
    options = {"preset": "veryfast", "crf": "18"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 4
        # Threads cost more than they gain on frames of this size, and the bytes depend on them.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
