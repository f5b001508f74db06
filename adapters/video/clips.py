"""From an encoded video to a clip, as the loader wants it: decode, sample, crop, resize, augment.

A clip is uint8 [3, num_frames, height, width]. Images become still clips, so that a model of videos
embeds them, too. Randomness comes from one integer per sample.
"""

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.tv_tensors import Video

from adapters.video.decoding import Frame, decode_frames, key_frame
from adapters.video.files import video_type
from adapters.video.sampling import ClipSampling
from unicl.data.augment import EvalTransform, TrainTransform
from unicl.data.order import mix
from unicl.data.reader import ImageDecoder
from unicl.data.shard_index import VIDEO_EXTENSIONS
from unicl.data.shards import SampleError
from unicl.data.sources import image_type
from unicl.errors import UsageError

__all__ = [
    "MAX_PIXELS",
    "VIDEO_EXTENSIONS",
    "ClipSampling",
    "EvalClipDecoder",
    "TrainClipDecoder",
    "key_frame",
    "video_type",
]

MAX_PIXELS = 1 << 26
# Told apart from what `TrainTransform` draws with the same seed.
_FLIP, _SAMPLING, _RAND_AUGMENT = (int.from_bytes(name) for name in (b"flip", b"when", b"augment"))


@dataclass(frozen=True)
class TrainClipDecoder:
    """One clip of a video, its frames cropped, mirrored and augmented alike.

    Args:
        size: Side of the result, in pixels.
        scale: Range of the crop's area, as a share of the frame.
        ratio: Range of the crop's width over its height.
        flip: Mirror half of the clips.
        rand_augment: Number of operations and their magnitude, 0 to 30, as in torchvision's
            RandAugment.
        max_pixels: Videos with larger frames are skipped, and larger images.
    """

    size: int
    sampling: ClipSampling
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(
        self, encoded: bytes, seed: int
    ) -> UInt8[Tensor, "3 frames {self.size} {self.size}"]:
        """Make a clip; the seed decides which, and how it is augmented.

        Raises:
            SampleError: The video or image cannot be used.
        """
        transform = TrainTransform(self.size, scale=self.scale, ratio=self.ratio, flip=False)
        if video_type(encoded) is None:
            image = _decode_image(ImageDecoder(transform, self.max_pixels), encoded, seed)
            clip = image[:, None].expand(-1, self.sampling.num_frames, -1, -1)
        else:

            def crop(frame: Frame) -> Tensor:
                height, width, _ = frame.shape
                left, top, right, bottom = map(round, transform.draw_crop(width, height, seed))
                return _resize(frame[top:bottom, left:right], self.size, self.size)

            frames = decode_frames(
                encoded,
                lambda length: self.sampling.random_clip(length, mix(seed, _SAMPLING))[0].tolist(),
                crop,
                max_pixels=self.max_pixels,
            )
            clip = torch.stack(frames, 1)
        if self.flip and mix(seed, _FLIP) % 2:
            clip = clip.flip(-1)
        if self.rand_augment is not None:
            clip = _rand_augment(clip, *self.rand_augment, mix(seed, _RAND_AUGMENT))
        return clip.contiguous()

    def empty(self) -> UInt8[Tensor, "0 3 frames {self.size} {self.size}"]:
        """Return no clips, of the shape that clips have."""
        return torch.empty(0, 3, self.sampling.num_frames, self.size, self.size, dtype=torch.uint8)


