"""A locked tower stays as it is, costs no optimizer state, and is saved like everything else."""

import pytest
import torch
import torch.distributed as dist

from tests.unicl.engine.test_gradient_matrix import (
    BACKENDS,
    BATCH,
    TOLERANCE,
    build_backend,
    build_model,
    relative_errors,
    samples,
    true_gradients,
)
from tests.unicl.ranks import on_ranks
from unicl.distributed import Ranks
from unicl.engine.gradient_cache import backward
from unicl.pretraining import Pretraining

IDLE = "image.backbone.layers.3.blocks.0.attn.relative_position_bias_table"
"""One token attends to itself at 24 pixels, so its bias has no gradient."""


def check_all():
    for kind in BACKENDS:
        check_backend(kind, "image")
    check_backend(3, "text")


def check_backend(kind, locked):
    ranks = Ranks(dist.group.WORLD)
    task = Pretraining(build_model(locked=locked), ranks=ranks)
    backend = build_backend(kind, task, ranks)
    inputs = task.inputs(
        samples("unique")[torch.arange(BATCH).tensor_split(ranks.size)[ranks.rank]]
    )
    before = build_model().state_dict()
    free = {name for name in before if not name.startswith(f"{locked}.")}
    assert backend.sizes.keys() == free
    for chunks in (1, 4):
        backend.drop()
        backward(task, backend, inputs, chunks=chunks)
        for tower, error in relative_errors(backend, true_gradients("unique")).items():
            assert error < TOLERANCE, (kind, locked, chunks, tower)
    backend.step(0.1, norm=1.0)
    saved, moments = backend.weights(), backend.moments(free)
    assert {key.partition(":")[2] for key in moments} == free
    if ranks.first:
        assert saved.keys() == before.keys()
        changed = {name for name, value in saved.items() if not torch.equal(value, before[name])}
        assert changed == free - {IDLE}, (kind, locked, changed ^ free)


@pytest.mark.slow
def test_a_locked_tower_changes_no_other_gradient_and_is_saved():
    on_ranks(2, check_all)
