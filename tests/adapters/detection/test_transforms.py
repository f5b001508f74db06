"""Transforms of detection: a box stays where its object is, and the seed alone decides."""

from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from adapters.detection.transforms import EvalTransform, TrainTransform, pad, resized
from unicl.errors import UsageError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def scene(height: int, width: int, *boxes: tuple[int, int, int, int]):
    """Black, with a red rectangle, a blue one, ... at whole pixels."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for (left, top, right, bottom), colour in zip(boxes, (RED, BLUE), strict=False):
        image[:, top:bottom, left:right] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return image, truth, torch.arange(len(boxes)) + 7


def found(image: torch.Tensor, colour) -> list[float]:
    """Return the box around the pixels that are mostly of a colour."""
    channel = image[colour.index(255)]
    sides = []
    for line in (channel.amax(0), channel.amax(1)):
        (inside,) = torch.where(line > 127)
        sides.append((int(inside[0]), int(inside[-1]) + 1))
    (left, right), (top, bottom) = sides
    return [left, top, right, bottom]


SHAPES = ((60, 80), (80, 60), (64, 64), (30, 900), (900, 30), (500, 700))


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.4, 0.9)])
def test_boxes_stay_on_their_objects(height, width, flip, crop_scale):
    transform = TrainTransform((64, 96, 160), 240, flip=flip, crop_scale=crop_scale)
    red = (width // 8, height // 6, width // 2, height // 2)
    blue = (width * 5 // 8, height * 2 // 3, width - 3, height - 2)
    seen = 0
    for seed in range(24):
        image, boxes, labels = transform(*scene(height, width, red, blue), seed)
        assert image.dtype == torch.uint8
        assert boxes.dtype == torch.float32
        assert max(image.shape[1:]) <= 240
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            np.testing.assert_allclose(found(image, (RED, BLUE)[label - 7]), box, atol=0.6)
            seen += 1
    assert seen > 24


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_evaluation_keeps_all_of_the_image(height, width):
    red = (3, 2, width // 2, height // 2)
    image, boxes, labels = EvalTransform(64, 320)(*scene(height, width, red))
    assert image.shape[1:] == resized(height, width, 64, 320)
    assert labels.tolist() == [7]
    np.testing.assert_allclose(found(image, RED), boxes[0], atol=0.6)
    scale = torch.tensor([image.shape[2] / width, image.shape[1] / height]).repeat(2)
    torch.testing.assert_close(boxes[0], torch.tensor(red) * scale)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (427, 640), (640, 640), (200, 1400)])
def test_sizes_are_torchvisions(height, width):
    # It rounds down where we round to the nearest.
    oracle = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3, size_divisible=1)
    images, _ = oracle([torch.zeros(3, height, width)])
    np.testing.assert_allclose(resized(height, width, 800, 1333), images.image_sizes[0], atol=1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (2, 7)])
def test_the_thinnest_images_work(height, width):
    image, boxes, labels = EvalTransform(32, 64)(*scene(height, width, (0, 0, width, height)))
    assert min(image.shape[1:]) >= 1
    assert boxes.tolist() == [[0, 0, image.shape[2], image.shape[1]]]
    assert labels.tolist() == [7]
    transform = TrainTransform((32,), 64, flip=True, crop_scale=(0.1, 0.2))
    for seed in range(8):
        image, boxes, _ = transform(*scene(height, width, (0, 0, width, height)), seed)
        assert min(image.shape[1:]) >= 1
        assert len(boxes) == 1


def test_boxes_end_at_the_image_and_specks_are_dropped():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[-9.0, 5, 99, 20], [10, 10, 11, 30], [50, 50, 60, 60], [8, 8, 8, 30]])
    _, kept, labels = EvalTransform(20, 20)(image, boxes, torch.arange(4))
    assert labels.tolist() == [0]
    torch.testing.assert_close(kept, torch.tensor([[0, 2.5, 20, 10]]))
    # At twice the size the second is wide enough.
    assert EvalTransform(80, 80)(image, boxes, torch.arange(4))[2].tolist() == [0, 1]


def test_arguments_are_left_as_they_were():
    image, boxes, labels = scene(40, 60, (-5, 3, 30, 20))
    copies = image.clone(), boxes.clone(), labels.clone()
    TrainTransform((32,), 64, flip=True, crop_scale=(0.5, 0.8))(image, boxes, labels, 3)
    for value, copy in zip((image, boxes, labels), copies, strict=True):
        assert torch.equal(value, copy)


def test_an_image_without_boxes():
    transform = TrainTransform((32,), 64, flip=True, crop_scale=(0.5, 0.8))
    shapes = set()
    for seed in range(8):
        image, boxes, labels = transform(*scene(40, 60), seed)
        shapes.add(image.shape)
        assert boxes.shape == (0, 4)
        assert labels.shape == (0,)
    assert len(shapes) > 4, "it is cropped, too"


def test_a_crop_keeps_the_boxes_whose_centre_it_has():
    transform = TrainTransform((100,), 100, flip=False, crop_scale=(0.5, 0.5))
    # The larger side of a square is the smaller one too: the crop is magnified twice.
    boxes = torch.tensor([[x, y, x + 10.0, y + 10.0] for x in range(91) for y in (5, 35, 65)])
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    places = set()
    for seed in range(30):
        _, kept, labels = transform(image, boxes, torch.arange(len(boxes)), seed)
        whole = (kept > 0).all(1) & (kept < 100).all(1)
        shift = boxes[labels][whole][:, :2] - kept[whole][:, :2] / 2
        left, top = shift[0].tolist()
        np.testing.assert_allclose(shift, shift[:1].expand_as(shift), atol=1e-4)
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
        inside = (x > left) & (x < left + 50) & (y > top) & (y < top + 50)
        assert labels.tolist() == torch.where(inside)[0].tolist()
        places.add((left, top))
    assert len(places) > 25


def test_a_crop_that_finds_no_object_is_no_crop():
    # Only a crop with this corner would have the centre.
    image, boxes, labels = scene(100, 100, (0, 0, 1, 1))
    transform = TrainTransform((100,), 100, flip=False, crop_scale=(0.1, 0.1))
    for seed in range(20):
        pixels, kept, _ = transform(image, boxes, labels, seed)
        assert len(kept) == 1
        np.testing.assert_allclose(found(pixels, RED), kept[0], atol=0.6)


def test_sizes_and_mirroring_are_drawn_evenly():
    transform = TrainTransform((20, 30, 40, 50), 100, flip=True)
    image, boxes, labels = scene(10, 20, (0, 0, 5, 10))
    drawn = [transform(image, boxes, labels, seed) for seed in range(600)]
    sides = [min(pixels.shape[1:]) for pixels, _, _ in drawn]
    # Standard deviations: 0.018, 0.020 and 0.041.
    for side in (20, 30, 40, 50):
        assert abs(sides.count(side) / 600 - 1 / 4) < 0.08
    mirrored = [bool(kept[0, 0] > 0) for _, kept, _ in drawn]
    assert abs(np.mean(mirrored) - 0.5) < 0.08
    by_side = np.mean([m for m, side in zip(mirrored, sides, strict=True) if side == 20])
    assert abs(by_side - 0.5) < 0.17


def test_the_seed_alone_decides_on_any_thread():
    transform = TrainTransform((20, 30, 40), 60, flip=True, crop_scale=(0.3, 1.0))
    sample = scene(40, 50, (5, 5, 30, 30), (30, 20, 48, 38))
    first = [transform(*sample, seed) for seed in range(12)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again: dict[int, tuple] = {}

    def work(seeds):
        again.update({seed: transform(*sample, seed) for seed in seeds})

    threads = [Thread(target=work, args=(seeds,)) for seeds in ((11, 3, 5, 0), (7, 2, 9, 1))]
    for thread in threads:
        thread.start()
    work((10, 4, 6, 8))
    for thread in threads:
        thread.join()
    for seed, values in enumerate(first):
        for value, same in zip(values, again[seed], strict=True):
            assert torch.equal(value, same)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert len({tuple(values[0].shape) for values in first}) > 6


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_of_all_modes(mode):
    tensor, boxes, labels = scene(40, 60, (10, 10, 30, 30))
    picture = Image.fromarray(tensor.permute(1, 2, 0).numpy()).convert(mode)
    image, kept, _ = EvalTransform(20, 100)(picture, boxes, labels)
    assert image.shape == (3, 20, 30)
    expected = torch.tensor(np.asarray(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(image, EvalTransform(20, 100)(expected, boxes, labels)[0])
    assert kept.tolist() == [[5, 5, 15, 15]]


def test_pictures_are_set_upright():
    tensor, _, labels = scene(40, 60, (10, 10, 30, 20))
    picture = Image.fromarray(tensor.permute(1, 2, 0).numpy())
    picture.getexif()[0x0112] = 6
    picture.info["exif"] = picture.getexif().tobytes()
    # A quarter clockwise: what was at the left is at the top.
    boxes = torch.tensor([[20.0, 10, 30, 30]])
    image, kept, _ = EvalTransform(40, 100)(picture, boxes, labels)
    assert image.shape == (3, 60, 40)
    np.testing.assert_allclose(found(image, RED), kept[0], atol=0.6)


def test_padding_is_at_right_and_bottom_in_the_mean_colour():
    images = [
        torch.full((3, height, width), 9, dtype=torch.uint8)
        for height, width in ((33, 20), (10, 64))
    ]
    batch = pad(images)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == torch.uint8
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8)
    for image, place in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        assert (place[:, :height, :width] == 9).all()
        assert (place[:, height:] == mean[:, None, None]).all()
        assert (place[:, :, width:] == mean[:, None, None]).all()
    assert pad(images, multiple=7).shape == (2, 3, 35, 70)
    assert pad(images[:1], multiple=1).shape == (1, 3, 33, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainTransform((), 8, flip=False), "must be positive"),
        (lambda: TrainTransform((4, 0), 8, flip=False), r"\(4, 0\) and 8"),
        (lambda: TrainTransform((4,), 8, flip=False, crop_scale=(0.0, 1.0)), "crop_scale"),
        (lambda: TrainTransform((4,), 8, flip=False, crop_scale=(0.9, 0.5)), "crop_scale"),
        (lambda: EvalTransform(8, 0), "8 and 0"),
        (lambda: pad([]), "at least one image"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
