"""What a run has done: the samples that each rank has read, and its metrics."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from unicl.build import build_trainer
from unicl.config import parse_recipe
from unicl.distributed import ALONE, Ranks, joined
from unicl.engine.metrics import read_metrics
from unicl.errors import UniclError


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer may catch it."""


class Watched:
    """Writes down what a rank reads, and dies or breaks in the middle of the run."""

    def __init__(self, loader, log, death=None, fault=None):
        self.loader, self.log, self.death, self.fault = loader, log, death, fault

    def batches(self, start=0):
        for step, batch in enumerate(self.loader.batches(start), start // self.loader.batch_size):
            if step == self.death:
                raise Killed
            if self.fault is not None:
                self.fault(step)
            with self.log.open("a") as file:
                file.write(json.dumps({"step": step, "keys": batch.keys}) + "\n")
            yield batch


def untimed(folder):
    """The rows of a run's metrics without what depends on the machine."""
    timed = {"train/samples_per_second", "train/tflops"}
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


def train(folder, keys, *, death=None, attempt=0, fault=None):
    """Train on as many ranks as there are, until the end or the death; return whether it died."""
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE
    trainer = build_trainer(parse_recipe("", keys), folder, ranks)
    folder.mkdir(exist_ok=True)
    log = folder / f"seen-{attempt}-{ranks.rank:02d}.jsonl"
    trainer.loader = Watched(trainer.loader, log, death, fault)
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


def surviving(attempts):
    """The keys of each step, of the last attempt that did it."""
    history = {}
    for steps in attempts:
        first = min(steps)
        history = {step: keys for step, keys in history.items() if step < first} | steps
    return history


def attempts(folder):
    """What each attempt has seen, in the order of their numbers."""
    numbers = {log.name.split("-")[1] for log in folder.glob("seen-*")}
    return [seen(folder, number) for number in sorted(numbers)]


def main(folder, keys):
    """Do one attempt under a launcher; attempts are numbered by when their first rank started."""
    timeout = parse_recipe("", keys).engine.timeout_seconds
    try:
        with joined(torch.device("cpu"), timeout_seconds=timeout) as ranks:
            (attempt, *_) = ranks.gather_objects(time.time_ns())
            train(folder, keys, attempt=attempt, fault=lambda step: time.sleep(0.2))
    except UniclError as error:
        sys.exit(f"rank {os.environ['RANK']}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
