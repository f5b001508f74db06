"""The weights' moving average: its values, who holds it, and that it survives everything."""

import contextlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.unicl.engine.test_gradient_matrix import (
    BACKENDS,
    BATCH,
    build_model,
    samples,
)
from tests.unicl.engine.test_optimizer import build_rated
from tests.unicl.engine.test_trainer import DyingLoader, Killed, assert_equal_runs, make
from tests.unicl.ranks import on_ranks
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE, Ranks
from unicl.engine.checkpoint import checkpoints, load_moments, load_weights, save_checkpoint
from unicl.engine.gradient_cache import backward
from unicl.engine.torch_backend import TorchBackend
from unicl.pretraining import Pretraining

AVERAGED = OptimizerConfig(learning_rate=1e-3, ema_decay=0.6)


def averaging(folder, **settings):
    trainer = make(folder, **settings)
    trainer._make_backend = lambda: TorchBackend(trainer.task, AVERAGED, ALONE)
    return trainer


def test_the_average_is_the_recurrence(tmp_path):
    """Decay 2/11, 3/12, 4/13, ... until 0.6; it starts with the weights after the first update."""
    trainer = averaging(tmp_path, steps=20)
    average = {}
    updates = 0
    step = TorchBackend.step

    def step_and_average(backend, *args, **options):
        nonlocal updates
        step(backend, *args, **options)
        updates += 1
        decay = min(0.6, (1 + updates) / (10 + updates))
        for name, value in backend.encoder.model.state_dict().items():
            old = average.get(name, value)
            average[name] = decay * old.double() + (1 - decay) * value.double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchBackend, "step", step_and_average)
        trainer.fit()
    saved = trainer.backend.weights(averaged=True)
    raw = trainer.backend.weights()
    assert updates == 20
    assert saved.keys() == average.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, raw[name])


@pytest.mark.parametrize("death", [1, 6, 9])
def test_a_killed_run_keeps_its_average_bit_for_bit(tmp_path, death):
    whole = averaging(tmp_path / "whole")
    whole.fit()
    dying = averaging(tmp_path / "cut", loader=DyingLoader(death))
    with contextlib.suppress(Killed):
        dying.fit()
    resumed = averaging(tmp_path / "cut")
    resumed.fit()
    assert_equal_runs(whole, resumed)
    assert_equal(whole.backend.weights(averaged=True), resumed.backend.weights(averaged=True))


def test_the_average_is_evaluated_and_the_weights_go_on(tmp_path):
    seen = []

    def look(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"toy/score": 0.5}

    plain, looked = averaging(tmp_path / "plain"), averaging(tmp_path / "looked", evaluators=[look])
    plain.fit()
    looked.fit()
    (found,) = seen
    saved = load_file(checkpoints(tmp_path / "looked" / "checkpoints")[-1] / "ema.safetensors")
    assert_equal(found, saved)
    assert_equal(plain.backend.weights(), looked.backend.weights())
    assert not torch.equal(saved["left.0.weight"], looked.backend.weights()["left.0.weight"])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def check_backends(folder):
    """All backends average alike, and each loads exactly what another one saved."""
    ranks = Ranks(dist.group.WORLD)
    own = torch.arange(BATCH).tensor_split(ranks.size)[ranks.rank]
    # Large eps: where a gradient is rounding noise, AdamW would make its sign a full step.
    config = replace(AVERAGED, eps=1e-3, clip_grad_norm=None)
    before = build_model().state_dict()
    saved = {}
    for kind in BACKENDS:
        task = Pretraining(build_model(locked="text"), ranks=ranks)
        backend = build_rated(kind, task, ranks, config)
        inputs = task.inputs(samples("unique")[own])
        for _ in range(3):
            backward(task, backend, inputs)
            backend.step(1e-3, norm=1.0)
        state = {"updates": 3}
        saved[kind] = save_checkpoint(Path(folder) / str(kind), 3, backend, state)
        average = backend.weights(averaged=True)
        with backend.whole_model() as model:
            if ranks.first:
                assert_equal({n: v.cpu() for n, v in model.state_dict().items()}, average)
        if ranks.first:
            first = load_file(saved["torch"] / "ema.safetensors")
            assert_equal(load_file(saved[kind] / "ema.safetensors"), average)
            for name, value in average.items():
                off = float((value - first[name]).abs().max())
                assert off < 1e-6, (kind, name, off)
            locked = [name for name in average if name.startswith("text.")]
            assert_equal({n: average[n] for n in locked}, {n: before[n] for n in locked})
    for kind in ("torch", 0, 1, 3):
        path = saved[2]
        task = Pretraining(build_model(locked="text"), ranks=ranks)
        load_weights(path / "model.safetensors", task.model)
        backend = build_rated(kind, task, ranks, config)
        load_moments(path, backend, updates=3)
        loaded, average = backend.weights(averaged=True), load_file(path / "ema.safetensors")
        if ranks.first:
            assert_equal(loaded, average)
        # It goes on from there: one more update moves it.
        backward(task, backend, task.inputs(samples("unique")[own]))
        backend.step(1e-3, norm=1.0)
        moved = backend.weights(averaged=True)
        if ranks.first:
            name = "image.projection.weight"
            assert not torch.equal(moved[name], average[name])


@pytest.mark.slow
def test_every_backend_averages_alike_and_loads_what_another_saved():
    with TemporaryDirectory() as folder:
        on_ranks(2, check_backends, folder)
