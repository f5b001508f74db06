"""What pretraining reports beside its loss: similarities and operations."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from tests.unicl.engine.test_gradient_matrix import BATCH, build_model, samples
from tests.unicl.ranks import on_ranks
from unicl.distributed import ALONE, Ranks
from unicl.engine.task import TaskInputs
from unicl.pretraining import Pretraining, StepFlops


def check_similarities(shares, ranks=None):
    ranks = ranks or Ranks(dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    total = sum(shares)
    images, texts = normalize(torch.randn(2, total, 6, generator=generator) + 0.3, dim=-1)
    own = torch.arange(total).split(shares)[ranks.rank]
    unique, inverse = texts[own].flip(0), torch.arange(len(own)).flip(0)
    task = Pretraining(build_model(), ranks=ranks)
    towers = {"image": images[own], "text": unique, "scale": torch.tensor([5.0])}
    _, metrics = task.loss(towers, {"labels": own, "inverse": inverse})
    dense = images @ texts.T
    torch.testing.assert_close(metrics["similarity/pairs"], dense.diagonal().mean())
    torch.testing.assert_close(metrics["similarity/all"], dense.mean())


def test_similarities_are_those_of_the_dense_matrix():
    check_similarities([7], ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[4, 3], [0, 5]])
def test_similarities_are_those_of_the_whole_batch(shares):
    on_ranks(2, check_similarities, shares)


@pytest.mark.parametrize("locked", [None, "image", "text"])
def test_operations_are_three_forwards_of_what_learns(locked):
    model = build_model(locked=locked)
    model.image.train()
    batch = samples("unique")
    batch.tokens[0, -1] = 63  # one text fills the context
    flops = StepFlops(model, image_shape=(3, 24, 24), context_length=12)
    assert model.image.training  # as it was
    expected = 0.0
    for tower, rows in (("image", batch.images), ("text", batch.tokens)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(model, tower)(rows)
        expected += counter.get_total_flops() * (1 if tower == locked else 3)
    inputs = TaskInputs({"image": batch.images, "text": batch.tokens}, {})
    assert flops(inputs) == pytest.approx(expected)
    half = TaskInputs({"image": batch.images[: BATCH // 2], "text": batch.tokens}, {})
    image = flops(inputs) - flops(half)
    assert image == pytest.approx(flops.per_image * (BATCH - BATCH // 2))


def test_trimmed_texts_cost_less():
    flops = StepFlops(build_model(), image_shape=(3, 24, 24), context_length=12)
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    tokens[:, 3] = 63
    inputs = TaskInputs({"image": torch.zeros(0, 3, 24, 24), "text": tokens}, {})
    assert flops(inputs) == pytest.approx(12 * flops.per_token)
