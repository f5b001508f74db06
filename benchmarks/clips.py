"""How many clips per second does the loader make beside a bare PyAV loop?"""

import math
from collections.abc import Callable, Sequence
from io import BytesIO

import av
import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from adapters.video.clips import ClipSampling, TrainClipDecoder
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.data.order import mix

_RATE = 30
_SECONDS = 10
_SIZE = 224
_FRAMES = ((320, 240), (340, 256))
_GROUPS = (12, 250)
_SAMPLINGS = {
    "uniform, 16 frames": ClipSampling(16),
    "dense, 32 frames of every second": ClipSampling(32, "dense", 2),
}


def measure(*, quick: bool) -> Result:
    """Training clips of one video after the other, one thread, no workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(quick)
    finally:
        torch.set_num_threads(threads)


def _measure(quick: bool) -> Result:
    num_clips = 1 if quick else 4
    rows, bars = [], []
    num_frames = _RATE * (3 if quick else _SECONDS)
    videos = {
        (size, group): _encode(num_frames, size, group)
        for size in (_FRAMES[:1] if quick else _FRAMES)
        for group in (_GROUPS[:1] if quick else _GROUPS)
    }
    for name, sampling in _SAMPLINGS.items():
        worst = None
        for (size, group), video in videos.items():
            sides = {
                "unicl": _own(video, sampling, num_clips),
                "bare loop": _peer(video, sampling, num_clips, num_frames),
            }
            timings = compare(sides, repeats=1 if quick else 7)
            gain = ratio(timings["bare loop"], timings["unicl"])
            worst = gain if worst is None or gain.median < worst.median else worst
            rows.append(
                {
                    "sampling": name,
                    "frame": f"{size[0]} x {size[1]}",
                    "key_frame_every": group,
                    "clips_per_second": num_clips / timings["unicl"].median,
                    "bare_loop_clips_per_second": num_clips / timings["bare loop"].median,
                    "ratio": gain.median,
                }
            )
        assert worst is not None
        what = f"clips/s over a bare PyAV loop's, {name}, worst of the videos"
        bars.append(Bar(what, worst.median, 0.9, "x", "at least", (worst.low, worst.high)))
    return Result(
        bars=bars,
        tables={"Clips per second of one thread": rows},
        facts={
            "image_size": _SIZE,
            "clips_per_round": num_clips,
            "videos": f"{num_frames} frames, {_RATE}/s, x264's defaults, a camera moving over a "
            "photograph, with noise",
            "bare_loop": "seeks to the first frame, decodes on to the last, scales those asked for "
            "by libswscale's bilinear filter; it is told the frames and crops nothing",
        },
    )


def _encode(num_frames: int, size: tuple[int, int], group: int) -> bytes:
    generator = np.random.default_rng(0)
    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    photograph = Image.open(str(path)).convert("RGB")
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=_RATE)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = group
        for number in range(num_frames):
            left = 40 + 40 * math.sin(number / 40)
            top = 80 + 60 * math.cos(number / 30)
            zoom = 1 + 0.2 * math.sin(number / 50)
            box = (left, top, left + size[0] * zoom, top + size[1] * zoom)
            pixels = np.asarray(photograph.resize(size, box=box)).astype(np.int16)
            pixels = pixels + generator.integers(-4, 5, pixels.shape, dtype=np.int16)
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def _own(video: bytes, sampling: ClipSampling, num_clips: int) -> Callable[[], object]:
    decoder = TrainClipDecoder(_SIZE, sampling, flip=True)
    return lambda: [decoder(video, seed) for seed in range(num_clips)]


def _peer(
    video: bytes, sampling: ClipSampling, num_clips: int, num_frames: int
) -> Callable[[], object]:
    # The seeds that the decoder draws its clips by: both sides decode the same frames.
    seeds = [mix(seed, int.from_bytes(b"when")) for seed in range(num_clips)]
    clips = [sampling.random_clip(num_frames, seed)[0].tolist() for seed in seeds]
    return lambda: [_bare_loop(video, clip) for clip in clips]


def _bare_loop(video: bytes, indices: Sequence[int]) -> np.ndarray:
    wanted, frames = set(indices), []
    with av.open(BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        per_frame = 1 / (_RATE * stream.time_base)
        container.seek(int(indices[0] * per_frame), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            number = round(frame.pts / per_frame)
            if number in wanted:
                pixels = frame.to_ndarray(width=_SIZE, height=_SIZE, format="rgb24", threads=1)
                frames.append(pixels)
            if number >= indices[-1]:
                break
    assert len(frames) == len(indices)
    return np.stack(frames).transpose(3, 0, 1, 2)
