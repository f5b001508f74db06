"""One file of two: what comes out of it, and under which reason it is left out."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.depth.rgbd import RgbdDecoder, join, part
from tests.adapters.depth.rooms import png
from unicl.data.augment import EvalTransform, TrainTransform
from unicl.data.reader import Decode, ImageDecoder
from unicl.data.shards import SampleError

MILLION = 1_000_000
WHOLE = RgbdDecoder(EvalTransform(32, crop=1.0), MILLION)


def noise(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plane(millimetres: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width), millimetres, np.uint16)


def test_the_joined_file_is_both_and_shows_as_the_image() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        file = BytesIO()
        Image.fromarray(noise()).save(file, kind)
        image, depth = file.getvalue(), png(plane(700))
        assert part(join(image, depth)) == (image, depth)
        alone = ImageDecoder(EvalTransform(32), MILLION)
        assert torch.equal(alone(join(image, depth), 0), alone(image, 0))
    assert part(join(image, b"")) == (image, b"")


def test_four_channels_of_bytes() -> None:
    assert isinstance(WHOLE, Decode)
    pixels, depth = noise(), plane(1000)
    decoded = WHOLE(join(png(pixels), png(depth)), 0)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (4, 32, 32))
    assert torch.equal(decoded[:3], torch.from_numpy(pixels.transpose(2, 0, 1)))
    assert decoded[3].unique().tolist() == [128]
    assert WHOLE.empty().shape == (0, 4, 32, 32)
    assert WHOLE.empty().dtype == torch.uint8


@pytest.mark.parametrize(
    ("value", "unit", "nearest", "byte"),
    [
        (0, 0.001, 0.5, 0),
        (300, 0.001, 0.5, 255),
        (500, 0.001, 0.5, 255),
        (2550, 0.001, 0.5, 50),
        (10_000, 0.001, 0.5, 13),
        (65_535, 0.001, 0.1, 1),  # far, but measured
        (5000, 1 / 5000, 0.5, 128),  # TUM RGB-D: one metre
        (8000, 1 / 8000, 0.5, 128),  # SUN RGB-D: one metre
        (2000, 0.001, 1.0, 128),
    ],
)
def test_disparity(value: int, unit: float, nearest: float, byte: int) -> None:
    decoder = RgbdDecoder(EvalTransform(32, crop=1.0), MILLION, unit=unit, nearest=nearest)
    assert decoder(join(png(noise()), png(plane(value))), 0)[3].unique().tolist() == [byte]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [TrainTransform, EvalTransform])
def test_image_and_depth_are_cut_and_mirrored_alike(kind: Callable, seed: int) -> None:
    """A depth map whose disparity is the image's own grey comes out like the image."""
    options = {"scale": (0.1, 0.6), "flip": True} if kind is TrainTransform else {}
    smooth = Image.fromarray(noise(6, 8, seed)[..., 0]).resize((80, 60), Image.Resampling.BICUBIC)
    grey = np.asarray(smooth).clip(20, 255)
    depth = np.round(255 * 500 / grey.astype(float)).astype(np.uint16)
    image = png(np.repeat(grey[..., None], 3, axis=2))
    decoded = RgbdDecoder(kind(24, **options), MILLION)(join(image, png(depth)), seed).int()
    assert (decoded[3] - decoded[0]).abs().max() <= 2
    assert decoded[0].float().std() > 5


def test_a_smaller_depth_map_is_enlarged() -> None:
    depth = np.repeat(plane(1000, 24, 16), 2, axis=1)
    depth[:, 16:] = 2550
    decoded = WHOLE(join(png(noise(95, 128)), png(depth)), 0)[3]
    assert decoded[:, :14].unique().tolist() == [128]
    assert decoded[:, 18:].unique().tolist() == [50]


def test_holes_stay_holes_and_spoil_no_neighbour() -> None:
    depth = plane(1000, 64, 64)
    depth[:, :32] = 0
    depth[10, 40] = 0
    decoded = WHOLE(join(png(noise(64, 64)), png(depth)), 0)[3]
    assert decoded[:, :15].max() == 0
    assert decoded[:, 17:].min() >= 126
    assert decoded[:, 17:].max() <= 130  # bytes of both means are rounded


def test_a_photo_that_lies_on_its_side_is_as_upright_as_its_depth() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    Image.fromarray(noise(40, 60)).save(file, "JPEG", exif=exif)
    assert WHOLE(join(file.getvalue(), png(plane(1000, 60, 40))), 0).shape == (4, 32, 32)
    with pytest.raises(SampleError, match="another shape"):
        WHOLE(join(file.getvalue(), png(plane(1000, 40, 60))), 0)


def test_an_image_alone_has_no_known_depth() -> None:
    lenient = replace(WHOLE, depthless=True)
    image, depth = png(noise()), png(plane(1000))
    assert torch.equal(lenient(join(image, depth), 0), WHOLE(join(image, depth), 0))
    decoded = lenient(image, 0)
    assert torch.equal(decoded[:3], WHOLE(join(image, depth), 0)[:3])
    assert decoded[3].max() == 0
    with pytest.raises(SampleError, match="undecodable depth"):
        lenient(join(image, b""), 0)


def rough() -> np.ndarray:
    return noise()[..., 0].astype(np.uint16)


def halved(encoded: bytes) -> bytes:
    return encoded[: len(encoded) // 2]


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (png(noise()), "no depth"),
        (b"", "no depth"),
        (join(png(noise()), b"")[-16:], "undecodable image"),
        (join(png(noise()), b"x")[-16:], "no depth"),
        (join(png(noise()), b""), "undecodable depth"),
        (join(png(noise()), png(noise()[..., 0])), "depth is not of 16 bits"),
        (join(png(noise()), png(noise())), "depth is not of 16 bits"),
        (join(png(noise()), png(plane(9, 32, 40))), "depth of another shape"),
        (join(png(noise()), png(plane(9, 10, 12))), "depth of another shape"),
        (join(png(noise()), halved(png(rough()))), "undecodable depth"),
        (join(halved(png(noise())), png(plane(9))), "undecodable image"),
        (join(png(noise(1001, 1000)), png(plane(9, 1001, 1000))), "image too large"),
        (join(png(noise()), png(plane(9, 1001, 1001))), "depth too large"),
    ],
)  # fmt: skip
def test_defects_have_a_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        WHOLE(encoded, 0)
    assert caught.value.reason == reason
