"""The training loop: one task, one loader, one device."""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from unicl.config import OptimizerConfig, ScheduleConfig, TrainerConfig
from unicl.engine.checkpoint import (
    checkpoints,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
)
from unicl.engine.gradient_cache import backward
from unicl.engine.interruption import catch_interruption
from unicl.engine.metrics import (
    MetricsLog,
    RunningMeans,
    StepClock,
    log_evaluation,
    log_line,
    log_skipped,
)
from unicl.engine.optimizer import build_optimizer
from unicl.engine.precision import autocast, faster_precision
from unicl.engine.schedule import learning_rate
from unicl.engine.task import Task
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
        task: what is trained; its model is on the device already.
        loader: the batches.
        folder: the run.
        config: length, batch, precision and what is written when.
        optimizer: the optimizer's configuration.
        schedule: the learning rate's.
        evaluators: called with the model; they return figures by name.
    """

    def __init__(
        self,
        task: Task,
        loader: Batches,
        folder: Path,
        *,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        self.task, self.loader, self.folder, self.config = task, loader, folder, config
        self.optimizer_config, self.schedule, self.evaluators = optimizer, schedule, evaluators
        self.device = next(task.model.parameters()).device
        self.optimizer = build_optimizer(task.model, optimizer)
        self.step = 0
        self.consumed = 0
        self.skipped: dict[str, int] = {}
        self.nonfinite = 0
        self.means = RunningMeans()
        self.evaluation: dict[str, float] = {}
        self.best: tuple[float, int] | None = None
        self.precision: str = config.precision
        self.clock = StepClock()

    def fit(self) -> Run:
        """Train from wherever the run's folder stands to the last step.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; everything is saved.
            UniclError: non-finite gradients past the limit, unreadable data, a full disk.
        """
        self.resume()
        finished = self.step >= self.config.steps
        if finished and (self.evaluation or not self.evaluators):
            return self._run()
        self.log = MetricsLog(self.folder, step=self.step)
        with (
            contextlib.closing(self.log),
            contextlib.closing(self.loader.batches(start=self.consumed)) as batches,
            catch_interruption() as interruption,
            self._progress() as advance,
        ):
            while self.step < self.config.steps:
                self.update(next(batches))
                advance()
                if self._due(self.config.log_every):
                    self.report()
                improved = self._due(self.config.eval_every) and self.evaluate()
                if self._due(self.config.save_every) or improved or interruption:
                    self.save()
                if interruption and self.step < self.config.steps:
                    raise Interrupted(
                        f"{interruption.signal_name}: saved at step {self.step}; "
                        f"repeat the command to go on"
                    )
            if finished:  # but its evaluation had failed
                self.evaluate()
        log_skipped(self.skipped)
        return self._run()

    def update(self, batch: Any) -> None:
        """Do one step: forward, loss, backward, clip, optimizer."""
        batch = batch.to(self.device)
        inputs = self.task.inputs(batch)
        if self.precision == "auto":
            self._choose_precision(inputs)
        # Stochastic depth is a function of (seed, step): nothing random has to be saved.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        rate = self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = backward(
            self.task, inputs, chunk=self.config.chunk, autocast=self._autocast(self.precision)
        )
        norm = nn.utils.clip_grad_norm_(
            self.task.model.parameters(), self.optimizer_config.clip_grad_norm or float("inf")
        )
        if torch.isfinite(loss) and torch.isfinite(norm):
            self.optimizer.step()
            self._note({"loss": loss, "grad_norm": norm, "learning_rate": rate, **metrics})
        else:
            self._count_nonfinite(batch)
        self.step += 1
        self.consumed = batch.consumed
        self.clock.add(len(batch.keys))
        for reason, count in batch.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count

    def report(self) -> None:
        """Write the means since the last report."""
        rate, seconds_left = self.clock.read(self.config.steps - self.step)
        row = {**self.means.pop(), "train/samples_per_second": rate}
        row["train/skipped"] = float(sum(self.skipped.values()))
        self.log.write(self.step, row)
        if "train/loss" in row:
            log_line(self.step, self.config.steps, row, seconds_left)

    def evaluate(self) -> bool:
        """Run the evaluators, write what they found, and say whether it is the best so far."""
        if not self.evaluators:
            return False
        self.evaluation = {}
        try:
            self.evaluation = self._evaluated()
        except UniclError:
            self.save()  # A mistake in the evaluation must not cost the steps until here.
            raise
        self.log.write(self.step, self.evaluation)
        log_evaluation(self.step, self.config.steps, self.evaluation)
        name = self.config.keep_best
        if name is None:
            return False
        improved = self.best is None or self.evaluation[name] > self.best[0]
        if improved:
            self.best = (self.evaluation[name], self.step)
        return improved

    def save(self) -> None:
        """Write a checkpoint, then remove those that are no longer wanted."""
        folder = self.folder / "checkpoints"
        state = {
            "consumed": self.consumed,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "means": self.means.state(),
            "evaluation": self.evaluation,
            "keep_best": self.config.keep_best,
            "best": self.best,
            "precision": self.precision,
        }
        save_checkpoint(
            folder, self.step, model=self.task.model, optimizer=self.optimizer, state=state
        )
        keep = {self.best[1]} if self.best else set()
        prune_checkpoints(folder, keep_last=self.config.keep_last, keep=keep)

    def resume(self) -> None:
        """Load the newest whole checkpoint of the run's folder, if there is one."""
        state = load_newest(
            self.folder / "checkpoints", model=self.task.model, optimizer=self.optimizer
        )
        if state is None:
            return
        self.step = state["step"]
        self.consumed = state["consumed"]
        self.skipped = state["skipped"]
        self.nonfinite = state["nonfinite"]
        self.means = RunningMeans(**state["means"])
        self.evaluation = state["evaluation"]
        same_metric = state["keep_best"] == self.config.keep_best
        self.best = tuple(state["best"]) if state["best"] and same_metric else None
        self.precision = state["precision"]
        if self.step < self.config.steps:
            logger.info("continuing %s from step %d", self.folder, self.step)

    def _evaluated(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for evaluator in self.evaluators:
            with torch.no_grad(), self._autocast(self.precision)():
                found.update(evaluator(self.task.model))
        name = self.config.keep_best
        if name is not None and name not in found:
            known = ", ".join(found)
            raise UsageError(f"trainer.keep_best is {name!r}; the evaluation gives {known}")
        return found

    def _run(self) -> Run:
        return Run(path=self.folder, step=self.step, metrics=self.evaluation)

    def _note(self, values: Mapping[str, float | Tensor]) -> None:
        self.means.add({f"train/{name}": value for name, value in values.items()})

    def _due(self, every: int | None) -> bool:
        last = self.step == self.config.steps
        return last or (every is not None and self.step % every == 0)

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self.step,
            peak=self.optimizer_config.learning_rate,
            final=self.schedule.final_learning_rate,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _autocast(self, precision: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
        return lambda: autocast(precision, self.device)

    def _choose_precision(self, inputs: Any) -> None:
        def forward_backward(precision: str) -> None:
            backward(self.task, inputs, chunk=self.config.chunk, autocast=self._autocast(precision))
            self.optimizer.zero_grad(set_to_none=True)

        self.precision = faster_precision(forward_backward)
        logger.info("precision %s: the faster one on this %s", self.precision, self.device.type)

    def _count_nonfinite(self, batch: Any) -> None:
        self.nonfinite += 1
        if self.nonfinite > self.config.max_nonfinite:
            saved = checkpoints(self.folder / "checkpoints")
            last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise UniclError(
                f"loss or gradient is not finite at step {self.step} (sample keys from "
                f"{batch.keys[0]} to {batch.keys[-1]}); {last}; try a lower "
                f"optimizer.learning_rate in another --out, or let trainer.max_nonfinite skip steps"
            )
        logger.warning("step %d skipped: loss or gradient is not finite", self.step)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """Show a bar where a person waits; a log file gets the log lines only."""
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            line = bar.add_task(self.folder.name, total=self.config.steps, completed=self.step)
            yield lambda: bar.advance(line)
