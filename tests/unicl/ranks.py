"""Runs a test's function on several ranks: processes of one thread, joined by gloo."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

# A server imports these once; each rank is a fork of it, made in no time.
_IMPORTS = ["torch.distributed", "unicl.build", "unicl.engine.deepspeed_backend", "deepspeed"]


def on_ranks(size, function, *arguments):
    """Call `function(*arguments)` on `size` ranks; what one of them raises is raised here."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.set_forkserver_preload(_IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank,
            args=(size, Path(folder) / "store", function, arguments),
            nprocs=size,
            start_method="forkserver",
        )


def _rank(rank, size, store, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
