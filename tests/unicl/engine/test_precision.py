"""Mixed precision: the loss scale of fp16 on every engine; which type is measured to be faster."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.ranks import on_ranks
from tests.unicl.test_elastic import ENGINES
from unicl.build import build_trainer
from unicl.config import parse_recipe
from unicl.distributed import Ranks
from unicl.engine.precision import LossScale, faster_precision

STEPS = 8
TOO_LARGE = 2.0**16


def test_the_scale_halves_at_once_and_doubles_after_long_peace():
    scale = LossScale()
    assert scale.shrink()
    assert scale.value == 2.0**15
    for _ in range(1999):
        scale.grow()
    assert LossScale(**scale.state()).value == 2.0**15
    scale.grow()
    assert scale.value == 2.0**16
    assert scale.good_steps == 0


def test_the_scale_has_limits():
    smallest = LossScale(1.0)
    assert not smallest.shrink()
    assert smallest.value == 1
    largest = LossScale(2.0**24, good_steps=1999)
    largest.grow()
    assert largest.value == 2.0**24


def test_the_faster_type_is_taken(monkeypatch):
    seconds = {"fp32": 3, "bf16": 1}
    now = 0

    def step(precision):
        nonlocal now
        now += seconds[precision]

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert faster_precision(step) == "bf16"
    seconds["bf16"] = 5
    assert faster_precision(step) == "fp32"


def check_engines(folder, keys):
    ranks = Ranks(dist.group.WORLD)
    found = {}
    for name, changes in ENGINES.items():
        recipe = parse_recipe("", {**keys, **changes})
        trainer = build_trainer(recipe, Path(folder) / name, ranks)
        trainer.loss_scale = LossScale(TOO_LARGE)
        trainer.fit()
        halvings = math.log2(TOO_LARGE / trainer.loss_scale.value)
        assert 1 <= halvings < STEPS - 2, (name, halvings)
        # What overflowed was no update, and no bad batch either.
        assert trainer.updates == STEPS - halvings
        assert trainer.nonfinite == 0
        found[name] = halvings, trainer.backend.weights()
    if not ranks.first:
        return
    halvings, weights = found.pop("ddp")
    for name, (others, other) in found.items():
        assert others == halvings, name
        for key, value in weights.items():
            assert torch.allclose(value, other[key], atol=0.02), (name, key)


@pytest.mark.slow
def test_overflows_halve_the_scale_on_every_engine(tmp_path):
    keys = {
        **small_recipe(write_corpus(tmp_path / "train")),
        "image_tower.drop_path_rate": "0",
        "trainer.precision": "fp16",
        "trainer.steps": str(STEPS),
        "optimizer.learning_rate": "1e-3",
        "optimizer.eps": "1e-3",
    }
    on_ranks(2, check_engines, str(tmp_path), keys)
