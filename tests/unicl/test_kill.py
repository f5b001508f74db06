"""SIGKILL at random moments: the finished run equals one that was never disturbed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from unicl.engine.metrics import read_metrics

STEPS = 40


def command(run, keys):
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return [
        sys.executable,
        "-m",
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


def rows(run):
    timed = ("train/samples_per_second", "train/tflops")
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


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
    whole = start(tmp_path / "whole", keys)
    assert whole.wait(timeout=120) == 0, whole.stderr.read()
    whole.stderr.close()

    generator = random.Random(20)
    kills = 0
    for _ in range(30):
        process = start(tmp_path / "cut", keys)
        # Wait for the first sign of training, so that the kills hit training and not imports.
        for line in process.stderr:
            if "step" in line:
                break
        time.sleep(generator.uniform(0.0, 0.6))
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

    assert kills >= 2
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
