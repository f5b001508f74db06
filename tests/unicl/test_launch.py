"""The same command under every launcher: one process, torchrun, deepspeed, srun."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.unicl.corpus import small_recipe, write_corpus
from unicl.distributed import Launch, find_launch, first_host, local_rank
from unicl.errors import UsageError

SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4020003",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*SLURM, *TORCHRUN, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def setenv(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    assert find_launch() is None
    assert local_rank() == 0
    # A shell inside of an allocation is no task of it.
    setenv(monkeypatch, {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"})
    assert find_launch() is None


def test_torchrun_and_deepspeed_say_all_there_is_to_know(monkeypatch):
    setenv(monkeypatch, TORCHRUN)
    assert find_launch() == Launch(3, 4, 1, "10.0.0.1", 29500)
    assert find_launch().environment() == TORCHRUN
    # torchrun inside of an srun task: the inner one counts.
    setenv(monkeypatch, SLURM)
    assert find_launch() == Launch(3, 4, 1, "10.0.0.1", 29500)


def test_srun_names_the_first_host(monkeypatch):
    setenv(monkeypatch, SLURM)
    assert find_launch() == Launch(9, 16, 1, "gpu07", 10003)
    setenv(monkeypatch, {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"})
    assert find_launch() == Launch(9, 16, 1, "10.1.1.1", 1234)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-005,9],login1", "node003"),
        ("login1,node[003-005]", "login1"),
        ("a[1,3]-ib,b[4-5]", "a1-ib"),
        ("rack-2-[10-12]", "rack-2-10"),
    ],
)
def test_first_host_of_a_slurm_list(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({**TORCHRUN, "RANK": "first"}, "first"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[]"}, "host list"),
    ],
)
def test_an_incomplete_environment_is_named(monkeypatch, variables, missing):
    setenv(monkeypatch, variables)
    with pytest.raises(UsageError, match=f"incomplete.*{missing}"):
        find_launch()


def words(recipe, out):
    keys = [word for key, value in recipe.items() for word in (f"--{key}", value)]
    return ["unicl", "train", str(out.parent / "any.toml"), "--out", str(out), *keys]


def run(command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(arguments):
    elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    return [run([sys.executable, "-m", "torch.distributed.run", *elastic, "-m", *arguments])]


def deepspeed(arguments):
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]
    return [run([*launcher, *arguments])]


def srun(arguments):
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    return [
        run([sys.executable, "-m", *arguments], **step, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in "01"
    ]


@pytest.mark.slow
def test_every_launcher_trains_the_same_run(tmp_path):
    (tmp_path / "any.toml").write_text("")
    recipe = {
        **small_recipe(write_corpus(tmp_path / "train")),
        "trainer.steps": "3",
        "trainer.precision": "fp32",
    }
    weights = []
    for launcher in (torchrun, deepspeed, srun):
        out = tmp_path / launcher.__name__
        backend = "deepspeed" if launcher is deepspeed else "torch"
        processes = launcher(words({**recipe, "engine.backend": backend}, out))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert not any(process.returncode for process in processes), outputs
        assert sum(output.count("finished at step 3") for output in outputs) == 1
        weights.append(load_file(out / "checkpoints" / "step-00000003" / "model.safetensors"))
    ddp, zero, again = weights
    assert all(ddp[name].equal(again[name]) for name in ddp)
    # ZeRO sums in another order, and the first steps of AdamW magnify rounding.
    assert all(torch.allclose(ddp[name], zero[name], atol=2e-3) for name in ddp)
