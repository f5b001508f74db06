import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.tv_tensors import Video

from adapters.video.clips import (
    VIDEO_EXTENSIONS,
    ClipSampling,
    EvalClipDecoder,
    TrainClipDecoder,
    video_type,
)
from tests.adapters.video.videos import encode_video, plain_decoding
from unicl.data.augment import EvalTransform, TrainTransform, open_image
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder, mix
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Decode
from unicl.data.shards import SampleError, ShardSet, ShardWriter
from unicl.errors import UsageError

UNIFORM = ClipSampling(4)
DENSE = ClipSampling(4, "dense", 2)
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.fixture(scope="module")
def video():
    return encode_video(32, size=(96, 64))


def encoded_image(size=(80, 60)):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def resized(frame, box, size):
    """Pillow's crop and resizing: the path that images take."""
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.int16))


def close(one, other):
    """Compare but for rounding and edges, where Pillow sees beyond its box and torch does not."""
    difference = (one.to(torch.int16) - other).abs()[..., 5:-5, 5:-5]
    return difference.max() <= 4 and difference.float().mean() < 0.3


def test_both_are_decoders_of_the_loader(video):
    for decoder in (
        TrainClipDecoder(32, UNIFORM, rand_augment=(2, 9)),
        EvalClipDecoder(32, UNIFORM, 2, 3),
    ):
        assert isinstance(decoder, Decode)
        again = pickle.loads(pickle.dumps(decoder))  # What workers are given.
        assert again == decoder
        clip = decoder(video, 1)
        assert torch.equal(clip, again(video, 1))
        assert clip.dtype == torch.uint8
        assert clip.is_contiguous()
        assert decoder.empty().shape == (0, *clip.shape)
        assert decoder.empty().dtype == torch.uint8


def test_a_training_clip_is_one_crop_of_all_its_frames(video):
    decoder = TrainClipDecoder(32, DENSE, scale=(0.2, 0.6))
    plain = plain_decoding(video)
    starts = set()
    for seed in range(10):
        box = TrainTransform(32, scale=(0.2, 0.6)).draw_crop(96, 64, seed)
        expected = [resized(frame, box, 32) for frame in plain]
        clip = decoder(video, seed)
        assert clip.shape == (3, 4, 32, 32)
        (start,) = [
            start
            for start in range(25)
            if all(close(clip[:, step], expected[start + 2 * step]) for step in range(4))
        ]
        starts.add(start)
    assert len(starts) > 4


def test_the_seed_alone_decides(video):
    decoder = TrainClipDecoder(24, UNIFORM, flip=True, rand_augment=(2, 9))
    torch.manual_seed(0)
    first = [decoder(video, seed) for seed in range(12)]
    torch.manual_seed(1)
    again = [decoder(video, seed) for seed in reversed(range(12))][::-1]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({clip.numpy().tobytes() for clip in first}) == 12


def test_global_random_state_is_left_alone(video):
    before = torch.get_rng_state()
    TrainClipDecoder(24, UNIFORM, rand_augment=(2, 9))(video, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_half_of_the_clips(video):
    dense = ClipSampling(4, "dense", 8)  # There is but one such clip of 32 frames.
    plain = TrainClipDecoder(24, dense, **WHOLE)
    decoder = TrainClipDecoder(24, dense, **WHOLE, flip=True)
    flipped = 0
    for seed in range(40):
        clip, expected = decoder(video, seed), plain(video, seed)
        mirrored = not torch.equal(clip, expected)
        assert not mirrored or torch.equal(clip, expected.flip(-1))
        flipped += mirrored
    assert 10 < flipped < 30


def test_rand_augment_is_torchvisions_and_the_same_for_all_frames(video):
    still = encode_video(1, size=(96, 64))
    augmented = TrainClipDecoder(48, UNIFORM, rand_augment=(2, 9))
    plain = TrainClipDecoder(48, UNIFORM)
    changed = 0
    for seed in range(20):
        clip, before = augmented(still, seed), plain(still, seed)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        changed += not torch.equal(clip, before)
    assert changed > 10
    # The generator is torch's, seeded by the sample's seed.
    torch.manual_seed(mix(3, int.from_bytes(b"augment")))
    augment = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR)
    expected = augment(Video(plain(video, 3).transpose(0, 1))).transpose(0, 1)
    assert torch.equal(augmented(video, 3), expected.as_subclass(torch.Tensor))


def test_a_single_view_is_the_middle(video):
    views = EvalClipDecoder(32, UNIFORM)(video, 7)
    assert views.shape == (1, 3, 4, 32, 32)
    plain = plain_decoding(video)
    for number, index in enumerate((4, 12, 20, 28)):
        assert close(views[0, :, number], resized(plain[index], (16, 0, 80, 64), 32))


