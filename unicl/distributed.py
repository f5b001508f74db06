"""Ranks: who they are, and the few things they say to each other.

One process alone is a group of one; every exchange is then free, so that nothing above has to know
whether it runs on one rank or on many.
"""

import contextlib
import ctypes
import itertools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup

from unicl.errors import UniclError, UsageError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch, as one of them sees them."""

    group: ProcessGroup | None = None
    """None is a single process that talks to nobody."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return which of `total` consecutive things are this rank's; sizes differ by one."""
        return self.shares(total)[self.rank]

    def shares(self, total: int) -> list[range]:
        """Return which of `total` consecutive things are each rank's."""
        bounds = [rank * total // self.size for rank in range(self.size + 1)]
        return [range(*bound) for bound in itertools.pairwise(bounds)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum_(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, row: Tensor) -> Tensor:
        """Return every rank's `row`, all of one shape, as [size, ...]."""
        if self.group is None:
            return row[None]
        rows = row.new_empty(self.size, *row.shape)
        dist.all_gather_into_tensor(rows.view(-1), row.reshape(-1), group=self.group)
        return rows

    def gather_numbers(self, *numbers: int, device: torch.device | str = "cpu") -> list[list[int]]:
        """Return every rank's numbers, one list a rank; waits for the slowest rank."""
        return self.gather(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the ranks' rows [sizes[rank], ...]; no gradient comes back through this."""
        if self.group is None:
            return rows
        gathered = self.gather(_padded(rows, max(sizes)))
        if min(sizes) == max(sizes):
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def scatter_sum(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this rank's rows of the sum over all ranks: what gives `gather_rows` gradients."""
        if self.group is None:
            return rows
        longest = max(sizes)
        if min(sizes) != longest:
            rows = torch.cat([_padded(part, longest) for part in rows.split(list(sizes))])
        own = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(own.view(-1), rows.reshape(-1), group=self.group)
        return own[: sizes[self.rank]]

    def gather_objects(self, value: Value) -> list[Value]:
        """Return every rank's value, pickled on the way; for small and rare things."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], Value]) -> Value:
        """Do what may fail on one rank; it then fails on all of them, with the reason.

        The work itself must exchange nothing.
        """
        error, value = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        self.check(error)
        return cast(Value, value)

    def on_first(self, work: Callable[[], Value]) -> Value | None:
        """Do on the first rank what may fail; what it returns is None on all others.

        As of `together`, all ranks wait for it, and it must exchange nothing.
        """
        return self.together(lambda: work() if self.first else None)

    def check(self, error: Exception | None) -> None:
        """Raise this rank's error if it has one, else the first that another rank has."""
        if self.group is not None:
            reasons = self.gather_objects(error and (str(error) or type(error).__name__))
            for rank, reason in enumerate(reasons):
                if reason is not None and error is None:
                    error = UniclError(f"rank {rank} of {self.size}: {reason}")
            if isinstance(error, UniclError):
                error.told = not self.first
        if error is not None:
            raise error

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = Ranks()
"""A process by itself."""


def whole_means(
    sums: Float[Tensor, " losses"],
    counts: Float[Tensor, " losses"],
    ranks: Ranks,
    others: Float[Tensor, " losses"],
) -> tuple[Float[Tensor, " losses"], Float[Tensor, " losses"]]:
    """Return means over all ranks' parts of a batch: of sums with gradient, and of others.

    Every rank gets the same values; the average of the ranks' gradients is their gradient.
    """
    totals, whole, rest = ranks.sum_(torch.stack([sums.detach(), counts, others])).unbind()
    whole = whole.clamp(min=1)
    # The ranks' gradients are averaged: each rank's own sum counts as often as there are ranks.
    own = sums * (ranks.size / whole)
    return own + (totals / whole - own).detach(), rest / whole


@dataclass(frozen=True)
class Launch:
    """What a launcher tells a process about itself and the others."""

    rank: int
    size: int
    local_rank: int
    """Number of the process on its own host, which is its GPU's."""
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """Return the variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@contextmanager
def joined(device: torch.device, *, timeout_seconds: int, alone: bool = True) -> Iterator[Ranks]:
    """Join the ranks that a launcher has started; without a launcher there is one.

    Args:
        device: Where this rank computes: CPUs talk over gloo, GPUs over NCCL.
        timeout_seconds: A rank that hears nothing for so long does not wait on: over gloo it
            raises, over NCCL torch's watchdog ends the process.
        alone: Whether a single process may do without a process group.

    Raises:
        UniclError: The other ranks cannot be reached.
    """
    launch = find_launch()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for no device by name takes the current one
    if int(os.environ.get("LOCAL_SIZE", "1")) > 1 and "OMP_NUM_THREADS" not in os.environ:
        # As torchrun has it; the deepspeed launcher takes no such variable to other hosts.
        torch.set_num_threads(1)
    if dist.is_initialized():
        yield Ranks(dist.group.WORLD)
        return
    if launch is None and alone:
        yield ALONE
        return
    launch = launch or _SINGLE
    os.environ.update(launch.environment())
    gpu = device.type == "cuda"
    timeout = timedelta(seconds=timeout_seconds)
    _end_with_launcher()
    try:
        with _killable():
            meeting: dict[str, Any] = {}  # unset: the environment says where the ranks meet
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = _fresh_store(launch, timeout)
                meeting = {"store": store, "rank": launch.rank, "world_size": launch.size}
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo",
                timeout=timeout,
                device_id=device if gpu else None,
                **meeting,
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UniclError(
            f"cannot join the other ranks at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {reason}"
        ) from error
    try:
        with first_speaks():
            yield Ranks(dist.group.WORLD)
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        late = re.search("time.?out|timed out", str(error), re.IGNORECASE)
        lost = f"did not answer within {timeout_seconds} seconds" if late else "is gone"
        raise UniclError(
            f"another rank {lost}; start the same command again: it goes on from what was saved"
        ) from error
    finally:
        dist.destroy_process_group()


@contextmanager
def first_speaks() -> Iterator[None]:
    """Leave it to rank 0 to say what all ranks have to say; also a function's decorator.

    Raises:
        UsageError: A launcher's variables are incomplete.
    """
    logger, launch = logging.getLogger("unicl"), find_launch()
    level = logger.level
    if launch is not None and launch.rank:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _killable() -> Iterator[None]:
    """Let SIGTERM end the process at once: what waits for other ranks would not see a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_launcher() -> None:
    """Let this rank be told to save and end when torchrun dies without having told it.

    SIGUSR1, for one, ends torchrun and leaves its ranks to themselves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _fresh_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return a store that all ranks of this start share, and no rank that has died before.

    torchrun's agent has one store for all its restarts, and in it stand the addresses of the ranks
    that it has restarted. So rank 0 opens a store of its own, tells its address there, and answers
    who greets it; the others greet what they find until somebody answers.
    """
    shared = dist.TCPStore(launch.address, launch.port, is_master=False, timeout=timeout)
    key = "unicl/store"
    if launch.rank == 0:
        host = _address_towards(launch.address, launch.port)
        own = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set(key, f"{host} {own.port}")
        for rank in range(1, launch.size):
            own.set(f"answer/{own.get(f'greeting/{rank}').decode()}", "")
        return own
    # One greeting for all attempts: rank 0 may have read it and answer when this rank has gone on.
    nonce = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        host, port = shared.get(key).decode().split()
        with contextlib.suppress(OSError, RuntimeError):
            socket.create_connection((host, int(port)), timeout=2).close()
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
            store.set(f"greeting/{launch.rank}", nonce)
            store.wait([f"answer/{nonce}"], timedelta(seconds=10))
            return store
        time.sleep(0.2)
    raise RuntimeError(f"rank 0 did not answer within {timeout.total_seconds():.0f} seconds")


def _address_towards(host: str, port: int) -> str:
    """Return this host's address on the network that leads to another one; sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _is_lost_rank(error: RuntimeError) -> bool:
    """Tell what a collective raises when a peer has died from other errors of torch."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def find_launch() -> Launch | None:
    """Return what torchrun, the deepspeed launcher or srun have left in the environment, if any.

    Raises:
        UsageError: A launcher's variables are incomplete.
    """
    variables = os.environ
    try:
        if "RANK" in variables and "WORLD_SIZE" in variables:
            return Launch(
                int(variables["RANK"]),
                int(variables["WORLD_SIZE"]),
                int(variables["LOCAL_RANK"]),
                variables["MASTER_ADDR"],
                int(variables["MASTER_PORT"]),
            )
        # Only srun sets the step's number of tasks: a shell inside of an allocation is alone.
        if int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return Launch(
                int(variables["SLURM_PROCID"]),
                int(variables["SLURM_STEP_NUM_TASKS"]),
                int(variables["SLURM_LOCALID"]),
                variables.get("MASTER_ADDR") or first_host(variables["SLURM_STEP_NODELIST"]),
                int(variables.get("MASTER_PORT") or _port(int(variables["SLURM_JOB_ID"]))),
            )
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the launcher's environment is incomplete: {error}; "
            f"start with torchrun, deepspeed or srun"
        ) from error
    return None


def first_host(hosts: str) -> str:
    """Return the first name of a Slurm host list, such as node003 of "node[003-005,9],login1"."""
    name, bracket, rest = hosts.partition("[")
    if not bracket or "," in name:
        return name.split(",")[0]
    number = re.match(r"\d+", rest)
    if number is None:
        raise ValueError(f"cannot read the host list {hosts!r}")
    return name + number[0] + rest.partition("]")[2].split(",")[0]


def _port(job: int) -> int:
    """Choose a port: jobs that share a host get different ones, all ranks of a job the same."""
    return 10_000 + job % 20_000  # below those that the system gives to connections


def local_rank() -> int:
    """Return this process's number on its host."""
    launch = find_launch()
    return 0 if launch is None else launch.local_rank


_SINGLE = Launch(0, 1, 0, "127.0.0.1", 0)


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
