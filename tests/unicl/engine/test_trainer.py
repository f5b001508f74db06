"""A run is a function of its recipe: interrupted anywhere, it continues bit for bit."""

import contextlib
import dataclasses
import json
import os
import signal
from functools import partial

import pytest
import torch

from tests.unicl.engine.toy import ToyLoader, ToyModel, ToyTask
from tests.unicl.history import untimed
from unicl.config import OptimizerConfig, TrainerConfig
from unicl.distributed import ALONE
from unicl.engine.checkpoint import checkpoints
from unicl.engine.metrics import read_metrics
from unicl.engine.schedule import learning_rate
from unicl.engine.torch_backend import TorchBackend
from unicl.engine.trainer import Interrupted, Trainer
from unicl.errors import UniclError, UsageError


def make(folder, *, loader=None, evaluators=(), **config):
    settings = {
        "steps": 12,
        "batch_size": 8,
        "precision": "fp32",
        "log_every": 5,
        "save_every": 4,
        "keep_last": 2,
    }
    torch.manual_seed(0)
    task = ToyTask(ToyModel())
    config = TrainerConfig(**{**settings, **config})
    return Trainer(
        task,
        loader or ToyLoader(),
        folder,
        backend=lambda: TorchBackend(task, OptimizerConfig(), ALONE),
        config=config,
        learning_rate=partial(
            learning_rate, peak=1e-2, final=0.0, warmup_steps=3, total_steps=config.steps
        ),
        evaluators=evaluators,
    )


