"""The training loop: one task, one stream of batches, one backend; equal on every rank."""

import contextlib
import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import Progress

from unicl.config import TrainerConfig
from unicl.data.order import mix
from unicl.distributed import ALONE, Ranks
from unicl.engine.backend import Backend
from unicl.engine.checkpoint import (
    checkpoints,
    load_moments,
    load_state,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sweep,
)
from unicl.engine.gradient_cache import backward, num_chunks
from unicl.engine.interruption import Interruption, catch_interruption
from unicl.engine.metrics import (
    MetricsLog,
    RunningMeans,
    StepClock,
    append_row,
    log_evaluation,
    log_line,
    log_skipped,
    peak_teraflops,
)
from unicl.engine.precision import LossScale, autocast, faster_precision
from unicl.engine.task import Task, TaskInputs, num_rows
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

Evaluator = Callable[[Any], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """Where batches come from: any position of an endless, reproducible stream."""

    def batches(self, start: int = 0) -> Generator[Any, None, None]:
        """Yield batches from the stream position `start` on."""


class Interrupted(UniclError):
    """The run stopped because it was asked to; repeating the command continues it."""

    exit_code = 130


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its folder."""
    step: int
    """Steps it trained for."""
    metrics: dict[str, float]
    """Figures of its last evaluation."""


class Trainer:
    """Trains a task to its last step, from the newest checkpoint of the run's folder if there is.

    Args:
        task: what is trained; its model is on the device already, equal on all ranks.
        loader: this rank's part of the batches.
        folder: the run, the same folder for all ranks.
        backend: makes the backend, once the model has the weights to start from.
        config: length, batch, precision and what is written when.
        learning_rate: the rate of every step.
        evaluators: called with the model; they return figures by name, equal on all ranks.
        flops: counts the operations of a step on this rank, to report how well a device is used.
        prepare: makes what the steps need besides, in the run's folder; all ranks call it together.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        task: Task,
        loader: Batches,
        folder: Path,
        *,
        backend: Callable[[], Backend],
        config: TrainerConfig,
        learning_rate: Callable[[int], float],
        evaluators: Sequence[Evaluator] = (),
        flops: Callable[[TaskInputs], float] | None = None,
        prepare: Callable[[Path], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.task, self.loader, self.folder, self.config = task, loader, folder, config
        self.learning_rate, self.evaluators, self.ranks = learning_rate, evaluators, ranks
        self._make_backend, self._flops, self._prepare = backend, flops, prepare
        self.device = next(task.model.parameters()).device
        self.step = 0
        self.updates = 0
        self.consumed = 0
        self.skipped: Counter[str] = Counter()
        self.nonfinite = 0
        self.means = RunningMeans()
        self.evaluation: dict[str, float] = {}
        self.best: tuple[float, int] | None = None
        self.precision: str = config.precision
        self.loss_scale = LossScale()
        self.clock = StepClock()

    def fit(self) -> Run:
        """Train from wherever the run's folder stands to the last step.

        Raises:
            Interrupted: a rank got SIGTERM, SIGUSR1 or Ctrl-C; everything is saved.
            UniclError: non-finite gradients past the limit, unreadable data, a full disk.
        """
        self.resume()
        finished = self.step >= self.config.steps
        if finished and (self.evaluation or not self.evaluators):
            return self._run()
        if self._prepare is not None:
            self._prepare(self.folder)
        self.log = MetricsLog(self.folder, step=self.step, active=self.ranks.first)
        with (
            contextlib.closing(self.log),
            contextlib.closing(self.loader.batches(start=self.consumed)) as batches,
            catch_interruption() as interruption,
            self._progress() as advance,
        ):
            while self.step < self.config.steps:
                self.update(self.next_batch(batches, interruption))
                advance()
                if self._due(self.config.log_every):
                    self.report()
                improved = self._due(self.config.eval_every) and self.evaluate()
                if self._due(self.config.save_every) or improved:
                    self.save()
            if finished:  # but its evaluation had failed
                self.evaluate()
        log_skipped(self.skipped)
        return self._run()

    def next_batch(self, batches: Iterator[Any], interruption: Interruption) -> Any:
        """Return this rank's part of the next batch that has samples on any rank.

        Here the ranks agree whether to go on: what one of them cannot read ends the run on all.
        """
        while True:
            batch: Any = None
            error = None
            try:
                batch = next(batches)
            except Exception as caught:
                error = caught
            said = self.ranks.gather_numbers(
                error is not None,
                interruption.signal_number,
                len(batch.keys) if batch else 0,
                bool(batch and batch.skipped),
            )
            failed, signals, sizes, skipped = zip(*said, strict=True)
            if any(signals):
                self.interrupt(max(signals))
            if any(failed):
                with self._saved():
                    self.ranks.check(error)
            if any(skipped):
                for reasons in self.ranks.gather_objects(batch.skipped):
                    self.skipped.update(reasons)
            self.consumed = batch.consumed
            if any(sizes):
                self.clock.add(sum(sizes))
                return batch

    def update(self, batch: Any) -> None:
        """Do one step: forward, loss, backward, clip, optimizer."""
        inputs = self.task.inputs(batch)
        self.clock.add_flops(self._flops(inputs) if self._flops else 0.0)
        inputs = inputs.to(self.device)
        chunks = self._num_chunks(inputs)
        if self.precision == "auto":
            self._choose_precision(inputs, chunks)
        self.backend.encoder.precision = self.precision
        self.backend.loss_scale = self.loss_scale.value if self.precision == "fp16" else 1.0
        rate = self.learning_rate(self.step)
        # Stochastic depth is a function of (seed, step, rank): nothing random has to be saved.
        seed = mix(self.config.seed, self.step, self.ranks.rank)
        loss, metrics = backward(self.task, self.backend, inputs, chunks=chunks, seed=seed)
        norms = self.backend.gradient_norms()
        norm = math.hypot(*norms.values())
        # Read before the update is queued: the next batch is made ready while it runs.
        found = {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}
        if math.isfinite(found["loss"]) and math.isfinite(norm):
            self.backend.step(rate, norm=norm)
            self.updates += 1
            self.loss_scale.grow()
            norms = {f"grad_norm/{tower}": value for tower, value in norms.items()}
            self._note({"grad_norm": norm, "learning_rate": rate, **norms, **found})
        else:
            self.backend.drop()
            overflow = math.isfinite(found["loss"]) and self.precision == "fp16"
            if not (overflow and self.loss_scale.shrink()):
                self._count_nonfinite(batch, found["loss"], norms)
        self.step += 1

    def report(self) -> None:
        """Write the means since the last report."""
        peak = peak_teraflops(self.device, self.precision)
        speed, seconds_left = self.clock.read(self.config.steps - self.step, peak)
        norms = self.backend.weight_norms()
        row = {**self.means.pop(), **speed}
        row |= {f"train/weight_norm/{tower}": norm for tower, norm in norms.items()}
        row["train/skipped"] = float(self.skipped.total())
        if self.precision == "fp16":
            row["train/loss_scale"] = self.loss_scale.value
        self.log.write(self.step, row)
        if "train/loss" in row:
            log_line(self.step, self.config.steps, row, seconds_left)

    def evaluate(self) -> bool:
        """Run the evaluators, write what they found, and say whether it is the best so far."""
        if not self.evaluators:
            return False
        self.evaluation = {}
        with self._saved():
            self.evaluation = self._evaluated()
        self.log.write(self.step, self.evaluation)
        log_evaluation(self.step, self.config.steps, self.evaluation)
        name = self.config.keep_best
        if name is None:
            return False
        improved = self.best is None or self.evaluation[name] > self.best[0]
        if improved:
            self.best = (self.evaluation[name], self.step)
        return improved

    def interrupt(self, number: int) -> NoReturn:
        """Save and stop, because a signal asked for it."""
        self.save()
        error = Interrupted(
            f"{signal.Signals(number).name}: saved at step {self.step}; repeat the command to go on"
        )
        error.told = not self.ranks.first
        raise error

    def save(self) -> None:
        """Write a checkpoint, then remove those that are no longer wanted."""
        folder = self.folder / "checkpoints"
        state = {
            "consumed": self.consumed,
            "updates": self.updates,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "means": self.means.state(),
            "evaluation": self.evaluation,
            "keep_best": self.config.keep_best,
            "best": self.best,
            "precision": self.precision,
            "loss_scale": self.loss_scale.state(),
        }
        save_checkpoint(folder, self.step, self.backend, state)
        if self.ranks.first:
            keep = {self.best[1]} if self.best else set()
            prune_checkpoints(folder, keep_last=self.config.keep_last, keep=keep)

    def resume(self) -> None:
        """Make the backend, from the newest whole checkpoint of the run's folder if there is."""
        folder = self.folder / "checkpoints"
        self.ranks.on_first(lambda: sweep(folder))
        path = newest_checkpoint(folder, self.ranks)
        if path is None:
            self.backend = self._make_backend()
            return
        self.ranks.together(lambda: load_weights(path / "model.safetensors", self.task.model))
        self.backend = self._make_backend()
        state = self.ranks.together(lambda: load_state(path))
        self.ranks.together(lambda: load_moments(path, self.backend, updates=state["updates"]))
        self.step = state["step"]
        self.updates = state["updates"]
        self.consumed = state["consumed"]
        self.skipped = Counter(state["skipped"])
        self.nonfinite = state["nonfinite"]
        self.means = RunningMeans(**state["means"])
        self.evaluation = state["evaluation"]
        same_metric = state["keep_best"] == self.config.keep_best
        self.best = tuple(state["best"]) if state["best"] and same_metric else None
        self.precision = state["precision"]
        self.loss_scale = LossScale(**state["loss_scale"])
        if self.step < self.config.steps:
            logger.info("continuing %s from step %d", self.folder, self.step)

    def _evaluated(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with self.backend.whole_model() as model:
            for evaluator in self.evaluators:
                with torch.no_grad(), autocast(self.precision, self.device):
                    found.update(evaluator(model))
        name = self.config.keep_best
        if name is not None and name not in found:
            known = ", ".join(found)
            raise UsageError(f"trainer.keep_best is {name!r}; the evaluation gives {known}")
        return found

    def _run(self) -> Run:
        return Run(path=self.folder, step=self.step, metrics=self.evaluation)

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Save before what fails, on all ranks, ends the run: it must not cost the steps so far."""
        try:
            yield
        except Exception as reason:
            logger.warning("%s; saving at step %d", reason, self.step)
            self.save()
            raise

    def _note(self, values: Mapping[str, float]) -> None:
        self.means.add({f"train/{name}": value for name, value in values.items()})

    def _due(self, every: int | None) -> bool:
        last = self.step == self.config.steps
        return last or (every is not None and self.step % every == 0)

    def _num_chunks(self, inputs: TaskInputs) -> int:
        if self.config.chunk is None:
            return 1
        most = max(map(num_rows, inputs.towers.values()))
        return num_chunks(max(self.ranks.gather_numbers(most))[0], self.config.chunk)

    def _choose_precision(self, inputs: TaskInputs, chunks: int) -> None:
        def forward_backward(precision: str) -> None:
            self.backend.encoder.precision = precision
            backward(self.task, self.backend, inputs, chunks=chunks)
            self.backend.drop()

        if self.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bf16" if native else "fp16"
        elif self.ranks.size > 1:
            self.precision = "fp32"
        else:
            self.precision = faster_precision(forward_backward)
            logger.info("precision %s: the faster one on this CPU", self.precision)

    def _count_nonfinite(self, batch: Any, loss: float, norms: Mapping[str, float]) -> None:
        self.nonfinite += 1
        keys = [key for part in self.ranks.gather_objects(batch.keys) for key in part]
        path = self.folder / "nonfinite.jsonl"
        if self.ranks.first:
            append_row(path, {"step": self.step, "loss": loss, "norms": norms, "keys": keys})
        if self.nonfinite > self.config.max_nonfinite:
            saved = checkpoints(self.folder / "checkpoints")
            last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise UniclError(
                f"loss or gradient is not finite at step {self.step} (sample keys from "
                f"{keys[0]} to {keys[-1]}, all in {path}); {last}; try a lower "
                f"optimizer.learning_rate in another --out, or let trainer.max_nonfinite skip steps"
            )
        logger.warning("step %d skipped: loss or gradient is not finite", self.step)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """Show a bar where a person waits; a log file gets the log lines only."""
        console = Console(stderr=True)
        hidden = not console.is_terminal or not self.ranks.first
        with Progress(console=console, disable=hidden, transient=True) as bar:
            line = bar.add_task(self.folder.name, total=self.config.steps, completed=self.step)
            yield lambda: bar.advance(line)
