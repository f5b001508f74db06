"""SIGKILL at random moments: the finished run equals one that was never disturbed."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.history import train, untimed
from tests.unicl.ranks import on_ranks

STEPS = 24
RANK_STEPS = 48
KILLS = int(os.environ.get("UNICL_KILLS", "2"))  # a restart takes eight seconds on two cores
RANK_KILLS = KILLS // 2  # and twice that where two ranks start
# Detecting the death, ending the other rank, starting both again, and the first steps.
RESTART_SECONDS = 60


def command(run, keys, *launcher):
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return [
        sys.executable,
        "-m",
        *launcher,
        "unicl",
        "train",
        str(run.parent / "kill.toml"),
        "--out",
        str(run),
        *words,
    ]


def start(run, keys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(run, keys), env=environment, stderr=subprocess.PIPE, text=True)


def final_weights(run):
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


@pytest.mark.slow
def test_killed_runs_end_as_if_undisturbed(tmp_path):
    (tmp_path / "kill.toml").write_text("")
    keys = {
        **small_recipe(write_corpus(tmp_path / "train")),
        "data.num_workers": "1",
        "trainer.precision": "bf16",
        "trainer.steps": str(STEPS),
        "trainer.save_every": "3",
        "trainer.log_every": "4",
    }
    on_ranks(1, train, tmp_path / "whole", keys)

    generator = random.Random(20)
    kills = 0
    while kills < KILLS:
        process = start(tmp_path / "cut", keys)
        # Wait for the first sign of training, so that the kills hit training and not imports.
        for line in process.stderr:
            if "step" in line:
                break
        time.sleep(generator.uniform(0.0, 0.36))
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        if process.wait(timeout=60) == 0:
            break
        kills += 1
        if (tmp_path / "cut" / "checkpoints" / f"step-{STEPS:08d}").exists():
            break
    last = start(tmp_path / "cut", keys)
    assert last.wait(timeout=120) == 0, last.stderr.read()
    last.stderr.close()

    assert kills >= 2  # more may not fit into the run
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


@pytest.mark.slow
def test_killed_ranks_end_as_if_undisturbed(tmp_path):
    """SIGKILL of a random rank at a random moment; torchrun starts both again."""
    (tmp_path / "kill.toml").write_text("")
    keys = {
        **small_recipe(write_corpus(tmp_path / "train")),
        "trainer.steps": str(RANK_STEPS),
        "trainer.save_every": "5",
        "trainer.log_every": "1",
    }
    elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(RANK_KILLS)]
    launcher = ["torch.distributed.run", *elastic, "--monitor-interval", "0.1", "-m"]

    on_ranks(2, train, tmp_path / "whole", keys)

    generator = random.Random(20)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    with (tmp_path / "cut.log").open("w") as log:
        agent = subprocess.Popen(
            command(tmp_path / "cut", keys, *launcher),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    kills = 0
    try:
        for _ in range(RANK_KILLS):
            seconds = wait_for_progress(agent, metrics)
            assert seconds < RESTART_SECONDS, (tmp_path / "cut.log").read_text()[-3000:]
            time.sleep(generator.uniform(0.0, 0.3))
            workers = psutil.Process(agent.pid).children()
            if len(workers) < 2:  # the run is at its end
                break
            generator.choice(workers).kill()
            kills += 1
        assert agent.wait(timeout=300) == 0, (tmp_path / "cut.log").read_text()[-3000:]
    finally:
        agent.terminate()
        agent.wait()
    assert kills == RANK_KILLS > 0

    one, other = (
        load_file(tmp_path / run / "checkpoints" / f"step-{RANK_STEPS:08d}" / "model.safetensors")
        for run in ("whole", "cut")
    )
    assert all(one[name].equal(other[name]) for name in one)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def wait_for_progress(agent, metrics):
    """Wait until the run has written metrics again; return how long that took."""
    start, before = time.monotonic(), time.time()
    while not (metrics.exists() and metrics.stat().st_mtime > before and metrics.stat().st_size):
        if agent.poll() is not None or time.monotonic() - start > 2 * RESTART_SECONDS:
            break
        time.sleep(0.05)
    return time.monotonic() - start
