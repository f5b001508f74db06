"""`unicl verify-gradients` finds right what is right, and wrong what is wrong."""

import math
import os
import subprocess
import sys

import pytest
import torch

from unicl.verification import Agreement, Mode, Verdict, _compare


def command(*words, ranks):
    launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "unicl", "verify-gradients", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_every_mode_of_two_ranks_is_right():
    engines = "torch,zero1,zero3/chunk"
    done = command("demo", "--slim", "--samples-per-rank", "3", "--engines", engines, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "Gradients on 2 ranks" in done.stdout
    table = [line for line in done.stdout.splitlines() if "right" in line]
    assert {line.split()[0] for line in table} == set(engines.split(","))
    assert {line.split()[2] for line in table} == {"fp32", "bf16"}
    assert "WRONG" not in done.stdout


def test_a_sum_instead_of_a_mean_is_wrong():
    truth = {"image.a": torch.randn(5), "text.b": torch.randn(2, 3), "scale": torch.randn(1)}
    twice = iter([(name, 2 * gradient) for name, gradient in truth.items()])
    towers = _compare(twice, truth)
    assert {tower: each.ratio for tower, each in towers.items()} == pytest.approx(
        {"image": 2, "text": 2, "scale": 2}
    )
    assert not Verdict(Mode(1, "torch", 1, "bf16", 8), towers).right


def test_ratio_angle_and_distance():
    towers = _compare(iter([("t.a", torch.tensor([0.0, 3.0]))]), {"t.a": torch.tensor([4.0, 0.0])})
    assert towers["t"] == Agreement(0.75, 90.0, 1.25)
    assert math.isnan(_compare(iter([("t", torch.zeros(2))]), {"t": torch.ones(2)})["t"].angle)


def test_nan_is_wrong():
    towers = _compare(iter([("t", torch.full((2,), torch.nan))]), {"t": torch.ones(2)})
    assert not Verdict(Mode(1, "torch", 1, "fp32", 8), towers).right


@pytest.mark.slow
def test_a_broken_mode_ends_with_exit_code_1(tmp_path):
    """Multiply the gradient cache's gradient by the number of chunks: the classic mistake."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from unicl.engine import gradient_cache\n"
        "cached = gradient_cache._cached_backward\n"
        "def broken(task, backend, *rest):\n"
        "    backward = backend.backward\n"
        "    backend.backward = lambda loss: backward(4 * loss)\n"
        "    try:\n"
        "        return cached(task, backend, *rest)\n"
        "    finally:\n"
        "        backend.backward = backward\n"
        "gradient_cache._cached_backward = broken\n"
        "from unicl.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "verify-gradients", "demo", "--slim", "--engines", "torch"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1
    assert "3 of 6 modes give another gradient" in done.stderr
    wrong = [line.split() for line in done.stdout.splitlines() if "WRONG" in line]
    assert {line[1] for line in wrong} == {"4"}
    assert all("4.0" in " ".join(line) or "3.9" in " ".join(line) for line in wrong)
