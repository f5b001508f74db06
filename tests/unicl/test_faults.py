"""What goes wrong on one rank ends, or spares, the run on all of them, and says why."""

import json
import math
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.history import seen, surviving, train
from tests.unicl.ranks import on_ranks
from unicl.build import build_trainer
from unicl.config import parse_recipe
from unicl.distributed import Ranks
from unicl.engine.checkpoint import checkpoints
from unicl.engine.trainer import Interrupted
from unicl.errors import UniclError

STEPS = 6


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return {
        **small_recipe(write_corpus(tmp_path_factory.mktemp("corpus") / "train")),
        "trainer.steps": str(STEPS),
        "trainer.save_every": "2",
        "trainer.log_every": "1",
    }


def ranks():
    return Ranks(dist.group.WORLD)


def weights(folder, step=STEPS):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.slow
def test_faults_of_one_rank(tmp_path, keys):
    """All in one start of the ranks, which takes longer than what is tested."""
    on_ranks(2, everything, tmp_path, keys)


def everything(tmp_path, keys):
    for test in (unreadable_data, missing_data, a_signal, poison_is_skipped, poison_ends_the_run):
        test(tmp_path / test.__name__, keys)
        ranks().barrier()


def unreadable_data(folder, keys):
    def fault(step):
        if ranks().rank == 1 and step == 3:
            raise UniclError("cannot read shard-000001.tar: Input/output error")

    start = time.monotonic()
    with pytest.raises(UniclError, match=r"shard-000001\.tar: Input/output error") as caught:
        train(folder, keys, fault=fault)
    assert str(caught.value).startswith("rank 1 of 2: ") == (ranks().rank == 0)
    assert caught.value.told == (ranks().rank == 1)  # the first rank has said it for all
    assert time.monotonic() - start < 60
    assert checkpoints(folder / "checkpoints")[-1].name == "step-00000003"


def missing_data(folder, keys):
    if ranks().rank == 1:
        keys = {**keys, "data.train": "/nowhere"}
    recipe = parse_recipe("", keys)
    with pytest.raises(UniclError, match="/nowhere"):
        ranks().together(lambda: build_trainer(recipe, folder, ranks()))


def a_signal(folder, keys):
    """One rank is asked to stop; both save at one step, and the run ends as if undisturbed."""

    def fault(step):
        if ranks().rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    start = time.monotonic()
    with pytest.raises(Interrupted, match="SIGUSR1: saved at step 3"):
        train(folder, keys, fault=fault)
    assert time.monotonic() - start < 60
    assert checkpoints(folder / "checkpoints")[-1].name == "step-00000003"
    assert not train(folder, keys, attempt=1)
    whole = folder.with_name("undisturbed")
    assert not train(whole, keys)
    ranks().barrier()
    assert surviving([seen(folder, 0), seen(folder, 1)]) == seen(whole, 0)
    one, other = weights(folder), weights(whole)
    assert all(one[name].equal(other[name]) for name in other)


def poisoned(folder, keys, max_nonfinite):
    """One rank's images give NaN at step 2."""
    recipe = parse_recipe("", {**keys, "trainer.max_nonfinite": str(max_nonfinite)})
    trainer = build_trainer(recipe, folder, ranks())
    encode = trainer.task.encode

    def poison(tower, rows):
        bad = tower == "image" and trainer.step == 2 and ranks().rank == 1
        return encode(tower, rows) * (math.nan if bad else 1)

    trainer.task.encode = poison
    folder.mkdir(exist_ok=True)
    return trainer


def poison_is_skipped(folder, keys):
    trainer = poisoned(folder, keys, 1)
    trainer.fit()
    assert (trainer.nonfinite, trainer.updates) == (1, STEPS - 1)
    model = trainer.task.model
    total = sum(p.double().sum() for p in model.parameters())
    assert torch.isfinite(total)
    assert len(set(ranks().gather_objects(float(total)))) == 1
    ranks().barrier()
    (row,) = map(json.loads, (folder / "nonfinite.jsonl").read_text().splitlines())
    assert row["step"] == 2
    assert len(row["keys"]) == 12  # both ranks'


def poison_ends_the_run(folder, keys):
    with pytest.raises(UniclError, match=r"not finite at step 2 .*nonfinite\.jsonl.*step-00000002"):
        poisoned(folder, keys, 0).fit()
