"""Small towers with weights of all sorts, and the folders that refuse them."""

import torch

from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower

TEXTS = ["a photo of a cat", "!", "a cat", "two dogs that chase a red ball"]


def small_model(image="coswin_nano", *, image_size=48, text=None, **options):
    torch.manual_seed(0)
    model = TwoTower(
        ImageTower(image, embed_dim=24, image_size=image_size, **options),
        TextTower(
            **{"width": 64, "num_heads": 2, "num_layers": 2, "embed_dim": 24, "context_length": 20}
            | (text or {})
        ),
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def random_pixels(size, number=3):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