@dataclass(frozen=True)
class EvalClipDecoder:
    """Views of a video: clips spread over its time, each in square crops along its longer side.

    The paper's 4 x 3 views are `num_clips=4, num_crops=3` (sections 3.8, 3.9). A single crop is the
    middle one. All crops of a clip come before the next clip.

    Args:
        size: Side of the result, in pixels.
        crop: Side of the squares, as a share of the frame's shorter side. Unset means what
            `EvalTransform` takes for one crop, and all of the side for several.
        max_pixels: Videos with larger frames are skipped, and larger images.

    Raises:
        UsageError: A number of views is not positive.
    """

    size: int
    sampling: ClipSampling
    num_clips: int = 1
    num_crops: int = 1
    crop: float | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.num_clips < 1 or self.num_crops < 1:
            raise UsageError(
                "num_clips and num_crops must be positive, "
                f"got {self.num_clips} and {self.num_crops}"
            )

    @property
    def num_views(self) -> int:
        """Number of clips times number of crops."""
        return self.num_clips * self.num_crops

    def __call__(
        self, encoded: bytes, seed: int = 0
    ) -> UInt8[Tensor, "{self.num_views} 3 frames {self.size} {self.size}"]:
        """Make the views; the seed has no effect. Those of an image are all its middle.

        Raises:
            SampleError: The video or image cannot be used.
        """
        if video_type(encoded) is None:
            transform = EvalTransform(self.size, crop=self.crop)
            image = _decode_image(ImageDecoder(transform, self.max_pixels), encoded, seed)
            views = image[None, :, None].expand(*self._shape())
            return views.contiguous()
        frames = decode_frames(
            encoded,
            lambda length: self.sampling.spread_clips(length, self.num_clips).ravel().tolist(),
            self._crops,
            max_pixels=self.max_pixels,
        )
        views = torch.empty(self._shape(), dtype=torch.uint8)
        for clip, part in enumerate(views.split(self.num_crops)):
            first = clip * self.sampling.num_frames
            torch.stack(frames[first : first + self.sampling.num_frames], 2, out=part)
        return views

    def empty(self) -> UInt8[Tensor, "0 {self.num_views} 3 frames {self.size} {self.size}"]:
        """Return no views, of the shape that a video's views have."""
        return torch.empty(0, *self._shape(), dtype=torch.uint8)

    def _shape(self) -> tuple[int, ...]:
        return self.num_views, 3, self.sampling.num_frames, self.size, self.size

    def _crops(self, frame: Frame) -> UInt8[Tensor, "{self.num_crops} 3 {self.size} {self.size}"]:
        """Resize the strip that holds all crops, and cut it."""
        short, long, _ = frame.shape
        if short > long:
            return self._crops(frame.transpose(0, 1)).transpose(2, 3)
        side = max(1, round(self._share() * short))
        length = side if self.num_crops == 1 else long
        top, left = (short - side) // 2, (long - length) // 2
        scaled = max(self.size, round(length * self.size / side))
        strip = _resize(frame[top : top + side, left : left + length], self.size, scaled)
        places = torch.linspace(0, scaled - self.size, self.num_crops).round().int().tolist()
        return torch.stack([strip[..., place : place + self.size] for place in places])

    def _share(self) -> float:
        if self.crop is None and self.num_crops > 1:
            return 1.0
        return EvalTransform(self.size, crop=self.crop).crop


def _decode_image(
    decode: ImageDecoder, encoded: bytes, seed: int
) -> UInt8[Tensor, "3 height width"]:
    """Decode an image among videos; of what is neither, say that it is no video."""
    try:
        return decode(encoded, seed)
    except SampleError as error:
        if image_type(encoded) is not None:
            raise
        raise SampleError("not a video") from error


def _resize(frame: Frame, height: int, width: int) -> UInt8[Tensor, "3 {height} {width}"]:
    """Resize as the transforms of images do, bicubic and without aliases, in a third of the time.

    Inside, values differ from Pillow's by 3 of 255 at most; its edges see pixels beyond the crop.
    """
    pixels = frame.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


def _rand_augment(
    clip: UInt8[Tensor, "3 frames height width"], num_ops: int, magnitude: int, seed: int
) -> UInt8[Tensor, "3 frames height width"]:
    """Change all frames alike; torchvision draws from torch's own generator, so seed that."""
    augment = v2.RandAugment(num_ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return augment(Video(clip.transpose(0, 1))).as_subclass(Tensor).transpose(0, 1)
