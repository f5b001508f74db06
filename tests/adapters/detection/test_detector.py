import pytest
import torch
from torch import nn

from adapters.detection.config import DetectionConfig
from adapters.detection.detector import Detector
from tests.unicl.evaluation.toys import tokenize
from unicl.errors import UsageError
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower


def small(classes="texts", num_levels=5, **given):
    torch.manual_seed(0)
    config = DetectionConfig(classes=classes, width=32, num_blocks=1, num_levels=num_levels)
    text = TextTower(
        width=16, num_layers=1, num_heads=2, context_length=8, embed_dim=12, vocabulary_size=64
    )
    tower = ImageTower("coswin_nano", embed_dim=12, image_size=32)
    return Detector(tower, text, config, num_classes=7, embed_dim=12, **given).eval()


def pixels(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 160), (224, 96)])
@pytest.mark.parametrize("num_levels", [3, 5])
def test_there_is_an_anchor_for_each_prediction(size, num_levels):
    model = small("numbers", num_levels)
    with torch.no_grad():
        places = model.places(pixels(2, 3, *size))
    anchors = model.anchors(*size)
    assert len(anchors) == num_levels
    assert places.shape == (2, sum(map(len, anchors)), 7 + 5)
    for level, each in enumerate(anchors):
        stride = 8 * 2**level
        assert (each[:, 2] - each[:, 0] == 8 * stride).all()
        assert len(each) == -(-size[0] // stride) * -(-size[1] // stride)


def test_places_are_in_the_order_of_the_anchors():
    """A change in a corner is seen most by what is predicted there."""
    model = small("numbers", 3)
    images = pixels(1, 3, 128, 192)
    changed = images.clone()
    changed[:, :, :16, 176:] = 255 - changed[:, :, :16, 176:]
    with torch.no_grad():
        model.head = nn.Identity()  # its attention sees all
        model.pyramid.norms = nn.ModuleList(nn.Identity() for _ in range(3))
        one, other = model.places(images), model.places(changed)
    first = model.anchors(128, 192)[0]
    place = (one - other)[0, : len(first)].norm(dim=1).argmax()
    x, y = ((first[place, :2] + first[place, 2:]) / 2).tolist()
    assert x > 150
    assert y < 42


@pytest.mark.parametrize(("classes", "outputs"), [("texts", 12), ("numbers", 7), ("none", 1)])
def test_what_is_predicted(classes, outputs):
    model = small(classes, 3)
    with torch.no_grad():
        places = model.places(pixels(2, 3, 64, 64))
        assert places.shape[2] == outputs + 5
        names = None
        if classes == "texts":
            names = model.name_embeddings(torch.tensor([[1, 5, 63, 0], [1, 9, 63, 0]]))
        logits, deltas, centerness = model.predict(places, names)
    assert logits.shape == (2, 84, 2 if names is not None else outputs)
    assert torch.equal(deltas, places[..., -5:-1])
    assert torch.equal(centerness, places[..., -1])
    if names is None:  # at the start all is taken for background
        assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)


def test_logits_are_similarities():
    model = small()
    places = torch.randn(1, 6, 12 + 5)
    names = nn.functional.normalize(torch.randn(4, 12), dim=1)
    expected = torch.cosine_similarity(places[..., None, :12], names, dim=-1)
    torch.testing.assert_close(
        model.predict(places, names, torch.tensor([3.0, -0.5])).logits, 3 * expected - 0.5
    )
    scale, bias = model.class_fit().tolist()
    assert scale == pytest.approx(10)
    torch.testing.assert_close(model.predict(places, names).logits, scale * expected + bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.predict(places, names).logits, scale * expected + bias)


def test_texts_need_names():
    with pytest.raises(UsageError, match="by name: give it names"):
        small().predict(torch.zeros(1, 6, 17))


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_no_image(size):
    model = small("numbers", 3)
    places = model.places(pixels(0, 3, *size))
    assert places.shape == (0, sum(map(len, model.anchors(*size))), 12)
    places.sum().backward()
    assert model.predictor.boxes.weight.grad.abs().sum() == 0


def test_it_still_embeds():
    model = small()
    with torch.no_grad():
        assert model.encode_image(pixels(2, 3, 32, 32)).shape == (2, 12)
        assert model.encode_text(tokenize(["cat"]) % 64).shape == (1, 12)
    assert not model.logit_scale.requires_grad
    assert not model.image.projection.weight.requires_grad


def test_images_of_a_batch_do_not_see_each_other():
    model = small("numbers", 3)
    with torch.no_grad():
        alone = model.places(pixels(1, 3, 64, 64))
        together = model.places(torch.cat([pixels(1, 3, 64, 64), pixels(1, 3, 64, 64)]))
    torch.testing.assert_close(together, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-5)
