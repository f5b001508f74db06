"""Regions of known places and colours, and the whole image as a region."""

import pytest
import torch
from torch import Tensor, nn

from adapters.detection.regions import cropped_embeddings, name_proposals, pooled_embeddings
from unicl.errors import UsageError
from unicl.towers.image import ImageTower
from unicl.towers.two_tower import TwoTower

RED, GREEN, BLUE = [255, 0, 0], [0, 255, 0], [0, 0, 255]


class Colours(nn.Module):
    """A backbone whose map is the image in small, and whose feature is the mean colour."""

    num_features = 3

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.shrink = nn.AvgPool2d(stride)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.shrink(images)

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def colours(stride: int = 8) -> TwoTower:
    """Towers whose embedding of an image is the direction of its mean colour."""
    tower = ImageTower("colours", embed_dim=3, backbone=Colours(stride))
    tower.mean.zero_()
    tower.std.fill_(255)
    nn.init.eye_(tower.projection.weight)
    return TwoTower(tower, nn.Identity())


def four_quarters() -> Tensor:
    """Return an image of 64 x 96 pixels: red and green above, blue and red below."""
    image = torch.empty(3, 64, 96, dtype=torch.uint8)
    for colour, rows, columns in (
        (RED, slice(0, 32), slice(0, 48)),
        (GREEN, slice(0, 32), slice(48, 96)),
        (BLUE, slice(32, 64), slice(0, 48)),
        (RED, slice(32, 64), slice(48, 96)),
    ):
        image[:, rows, columns] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


QUARTERS = torch.tensor([[0.0, 0, 48, 32], [48, 0, 96, 32], [0, 32, 48, 64], [48, 32, 96, 64]])
EMBEDDED = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("inner", [0, 8])
def test_regions_have_the_colours_of_their_places(inner: int) -> None:
    boxes = QUARTERS + inner * torch.tensor([1, 1, -1, -1])
    model, image = colours(), four_quarters()
    torch.testing.assert_close(cropped_embeddings(model, image, boxes, size=16), EMBEDDED)
    if inner:  # RoIAlign looks half a cell over the border
        torch.testing.assert_close(pooled_embeddings(model, image, boxes), EMBEDDED)


def test_a_region_between_two_colours_is_both() -> None:
    boxes = torch.tensor([[24.0, 4, 72, 28]])
    both = torch.tensor([[0.5, 0.5, 0]]).sqrt()
    for embeddings in (
        pooled_embeddings(colours(), four_quarters(), boxes),
        cropped_embeddings(colours(), four_quarters(), boxes, size=16),
    ):
        torch.testing.assert_close(embeddings, both)


@pytest.mark.parametrize(
    "name", ["coswin_tiny", "resnet10t", "convnext_atto", "mobilenetv3_small_050"]
)
def test_the_whole_image_pools_to_the_images_embedding(name: str) -> None:
    torch.manual_seed(0)
    tower = ImageTower(name, embed_dim=16)
    model = TwoTower(tower, nn.Identity()).eval()
    for size in ((64, 96), (70, 90)):
        image = noise(*size)
        box = torch.tensor([[0.0, 0, size[1], size[0]]])
        with torch.no_grad():
            expected = model.encode_image(image[None])
        found = pooled_embeddings(model, image, box)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pooling_is_averaging_the_cells_of_the_region() -> None:
    torch.manual_seed(0)
    model = TwoTower(ImageTower("coswin_tiny", embed_dim=16), nn.Identity()).eval()
    image, tower = noise(128, 160), model.image
    with torch.no_grad():
        pixels = (image - tower.mean) / tower.std
        last = tower.backbone.pyramid(pixels[None])[-1]
        # Cells 1..2 of 4 rows and 1..3 of 5 columns, of 32 pixels each.
        cells = last[0, :, 1:3, 1:4].mean((1, 2))
        expected = nn.functional.normalize(tower.projection(cells), dim=0)
    found = pooled_embeddings(model, image, torch.tensor([[32.0, 32, 128, 96]]))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_tokens_are_no_map() -> None:
    tower = ImageTower("vit_tiny_patch16_224", embed_dim=16)
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224 has no map .*regions to crop"):
        pooled_embeddings(TwoTower(tower, nn.Identity()), noise(224, 224), torch.zeros(1, 4))


