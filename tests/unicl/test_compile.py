"""Compiled towers compute what the others do, under the same names."""

import copy

import pytest
import torch
import torch.distributed as dist

from tests.unicl.engine.test_gradient_matrix import TOLERANCE, build_backend, relative_errors
from tests.unicl.ranks import on_ranks
from unicl.distributed import Ranks
from unicl.engine.gradient_cache import backward
from unicl.loss import reference_loss
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower, tokenize
from unicl.towers.two_tower import TwoTower

COLOURS = ("red", "green", "blue", "a black", "a very white", "grey", "gold", "cyan")
TEXTS = [f"{colour} square" for colour in COLOURS]


def small_model(checkpointing=True):
    torch.manual_seed(7)
    return TwoTower(
        ImageTower("test_vit", embed_dim=8, image_size=32, checkpointing=checkpointing),
        TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8, checkpointing=checkpointing),
    )


def check_gradients():
    """Checkpointed, under DDP, in chunks whose sizes and lengths differ."""
    ranks = Ranks(dist.group.WORLD)
    torch.manual_seed(3)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    tokens, labels = tokenize(TEXTS), torch.arange(8)
    plain = small_model(checkpointing=False)
    texts = plain.encode_text(tokens, economies=False)
    reference_loss(plain.encode_image(images), texts, labels, plain.scale()).backward()
    truth = {name: p.grad for name, p in plain.named_parameters()}
    model = small_model()
    # All of the compiler but its slow last stage, which is torch's own; one tower takes it too.
    model.image.compile(backend="aot_eager")
    model.text.compile(backend="inductor" if ranks.first else "aot_eager")
    assert model.state_dict().keys() == plain.state_dict().keys()
    task = Pretraining(model, ranks=ranks)
    backend = build_backend("torch", task, ranks)
    own = torch.arange(8).tensor_split(ranks.size)[ranks.rank]
    batch = Batch(images[own], tokens[own], labels[own])
    # Two rows a chunk: of one row, compiled ViTs give class token and positions one gradient tensor
    # to share (torch 2.15), which the next chunk is then added to twice.
    backward(task, backend, task.inputs(batch), chunks=2)
    for tower, error in relative_errors(backend, truth).items():
        assert error < TOLERANCE, (tower, error)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    copy.deepcopy(model).to("meta")  # what backends keep of it


class Batch:
    def __init__(self, images, tokens, labels):
        self.images, self.tokens, self.labels = images, tokens, labels


@pytest.mark.slow
def test_compiled_towers_have_the_true_gradients():
    on_ranks(2, check_gradients)
