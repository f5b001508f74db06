"""Which frames of a video make a clip: spread over all of it, or a window of it.

Frames are counted, not timed, as mmaction2 and torchvision do: a video of variable frame rate
gives more of them where it has more.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from unicl.data.order import mix
from unicl.errors import UsageError

_METHODS = ("uniform", "dense")


@dataclass(frozen=True)
class ClipSampling:
    """How clips are taken from a video.

    "uniform" cuts the video into `num_frames` equal segments and takes a frame of each, any in
    training and the middle one in evaluation (Temporal Segment Networks). A video with fewer frames
    than asked for gives some of them several times, in order.

    "dense" takes every `frame_stride`-th frame of a window of `num_frames * frame_stride` frames,
    which lies anywhere in training; in evaluation windows are spread from the video's first frame
    to its last, a single one lies in the middle (mmaction2's SampleFrames). A video shorter than
    the window is prolonged by its last frame.

    Raises:
        UsageError: The method is unknown, or a number is not positive.
    """

    num_frames: int
    method: str = "uniform"
    frame_stride: int = 1

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UsageError(f"no sampling {self.method!r}; there are {' and '.join(_METHODS)}")
        if self.num_frames < 1 or self.frame_stride < 1:
            raise UsageError(
                "num_frames and frame_stride must be positive, "
                f"got {self.num_frames} and {self.frame_stride}"
            )

    def random_clip(self, length: int, seed: int) -> Int64[np.ndarray, "1 {self.num_frames}"]:
        """Draw a clip of a video of `length` frames; the seed alone decides which."""
        if self.method == "dense":
            return self._windows(length, np.array([mix(seed) % (self._room(length) + 1)]))
        places = [mix(seed, segment) / 2**64 for segment in range(self.num_frames)]
        return self._segments(length, np.array([places]))

    def spread_clips(
        self, length: int, num_clips: int
    ) -> Int64[np.ndarray, "{num_clips} {self.num_frames}"]:
        """Return clips that together see all of a video of `length` frames.

        Uniform clips interleave: each takes another part of every segment, one its middle.
        """
        if self.method == "uniform":
            return self._segments(length, (np.arange(num_clips)[:, None] + 0.5) / num_clips)
        room = self._room(length)
        if num_clips == 1:
            return self._windows(length, np.array([room // 2]))
        return self._windows(length, np.linspace(0, room, num_clips).round().astype(np.int64))

    def _room(self, length: int) -> int:
        """Return the last frame that a window may start at."""
        return max(0, length - self.num_frames * self.frame_stride)

    def _windows(
        self, length: int, starts: Int64[np.ndarray, " clips"]
    ) -> Int64[np.ndarray, "clips {self.num_frames}"]:
        indices = starts[:, None] + np.arange(self.num_frames) * self.frame_stride
        return np.minimum(indices, length - 1)

    def _segments(
        self, length: int, places: np.ndarray
    ) -> Int64[np.ndarray, "clips {self.num_frames}"]:
        """Return the frames at places between 0 and 1 within each of the segments."""
        indices = (np.arange(self.num_frames) + places) * (length / self.num_frames)
        # Rounding may carry a place at a segment's very end one frame too far.
        return np.minimum(indices.astype(np.int64), length - 1)