DEGENERATE = torch.tensor(
    [
        [10.0, 10, 10, 10],  # a point
        [20.2, 5, 20.4, 30],  # thin
        [96, 64, 96, 64],  # the last corner
        [-20, -20, -10, -10],  # outside
        [500, 40, 600, 50],
        [30, 30, 20, 20],  # inside out
        [-1e9, -1e9, 1e9, 1e9],
    ]
)


def test_degenerate_boxes_are_a_pixel() -> None:
    model, image = colours(), four_quarters()
    for embeddings in (
        pooled_embeddings(model, image, DEGENERATE),
        cropped_embeddings(model, image, DEGENERATE, size=8, context=1.5),
    ):
        assert embeddings.isfinite().all()
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(DEGENERATE)))
        # Who is outside has the colour of the border next to it.
        torch.testing.assert_close(embeddings[[0, 3, 4]], EMBEDDED[[0, 0, 3]])


@pytest.mark.parametrize("way", [pooled_embeddings, cropped_embeddings])
def test_no_box(way) -> None:
    size = {"size": 8} if way is cropped_embeddings else {}
    found = way(colours(), four_quarters(), torch.zeros(0, 4), **size)
    assert found.shape == (0, 3)


def test_crops_are_those_of_batches_of_any_size() -> None:
    model, image = colours(), noise(40, 50)
    low = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) * 30
    boxes = torch.cat([low, low + 7], 1)
    whole = cropped_embeddings(model, image, boxes, size=16)
    torch.testing.assert_close(
        cropped_embeddings(model, image, boxes, size=16, batch_size=4), whole
    )


def test_context_shows_what_is_around() -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[1] = 255
    image[:, 16:24, 16:24] = torch.tensor(RED, dtype=torch.uint8)[:, None, None]
    box = torch.tensor([[16.0, 16, 24, 24]])
    red = cropped_embeddings(colours(), image, box, size=64)[0]
    assert red.tolist() == [1, 0, 0]
    around = cropped_embeddings(colours(), image, box, size=64, context=2.0)[0]
    assert (around[1] / around[0]).item() == pytest.approx(3, rel=0.05)  # 64 of 256 pixels are red


def test_a_score_is_objectness_times_the_share_of_the_class() -> None:
    embeddings, classes = torch.eye(3)[:2], torch.eye(3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    objectness = torch.tensor([0.9, 0.4])
    found = name_proposals(embeddings, objectness, boxes, classes, scale=4.0)
    own = torch.tensor([4.0, 0, 0]).softmax(0)
    # Every class of every proposal: the own one of each first.
    assert found.labels[:2].tolist() == [0, 1]
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    expected = torch.stack([0.9 * own[0], 0.4 * own[0], *[0.9 * own[1]] * 2, *[0.4 * own[1]] * 2])
    torch.testing.assert_close(found.scores, expected)
    assert torch.equal(found.boxes[:2], boxes)
    assert torch.equal(found.boxes[2:], boxes[[0, 0, 1, 1]])


def test_proposals_of_one_class_do_not_overlap() -> None:
    embeddings = torch.eye(2)[[0, 0, 1]]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    objectness = torch.tensor([0.5, 0.9, 0.4])
    found = name_proposals(embeddings, objectness, boxes, torch.eye(2), scale=50.0)
    assert torch.equal(found.boxes, boxes[1:])
    assert found.labels.tolist() == [0, 1]
    best = name_proposals(embeddings, objectness, boxes, torch.eye(2), scale=50.0, most=1)
    assert torch.equal(best.boxes, boxes[1:2])


def test_the_only_class_has_the_scores_of_objectness() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    objectness = torch.tensor([0.3, 0.8])
    found = name_proposals(-torch.eye(2), objectness, boxes, torch.eye(2)[:1], scale=100.0)
    torch.testing.assert_close(found.scores, objectness.flip(0))


def test_no_proposal() -> None:
    none = torch.zeros(0, 4)
    found = name_proposals(torch.zeros(0, 3), none[:, 0], none, torch.eye(3), scale=10.0)
    assert found.boxes.shape == (0, 4)
