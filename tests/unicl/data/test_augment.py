import math
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unicl.data.augment import (
    EvalTransform,
    TrainTransform,
    UndecodableImage,
    WholeTransform,
    open_image,
    upright,
    upright_size,
)


def encode(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(width, height, seed=0):
    """An image whose colours change slowly, so that resampling loses little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def opened(image, format="PNG", **options):
    return open_image(encode(image, format, **options))


def difference(one, two):
    return (one.float() - two.float()).abs().mean().item()


WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def test_the_seed_alone_decides():
    transform = TrainTransform(16, scale=(0.3, 1.0), flip=True)
    image = encode(smooth(40, 30))
    torch.manual_seed(0)
    first = [transform(open_image(image), seed) for seed in range(20)]
    torch.manual_seed(1)
    again = [transform(open_image(image), seed) for seed in reversed(range(20))][::-1]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({one.numpy().tobytes() for one in first}) == 20


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    TrainTransform(16, flip=True)(opened(smooth(40, 30)), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@settings(deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    seed=st.integers(0, 2**64 - 1),
    low=st.floats(0.05, 1),
)
def test_crops_lie_inside_and_have_the_asked_area_and_ratio(width, height, seed, low):
    transform = TrainTransform(8, scale=(low, 1.0))
    left, top, right, bottom = transform.draw_crop(width, height, seed)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100 and 0.8 < width / height < 1.25:
        assert 0.95 * low <= (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    transform = TrainTransform(8, scale=scale, ratio=ratio)
    ours = np.array([transform.draw_crop(200, 150, seed) for seed in range(1500)])
    ours = np.stack([ours[:, 0], ours[:, 1], ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]], 1)
    image = Image.new("RGB", (200, 150))
    torch.manual_seed(0)
    draws = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(1500)]
    theirs = np.array([(left, top, width, height) for top, left, height, width in draws])
    spread = theirs.std(0)
    # Means of 1,500 draws differ by about 1/27 of a standard deviation; allow four times that.
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 / 27 * spread).all()
    assert np.allclose(ours.std(0), spread, rtol=0.1)


def test_pixels_are_pillows_bicubic_crop():
    image = smooth(40, 30)
    transform = TrainTransform(16, scale=(0.5, 0.9))
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, box=transform.draw_crop(40, 30, 9))
    got = transform(opened(image), 9)
    np.testing.assert_array_equal(got.permute(1, 2, 0), np.asarray(expected))
    assert got.dtype == torch.uint8
    assert got.is_contiguous()


def test_flip_mirrors_half_of_the_images():
    image = encode(smooth(16, 16))
    plain = TrainTransform(16, **WHOLE)(open_image(image), 0)
    transform = TrainTransform(16, **WHOLE, flip=True)
    flipped = 0
    for seed in range(400):
        got = transform(open_image(image), seed)
        assert torch.equal(got, plain) or torch.equal(got, plain.flip(2))
        flipped += not torch.equal(got, plain)
    assert 150 < flipped < 250


def test_large_jpegs_are_decoded_small(monkeypatch):
    image = opened(smooth(1024, 800), "JPEG", quality=95)
    sizes = []
    load = type(image).load
    monkeypatch.setattr(type(image), "load", lambda self: sizes.append(self.size) or load(self))
    TrainTransform(100)(image, 0)
    assert max(sizes) <= (256, 200)


@pytest.mark.parametrize("width_height", [(1024, 801), (511, 513), (640, 333)])
def test_decoding_small_changes_next_to_nothing(width_height):
    image = smooth(*width_height)
    data = encode(image, "JPEG", quality=95)
    full = Image.open(BytesIO(data)).convert("RGB")
    for seed in range(5):
        transform = TrainTransform(48)
        assert difference(transform(open_image(data), seed), transform(full, seed)) < 1
    transform = EvalTransform(48)
    assert difference(transform(open_image(data)), transform(full)) < 1


def test_eval_is_the_lineages_resize_and_centre_crop():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = smooth(300, 400)
    steps = Compose([Resize(int(256 / 224 * 224), InterpolationMode.BICUBIC), CenterCrop(224)])
    expected = torch.tensor(np.asarray(steps(image))).permute(2, 0, 1)
    assert difference(EvalTransform(224)(opened(image)), expected) < 1


def test_eval_keeps_all_of_a_thumbnail():
    image = smooth(32, 32)
    got = EvalTransform(32)(opened(image))
    np.testing.assert_array_equal(got.permute(1, 2, 0), np.asarray(image))
    assert difference(EvalTransform(32, crop=0.5)(opened(image)), got) > 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_honoured(orientation, format):
    image = smooth(640, 320)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(opened(image, "PNG", exif=exif))
    for transform in (EvalTransform(32), TrainTransform(32)):
        got = transform(opened(image, format, exif=exif), 3)
        assert difference(got, transform(upright.copy(), 3)) < 1.5


def test_orientation_after_the_pixels_is_too_late():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth(64, 32), exif=exif)
    length = int.from_bytes(data[data.index(b"eXIf") - 4 : data.index(b"eXIf")]) + 12
    start = data.index(b"eXIf") - 4
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    plain = encode(smooth(64, 32))
    transform = EvalTransform(16)
    assert torch.equal(transform(open_image(moved)), transform(open_image(plain)))


def test_broken_exif_spoils_no_image():
    got = EvalTransform(16)(opened(smooth(16, 16), "JPEG", exif=b"Exif\0\0nonsense"))
    assert got.shape == (3, 16, 16)


def one_colour(mode, value, **info):
    image = Image.new(mode, (20, 20), value)
    image.info.update(info)
    return image


def test_modes_become_rgb():
    def colour(data):
        pixels = TrainTransform(8)(open_image(data), 0)
        assert (pixels == pixels[:, :1, :1]).all()
        return pixels[:, 0, 0].tolist()

    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    grey16 = Image.fromarray(np.full((20, 20), 0x8080, dtype=np.uint16))
    assert colour(encode(one_colour("RGB", (1, 2, 3)))) == [1, 2, 3]
    assert colour(encode(one_colour("L", 77))) == [77] * 3
    assert colour(encode(one_colour("1", 1))) == [255] * 3
    assert colour(encode(palette)) == [10, 20, 30]
    assert colour(encode(grey16)) == [128] * 3
    assert colour(encode(grey16, "TIFF")) == [128] * 3
    assert (
        colour(encode(Image.fromarray(np.full((20, 20), 0xFFFF, dtype=np.int32)), "TIFF"))
        == [255] * 3
    )
    cyan = colour(encode(one_colour("CMYK", (255, 0, 0, 0)), "JPEG", quality=100))
    assert cyan[0] < 10
    assert min(cyan[1:]) > 245


def test_transparency_shows_white():
    def colour(data):
        return TrainTransform(8)(open_image(data), 0)[:, 4, 4].tolist()

    assert colour(encode(one_colour("RGBA", (200, 0, 0, 0)))) == [255] * 3
    assert colour(encode(one_colour("RGBA", (200, 0, 0, 255)))) == [200, 0, 0]
    assert colour(encode(one_colour("RGBA", (0, 0, 0, 127)))) == [128] * 3
    assert colour(encode(one_colour("LA", (9, 0)))) == [255] * 3
    assert colour(encode(one_colour("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == [255] * 3
    assert colour(encode(one_colour("L", 5), transparency=5)) == [255] * 3
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert colour(encode(palette, transparency=1)) == [255] * 3


def test_floats_are_stretched_to_their_range():
    ramp = np.linspace(-3, 5, 400, dtype=np.float32).reshape(20, 20)
    ramp[3, 3] = math.nan
    pixels = EvalTransform(20)(opened(Image.fromarray(ramp), "TIFF"))
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, -1] == 255


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_the_tiniest_images_work(size):
    image = encode(smooth(*size))
    assert TrainTransform(16)(open_image(image), 5).shape == (3, 16, 16)
    assert EvalTransform(16)(open_image(image)).shape == (3, 16, 16)


@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    st.floats(0.1, 1),
)
def test_damaged_files_decode_or_say_so(format, changes, kept):
    data = bytearray(encode(smooth(24, 20), format))
    for place, value in changes:
        data[int(place * len(data))] = value
    data = bytes(data[: int(kept * len(data))])
    with suppress(UndecodableImage):
        assert TrainTransform(8)(open_image(data), 0).shape == (3, 8, 8)


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_undecodable(data):
    with pytest.raises(UndecodableImage):
        open_image(data)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_image_as_it_is_stored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(40, 20)
    stored = upright(opened(image, exif=exif), as_stored=True)
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(image))
    seen = upright(opened(image, exif=exif))
    assert seen.size == upright_size(opened(image, exif=exif))
    # What was turned once, or is not to be turned, stays so.
    for turned in (stored, seen):
        np.testing.assert_array_equal(np.asarray(upright(turned)), np.asarray(turned))


@pytest.mark.parametrize("size", [(40, 30), (30, 90), (8, 8), (1, 5)])
def test_the_whole_image_is_squeezed_into_a_square(size):
    image = smooth(*size)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    found = WholeTransform(16)(opened(image), 0)
    assert torch.equal(found, torch.from_numpy(np.asarray(expected).transpose(2, 0, 1).copy()))


def test_a_large_photo_is_whole_too_and_upright():
    image = smooth(1200, 800)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    for each in (
        opened(image, "JPEG", quality=95),
        opened(turned, "JPEG", quality=95, exif=exif),
    ):
        found = WholeTransform(32)(each, 0)
        expected = WholeTransform(32)(opened(image), 0)
        assert difference(found, expected) < 2
