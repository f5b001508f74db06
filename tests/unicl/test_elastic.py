"""A run goes on at any other number of ranks, engine or chunk, with the samples of its plan."""

import pytest
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.history import seen, surviving, train, untimed
from tests.unicl.ranks import on_ranks
from unicl.build import build_trainer
from unicl.config import parse_recipe

STEPS = 10
ZERO = {
    stage: {"engine.backend": "deepspeed", "engine.zero_stage": str(stage)} for stage in range(4)
}


def weights(folder, steps=STEPS):
    return load_file(folder / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return {
        **small_recipe(write_corpus(tmp_path_factory.mktemp("corpus") / "train")),
        "trainer.steps": str(STEPS),
        "trainer.batch_size": "11",  # no number of ranks divides it
        "trainer.save_every": "2",
        "trainer.log_every": "1",
        "engine.persistence_threshold": "0",
    }


@pytest.mark.slow
def test_another_topology_goes_on_with_the_same_samples(tmp_path, keys):
    # Stochastic depth draws per rank and chunk.
    keys = {**keys, "image_tower.drop_path_rate": "0"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, keys)
    lives = [
        (4, {}, 3),
        (2, {**ZERO[2], "trainer.chunk": "2"}, 5),
        (3, {**ZERO[3], "trainer.chunk": "3", "engine.reduce_every": "chunk"}, 7),
        (1, {**ZERO[1]}, None),
    ]
    for attempt, (size, changes, death) in enumerate(lives):
        on_ranks(size, one_life, cut, keys | changes, death, attempt)
    attempts = [seen(cut, attempt) for attempt in range(len(lives))]
    assert [min(steps) for steps in attempts] == [0, 2, 4, 6]
    assert surviving(attempts) == seen(whole, 0)
    assert len(surviving(attempts)) == STEPS

    for one, other in zip(untimed(whole), untimed(cut), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
        assert one["train/learning_rate"] == other["train/learning_rate"]
    start = build_trainer(parse_recipe("", keys), tmp_path / "none").task.model.state_dict()
    undisturbed, survivor = weights(whole), weights(cut)
    moved = sum((undisturbed[n] - start[n]).square().sum() for n in start).sqrt()
    apart = sum((undisturbed[n] - survivor[n]).square().sum() for n in start).sqrt()
    assert apart < 0.02 * moved


def one_life(folder, keys, death, attempt):
    assert train(folder, keys, death=death, attempt=attempt) == (death is not None)


ENGINES = {
    "ddp": {},
    "zero2": {**ZERO[2], "engine.offload_optimizer": "true"},
    "zero3": {**ZERO[3], "trainer.chunk": "3"},
}


@pytest.mark.slow
def test_the_same_topology_goes_on_bit_for_bit(tmp_path, keys):
    on_ranks(2, train_whole_and_cut, tmp_path, {**keys, "trainer.steps": "5"})
    for name in ENGINES:
        one, other = (weights(tmp_path / f"{name}-{run}", 5) for run in ("whole", "cut"))
        assert one.keys() == other.keys()
        assert all(one[tensor].equal(other[tensor]) for tensor in one), name
        assert untimed(tmp_path / f"{name}-whole") == untimed(tmp_path / f"{name}-cut")


def train_whole_and_cut(folder, keys):
    for name, changes in ENGINES.items():
        assert not train(folder / f"{name}-whole", keys | changes)
        assert train(folder / f"{name}-cut", keys | changes, death=3)
        assert not train(folder / f"{name}-cut", keys | changes, attempt=1)
