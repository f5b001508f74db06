"""Cases that run on several ranks: fresh processes of one thread each, joined by gloo."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.harness import ROOT
from unicl.distributed import Ranks
from unicl.errors import UniclError


def on_ranks(size: int, case: str, **arguments: Any) -> list[Any]:
    """Call a function on every rank at once, and return what each call returned.

    Args:
        size: Number of ranks.
        case: "module:function"; the function takes the ranks and the arguments.
        arguments: Anything that JSON can carry.

    Raises:
        UniclError: A rank failed.
    """
    child = "from benchmarks.ranks import be_rank; be_rank()"
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", child, folder, case, json.dumps(arguments)],
                cwd=ROOT,
                env=_environment(rank, size),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        said = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, said, strict=True):
        if rank.returncode:
            reason = (errors.strip().splitlines() or ["killed, perhaps for lack of memory"])[-1]
            raise UniclError(f"a rank failed with exit code {rank.returncode}: {reason}")
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def be_rank() -> None:
    """Be one of the processes: run the case that the command line names, and print its result."""
    folder, case, arguments = sys.argv[1:]
    module, function = case.split(":")
    run = getattr(importlib.import_module(module), function)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'store'}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    result = run(Ranks(dist.group.WORLD), **json.loads(arguments))
    print(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _environment(rank: int, size: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        # Fixed, so that what is freed goes back to the kernel at once: glibc else raises the
        # threshold to 32 MiB, and smaller pieces that were freed count as held.
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
    }