@pytest.mark.parametrize(("crop", "side"), [(None, 56), (1.0, 64), (0.5, 32)])
def test_the_crops_share_is_that_of_images(crop, side, video):
    views = EvalClipDecoder(128, UNIFORM, crop=crop)(video)
    box = (48 - side / 2, 32 - side / 2, 48 + side / 2, 32 + side / 2)
    expected = resized(plain_decoding(video)[4], box, 128)
    assert close(views[0, :, 0], expected)


@pytest.mark.parametrize("tall", [False, True])
def test_views_are_clips_times_crops_along_the_longer_side(tall):
    size = (64, 96) if tall else (96, 64)
    video = encode_video(32, size=size)
    plain = plain_decoding(video)
    views = EvalClipDecoder(32, DENSE, num_clips=4, num_crops=3)(video)
    assert views.shape == (12, 3, 4, 32, 32)
    for clip, start in enumerate((0, 8, 16, 24)):
        for crop, place in enumerate((0, 16, 32)):
            box = (0, place, 64, place + 64) if tall else (place, 0, place + 64, 64)
            for step in range(4):
                got = views[3 * clip + crop, :, step]
                expected = resized(plain[start + 2 * step], box, 32)
                assert close(got, expected)


@pytest.mark.parametrize("size", [(64, 64), (66, 64), (640, 16), (16, 640), (2, 2), (33, 47)])
def test_any_shape_of_frames_gives_full_views(size):
    video = encode_video(3, size=size, pix_fmt="yuv444p")
    for decoder in (
        EvalClipDecoder(16, UNIFORM, 2, 3),
        EvalClipDecoder(128, UNIFORM),
        TrainClipDecoder(16, DENSE),
    ):
        clip = decoder(video, 3)
        assert decoder.empty().shape == (0, *clip.shape)


def test_rotated_videos_are_cropped_upright():
    video = encode_video(4, size=(96, 64), rotation=90)
    (plain, *_) = plain_decoding(video)
    views = EvalClipDecoder(32, ClipSampling(4), num_crops=3)(video)
    upright = np.rot90(plain)
    assert close(views[1, :, 0], resized(np.ascontiguousarray(upright), (0, 16, 64, 80), 32))


def test_images_become_still_clips():
    image = encoded_image()
    views = EvalClipDecoder(32, UNIFORM, 2, 3)(image)
    expected = EvalTransform(32)(open_image(image))
    assert torch.equal(views, expected[None, :, None].expand(6, 3, 4, 32, 32))
    clip = TrainClipDecoder(32, UNIFORM, scale=(0.3, 1.0))(image, 5)
    expected = TrainTransform(32, scale=(0.3, 1.0))(open_image(image), 5)
    assert torch.equal(clip, expected[:, None].expand(3, 4, 32, 32))


def test_what_cannot_be_used_is_skipped(video):
    for decoder in (
        TrainClipDecoder(16, UNIFORM, max_pixels=4000),
        EvalClipDecoder(16, UNIFORM, max_pixels=4000),
    ):
        for encoded, reason in (
            (video, "video too large"),
            (encoded_image(), "image too large"),
            (video[:200] + bytes(1000), "undecodable video"),
            (b"neither", "not a video"),
            (encoded_image((8, 6))[:60], "undecodable image"),
        ):
            with pytest.raises(SampleError) as caught:
                decoder(encoded, 0)
            assert caught.value.reason == reason


def test_content_decides_not_the_name(video):
    # The loader hands over bytes without a name: there is no suffix to be wrong.
    other = encode_video(8, size=(96, 64), container="matroska")
    assert EvalClipDecoder(16, UNIFORM)(other).shape == EvalClipDecoder(16, UNIFORM)(video).shape
    assert video_type(other) in VIDEO_EXTENSIONS


def test_wrong_numbers_of_views_are_named():
    with pytest.raises(UsageError, match="must be positive, got 0 and 3"):
        EvalClipDecoder(16, UNIFORM, 0, 3)


def characters(texts):
    return torch.tensor([[len(text)] for text in texts])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_takes_clips_and_counts_what_it_skips(tmp_path, video, num_workers):
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for number in range(9):
            media = {3: (video[:300], "mp4"), 6: (encoded_image(), "png")}
            writer.write(f"k{number}", *media.get(number, (video, "mp4")), f"clip {number}")
    shards = ShardSet.open(tmp_path / "shards")
    decoder = TrainClipDecoder(16, UNIFORM, rand_augment=(2, 9))
    loader = Loader(
        shards,
        SampleOrder(shards.shard_sizes, seed=0, window=1, shuffle=False),
        decode=decoder,
        tokenize=characters,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=9,
        num_workers=num_workers,
        seed=5,
        max_skipped_share=None,
    )
    (batch,) = loader.epoch()
    assert batch.images.shape == (8, 3, 4, 16, 16)
    assert batch.keys == tuple(f"k{number}" for number in range(9) if number != 3)
    assert batch.skipped == {"undecodable video": 1}
    seed = mix(5, int.from_bytes(b"augment"), 8)
    assert torch.equal(batch.images[-1], decoder(video, seed))