def assert_equal_runs(one, other):
    for (name, a), b in zip(
        one.task.model.state_dict().items(), other.task.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    moments = [run.backend.moments(run.backend.sizes) for run in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for name, value in moments[0].items():
        assert torch.equal(value, moments[1][name]), name
    assert one.updates == other.updates
    assert one.consumed == other.consumed
    assert untimed(one.folder) == untimed(other.folder)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer may catch it."""


class DyingLoader(ToyLoader):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batches(self, start: int = 0):
        for batch in super().batches(start):
            if batch.consumed > self.at * self.batch_size:
                raise Killed
            yield batch


@pytest.mark.parametrize("death", range(1, 12))
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_run_killed_at_any_step_continues_bit_for_bit(tmp_path, death, chunk):
    whole = make(tmp_path / "whole", chunk=chunk)
    whole.fit()
    dying = make(tmp_path / "cut", loader=DyingLoader(death), chunk=chunk)
    with pytest.raises(Killed):
        dying.fit()
    resumed = make(tmp_path / "cut", chunk=chunk)
    resumed.fit()
    assert_equal_runs(whole, resumed)


def test_training_learns(tmp_path):
    class OneBatch(ToyLoader):
        def batch(self, start):
            return (
                super()
                .batch(0)
                .__class__(**{**super().batch(0).__dict__, "consumed": start + self.batch_size})
            )

    trainer = make(tmp_path, loader=OneBatch(), steps=150, log_every=10)
    trainer.fit()
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, number):
    class Signalling(ToyLoader):
        def batches(self, start=0):
            for index, batch in enumerate(super().batches(start)):
                if index == 6:
                    os.kill(os.getpid(), number)
                yield batch

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name}: saved at step 6"):
        make(tmp_path / "cut", loader=Signalling()).fit()
    assert signal.getsignal(number) is before
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")][-1] == "step-00000006"
    resumed = make(tmp_path / "cut")
    resumed.fit()
    whole = make(tmp_path / "whole")
    whole.fit()
    assert_equal_runs(whole, resumed)


def test_what_the_steps_need_is_prepared_each_time_before_they_go_on(tmp_path):
    prepared = []
    for steps in (4, 8):
        trainer = make(tmp_path, steps=steps)
        trainer._prepare = prepared.append
        trainer.fit()
    assert prepared == [tmp_path, tmp_path]
    trainer.fit()
    assert len(prepared) == 2


def test_a_finished_run_is_not_trained_again(tmp_path):
    make(tmp_path).fit()
    before = untimed(tmp_path)
    events = list((tmp_path / "events").iterdir())
    again = make(tmp_path, loader=DyingLoader(0))
    assert again.fit().step == 12
    assert untimed(tmp_path) == before
    assert list((tmp_path / "events").iterdir()) == events


@pytest.mark.parametrize("death", [11, 99])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, death, caplog):
    """Bit for bit, also over the metrics and checkpoints of the steps that are done again."""
    whole = make(tmp_path / "whole")
    whole.fit()
    with contextlib.suppress(Killed):
        make(tmp_path / "hurt", loader=DyingLoader(death)).fit()
    newest = (
        checkpoints(tmp_path / "hurt" / "checkpoints")[-1] / "optimizer-00001-of-00001.safetensors"
    )
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    resumed = make(tmp_path / "hurt")
    resumed.fit()
    assert "set aside, going on from" in caplog.text
    assert_equal_runs(whole, resumed)


def test_keeps_the_newest_and_the_best(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.4, 0.5])
    make(
        tmp_path,
        steps=12,
        save_every=2,
        eval_every=2,
        keep_last=2,
        keep_best="toy/score",
        evaluators=[lambda model: {"toy/score": next(scores)}],
    ).fit()
    kept = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert kept == ["step-00000004", "step-00000010", "step-00000012"]


def test_an_unknown_best_metric_names_those_there_are(tmp_path):
    trainer = make(
        tmp_path, eval_every=1, keep_best="top1", evaluators=[lambda m: {"zero_shot/top1": 1.0}]
    )
    with pytest.raises(UsageError, match="zero_shot/top1"):
        trainer.fit()
    # The steps until here are not lost: with the right name the run goes on from them.
    evaluators = [lambda model: {"zero_shot/top1": 1.0}]
    again = make(tmp_path, eval_every=6, keep_best="zero_shot/top1", evaluators=evaluators)
    again.resume()
    assert again.step == 1
    assert again.fit().step == 12
    assert again.best == (1.0, 6)


def test_a_failed_evaluation_costs_no_steps(tmp_path):
    def fails(model):
        raise UniclError("no such names")

    with pytest.raises(UniclError, match="no such names"):
        make(tmp_path, save_every=100, evaluators=[fails]).fit()
    again = make(tmp_path, loader=DyingLoader(0), evaluators=[lambda model: {"toy/score": 0.5}])
    run = again.fit()
    assert (run.step, run.metrics) == (12, {"toy/score": 0.5})
    assert untimed(tmp_path)[-1] == {"step": 12, "toy/score": 0.5}


def test_skipped_samples_are_told(tmp_path, caplog):
    class Skipping(ToyLoader):
        def batch(self, start):
            return dataclasses.replace(super().batch(start), skipped={"undecodable image": 2})

    caplog.set_level("INFO", "unicl")
    make(tmp_path, loader=Skipping()).fit()
    assert caplog.messages[0].endswith(" left  skipped 10")
    assert "24 samples were skipped in training (undecodable image: 24)" in caplog.messages


def test_a_nonfinite_gradient_stops_the_run_and_names_the_samples(tmp_path):
    trainer = make(tmp_path, loader=ToyLoader(poison=6))
    with pytest.raises(
        UniclError, match=r"not finite at step 6 .*keys from 48 to 55.*step-00000004"
    ):
        trainer.fit()


def test_nonfinite_steps_can_be_skipped(tmp_path):
    trainer = make(tmp_path, loader=ToyLoader(poison=6), max_nonfinite=1)
    trainer.fit()
    assert trainer.nonfinite == 1
    assert all(torch.isfinite(p).all() for p in trainer.task.model.parameters())


def test_auto_precision_is_chosen_once_and_kept(tmp_path):
    first = make(tmp_path, precision="auto", steps=4)
    first.fit()
    assert first.precision in ("fp32", "bf16")
    state = json.loads((checkpoints(tmp_path / "checkpoints")[-1] / "state.json").read_text())
    assert state["precision"] == first.precision


def test_metrics_carry_what_a_person_watches(tmp_path):
    trainer = make(tmp_path, log_every=4)
    trainer.fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[0].keys() >= {
        "train/loss",
        "train/scale",
        "train/learning_rate",
        "train/grad_norm",
        "train/samples_per_second",
        "train/skipped",
        "train/weight_norm/left",
        "train/weight_norm/logit_scale",
    }
    assert "train/tflops" not in rows[0]
    weights = trainer.backend.weights()
    left = torch.cat([value.flatten() for name, value in weights.items() if name[:4] == "left"])
    assert rows[-1]["train/weight_norm/left"] == pytest.approx(float(left.norm()))


def test_the_speed_of_the_device_is_reported(tmp_path):
    trainer = make(tmp_path, log_every=4)
    trainer._flops = lambda inputs: 1e9 * len(inputs.towers["left"])
    trainer.fit()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        per_sample = 1e12 * row["train/tflops"] / row["train/samples_per_second"]
        assert per_sample == pytest.approx(1e9)
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))
