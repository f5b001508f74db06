"""A run goes on at any other number of ranks, engine or chunk, with the samples of its plan."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.ranks import on_ranks
from unicl.build import build_trainer
from unicl.config import parse_recipe
from unicl.distributed import ALONE, Ranks
from unicl.engine.metrics import read_metrics

STEPS = 10
ZERO = {
    stage: {"engine.backend": "deepspeed", "engine.zero_stage": str(stage)} for stage in range(4)
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer may catch it."""


class Watched:
    """Writes down what a rank reads, and dies in the middle of a step."""

    def __init__(self, loader, log, death):
        self.loader, self.log, self.death = loader, log, death

    def batches(self, start=0):
        for step, batch in enumerate(self.loader.batches(start), start // self.loader.batch_size):
            if step == self.death:
                raise Killed
            with self.log.open("a") as file:
                file.write(json.dumps({"step": step, "keys": batch.keys}) + "\n")
            yield batch


def train(folder, keys, death=None, attempt=0):
    """Train on as many ranks as there are, until the end or the death; return whether it died."""
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE
    torch.manual_seed(ranks.rank)  # whatever was drawn before must not matter
    trainer = build_trainer(parse_recipe("", keys), folder, ranks)
    folder.mkdir(exist_ok=True)
    log = folder / f"seen-{attempt}-{ranks.rank:02d}.jsonl"
    trainer.loader = Watched(trainer.loader, log, death)
    try:
        trainer.fit()
    except Killed:
        return True
    return False


def seen(folder, attempt):
    """The keys of each step in the order of the ranks."""
    steps = {}
    for log in sorted(folder.glob(f"seen-{attempt}-*.jsonl")):
        for row in map(json.loads, log.read_text().splitlines()):
            steps.setdefault(row["step"], []).extend(row["keys"])
    return steps


def weights(folder):
    return load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def rows(folder):
    timed = "train/samples_per_second"
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != timed} for row in found]


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
    plan, history = seen(whole, 0), {}
    for attempt, (size, changes, death) in enumerate(lives):
        on_ranks(size, train, cut, keys | changes, death, attempt)
        steps = seen(cut, attempt)
        first = min(steps)
        assert first == (0 if attempt == 0 else lives[attempt - 1][2] - 1)
        history = {step: read for step, read in history.items() if step < first} | steps
    assert history == plan
    assert len(history) == STEPS

    for one, other in zip(rows(whole), rows(cut), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
        assert one["train/learning_rate"] == other["train/learning_rate"]
    start = build_trainer(parse_recipe("", keys), tmp_path / "none").task.model.state_dict()
    undisturbed, survivor = weights(whole), weights(cut)
    moved = sum((undisturbed[n] - start[n]).square().sum() for n in start).sqrt()
    apart = sum((undisturbed[n] - survivor[n]).square().sum() for n in start).sqrt()
    assert apart < 0.02 * moved


ENGINES = {
    "ddp": {},
    "zero0": {**ZERO[0], "trainer.chunk": "3"},
    "zero1": {**ZERO[1], "trainer.chunk": "3"},
    "zero2": {**ZERO[2], "engine.offload_optimizer": "true"},
    "zero3": {**ZERO[3], "trainer.chunk": "3"},
}


@pytest.mark.slow
def test_the_same_topology_goes_on_bit_for_bit(tmp_path, keys):
    on_ranks(2, train_whole_and_cut, tmp_path, keys)
    for name in ENGINES:
        one, other = weights(tmp_path / f"{name}-whole"), weights(tmp_path / f"{name}-cut")
        assert one.keys() == other.keys()
        assert all(one[tensor].equal(other[tensor]) for tensor in one), name
        assert rows(tmp_path / f"{name}-whole") == rows(tmp_path / f"{name}-cut")


def train_whole_and_cut(folder, keys):
    for name, changes in ENGINES.items():
        assert not train(folder / f"{name}-whole", keys | changes)
        assert train(folder / f"{name}-cut", keys | changes, death=5)
        assert not train(folder / f"{name}-cut", keys | changes, attempt=1)
