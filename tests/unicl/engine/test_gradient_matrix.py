"""Every way to run gives the gradient of the single-process, full-batch, dense loss.

Ranks x backend x chunks x tile x sizes of the ranks' parts x labels; real towers, fp32. The whole
product under DDP; under ZeRO, which knows of neither tiles nor labels, each chunk and size.
"""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.unicl.ranks import on_ranks
from unicl.config import EngineConfig, OptimizerConfig
from unicl.distributed import Ranks
from unicl.engine.gradient_cache import backward
from unicl.engine.torch_backend import TorchBackend
from unicl.loss import reference_loss
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower

BATCH = 18
TOLERANCE = 1e-5
BACKENDS = ("torch", 0, 1, 2, 3)
PAIRED = (("repeated", "even"), ("unique", "uneven"))


@dataclass
class Samples:
    images: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, rows):
        return Samples(self.images[rows], self.tokens[rows], self.labels[rows])


def build_model(checkpointing=False, locked=None):
    torch.manual_seed(7)
    model = TwoTower(
        ImageTower("coswin_nano", embed_dim=16, image_size=24, checkpointing=checkpointing),
        TextTower(
            width=16,
            num_layers=2,
            num_heads=2,
            context_length=12,
            embed_dim=16,
            vocabulary_size=64,
            checkpointing=checkpointing,
        ),
    )
    if locked:
        model.lock(locked)
    return model


def samples(labels):
    """A batch with texts of different lengths, some of them equal."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 60, (BATCH, 12), generator=generator)
    for row, length in enumerate(torch.randint(2, 12, (BATCH,), generator=generator)):
        tokens[row, length] = 63
        tokens[row, length + 1 :] = 0
    tokens[5] = tokens[11]
    tokens[2] = tokens[3]
    numbers = torch.arange(BATCH) if labels == "unique" else torch.arange(BATCH) % 5 - 2
    images = torch.randint(0, 256, (BATCH, 3, 24, 24), generator=generator, dtype=torch.uint8)
    return Samples(images, tokens, numbers)


@functools.cache
def true_gradients(labels):
    """Differentiate the loss as the paper prints it, in one process, without any economy."""
    model, batch = build_model(), samples(labels)
    reference_loss(
        model.encode_image(batch.images),
        model.encode_text(batch.tokens, economies=False),
        batch.labels,
        model.scale(),
    ).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def build_backend(kind, task, ranks, **config):
    optimizer = OptimizerConfig(learning_rate=0.1)
    if kind == "torch":
        return TorchBackend(task, optimizer, ranks)
    from unicl.engine.deepspeed_backend import DeepSpeedBackend

    # No parameter is small enough to stay whole.
    settings = {"persistence_threshold": 0, **config}
    engine = EngineConfig(backend="deepspeed", zero_stage=kind, **settings)
    return DeepSpeedBackend(task, optimizer, ranks, engine)


def shares(size, sizes):
    """How many samples each rank has; uneven ones leave the last rank with one."""
    if sizes == "even" or size == 1:
        return [len(part) for part in torch.arange(BATCH).tensor_split(size)]
    rest = BATCH - 1
    return [len(part) for part in torch.arange(rest).tensor_split(size - 1)] + [1]


def relative_errors(backend, truth):
    """Distance over length, per tower."""
    squares = {}
    for name, gradient in backend.gradients():
        tower, expected = name.partition(".")[0], truth[name]
        difference = (gradient - expected).double().square().sum()
        error, length = squares.get(tower, (0.0, 0.0))
        squares[tower] = (error + difference, length + expected.double().square().sum())
    return {tower: float((e / n).sqrt()) for tower, (e, n) in squares.items()}


def check_backend(kind, ways=((1, 2048), (4, 3)), batches=PAIRED, **config):
    """Try each way (chunks and tile) on each batch (labels and sizes of the ranks' parts)."""
    ranks = Ranks(dist.group.WORLD)
    task = Pretraining(build_model(config.pop("checkpointing", False)), ranks=ranks)
    backend = build_backend(kind, task, ranks, **config)
    failures = []
    for labels, sizes in batches:
        if sizes == "uneven" and ranks.size == 1:
            continue
        batch = samples(labels)
        truth = true_gradients(labels)
        counts = shares(ranks.size, sizes)
        own = torch.arange(BATCH).split(counts)[ranks.rank]
        inputs = task.inputs(batch[own])
        for count, tile in ways:
            task.tile = tile
            backward(task, backend, inputs, chunks=count)
            errors = relative_errors(backend, truth)
            norms = backend.gradient_norms()
            backend.drop()
            for tower, error in errors.items():
                length = torch.stack([g.norm() for n, g in truth.items() if n.startswith(tower)])
                off = abs(norms[tower] / float(length.norm()) - 1)
                if not (error < TOLERANCE and off < TOLERANCE):
                    failures.append((labels, sizes, count, tile, tower, error, off))
    assert not failures, f"{kind} {config} {failures}"


def check_all():
    every_way = [*itertools.product((1, 4), (3, 2048))]
    every_batch = [*itertools.product(("unique", "repeated"), ("even", "uneven"))]
    check_backend("torch", every_way, every_batch)
    for stage in BACKENDS[1:]:
        check_backend(stage)
    if dist.get_world_size() == 2:
        cached = [(4, 3)]
        for stage in (1, 2, 3):
            check_backend(stage, cached, reduce_every="chunk")
        check_backend(3, cached, checkpointing=True)
        for stage, every in itertools.product((1, 2, 3), ("step", "chunk")):
            offload = {"offload_optimizer": True, "offload_parameters": stage == 3}
            check_backend(stage, cached, reduce_every=every, **offload)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_way_to_run_gives_the_true_gradient(size):
    on_ranks(size, check_all)
