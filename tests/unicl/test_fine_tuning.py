"""Fine-tuning by the pretraining's loss, on real digits and on captions."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unicl.corpus import small_recipe, write_corpus
from unicl.build import train
from unicl.config import parse_recipe
from unicl.data.image_sets import CaptionSet, ClassificationSet, open_image_set
from unicl.data.image_sets.images import PixelArray
from unicl.data.shards import ShardSet
from unicl.distributed import Launch, Ranks
from unicl.engine.metrics import read_metrics
from unicl.errors import UsageError
from unicl.evaluation.results import read_results
from unicl.evaluator import Options, evaluate
from unicl.fine_tuning import fine_tune, fine_tuning_recipe
from unicl.models import read_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned next to nothing, and a set with captions in two parts."""
    folder = tmp_path_factory.mktemp("place")
    for part, number in (("train", 36), ("test", 12)):
        write_corpus(folder / "set" / part, num_samples=number, seed=number)
    keys = {
        "embed_dim": "64",
        "image_tower.image_size": "32",
        "text_tower.width": "64",
        "trainer.steps": "1",
    }
    train(parse_recipe("", {**small_recipe(folder / "set" / "train"), **keys}), folder / "run")
    return folder


def options(out: Path, **changes: object) -> Options:
    return Options(out=out, device="cpu", num_workers=0, **changes)


QUICK = {"data.num_workers": "0", "trainer.precision": "fp32", "trainer.device": "cpu"}


@pytest.mark.slow
def test_a_short_training_names_real_digits(place: Path, tmp_path: Path) -> None:
    overrides = {
        **QUICK,
        "trainer.steps": "250",
        "trainer.batch_size": "64",
        "optimizer.learning_rate": "1e-3",
        "image_tower.drop_path_rate": "0",
    }
    result = fine_tune(place / "run", "digits", options(tmp_path), overrides)
    assert result.task == "fine_tune"
    assert result.metrics["top1"] >= 0.9
    (probe,) = evaluate(tmp_path / "run", "linear-probe", ["digits"], options(tmp_path / "probe"))
    assert probe.metrics["top1"] >= 0.95


def watch_together(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that gets what the ranks do together."""
    done: list[object] = []
    together = Ranks.together

    def watched(ranks: Ranks, work: Callable[[], object]) -> object:
        done.append(together(ranks, work))
        return done[-1]

    monkeypatch.setattr(Ranks, "together", watched)
    return done


def test_captions_are_fine_tuned_for_retrieval(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {**QUICK, "trainer.steps": "3"}
    result = fine_tune(place / "run", str(place / "set"), options(tmp_path), overrides)
    assert result.task == "retrieval_fine_tuned"
    figures = ("r1", "r5", "r10", "median_rank", "mean_rank")
    assert set(result.metrics) == {f"{side}_{name}" for side in ("i2t", "t2i") for name in figures}
    assert ShardSet.open(tmp_path / "data").num_samples == 36
    assert read_results(tmp_path / "run" / "evaluation") == [result]
    recipe = read_recipe(tmp_path / "run")
    assert recipe.trainer.batch_size == 36
    assert recipe.data.templates == "none"
    done_together = watch_together(monkeypatch)
    # The same command again finds all of it there.
    written = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    again = fine_tune(place / "run", str(place / "set"), options(tmp_path), overrides)
    assert again.metrics == result.metrics
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == written
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")
    (path,) = (tmp_path / "run" / "evaluation").iterdir()
    assert path in done_together, "a rank that cannot write must not leave others waiting"


def test_other_data_is_not_taken_for_the_same(place: Path, tmp_path: Path) -> None:
    overrides = {**QUICK, "trainer.steps": "2"}
    warmup = {"schedule.warmup_steps": "1"}
    fine_tune(place / "run", str(place / "set"), options(tmp_path), {**overrides, **warmup})
    with pytest.raises(UsageError, match="holds other images, classes or captions than digits"):
        fine_tune(place / "run", "digits", options(tmp_path), overrides)
    other = {**overrides, "trainer.steps": "6"}
    with pytest.raises(UsageError, match="for 2 steps of 36 samples, not 6 of 36; choose another"):
        fine_tune(place / "run", str(place / "set"), options(tmp_path), other)
    with pytest.raises(UsageError, match=r"holds a run with another schedule\.warmup_steps; "):
        fine_tune(place / "run", str(place / "set"), options(tmp_path), overrides)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_says_what_all_find(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    for name, value in Launch(rank, 2, rank, "localhost", 0).environment().items():
        monkeypatch.setenv(name, value)
    write_corpus(tmp_path / "set" / "val", num_samples=2)
    with pytest.raises(UsageError, match="has no split 'train'; it has val"):
        fine_tune("run", str(tmp_path / "set"), options(tmp_path))
    assert ("has no test part" in caplog.text) == (rank == 0)
    assert logging.getLogger("unicl").level == logging.INFO, "the caller's own level is back"


@pytest.mark.parametrize(
    ("num_images", "overrides", "batch_size", "steps", "warmup"),
    [
        (1_281_167, {}, 8192, 1564, 500),  # the paper's own number of steps
        (1_281_167, {"trainer.batch_size": "1024"}, 1024, 12512, 500),
        (1000, {}, 1000, 20, 6),
        (1000, {"trainer.steps": "7"}, 1000, 7, 2),
        (1000, {"schedule.warmup_steps": "9"}, 1000, 20, 9),
    ],
)
def test_epochs_become_steps(
    place: Path,
    num_images: int,
    overrides: dict[str, str],
    batch_size: int,
    steps: int,
    warmup: int,
) -> None:
    pixels = np.zeros((num_images, 1, 1), np.uint8)
    training = ClassificationSet(
        name="many",
        split="train",
        splits=("train",),
        images=PixelArray(pixels, "many"),
        class_names=("a", "b"),
        templates=("{}",),
        targets=np.zeros(num_images, np.int64),
        metric="top1",
    )
    recipe = fine_tuning_recipe(place / "run", training, Path("out"), overrides)
    assert recipe.trainer.batch_size == batch_size
    assert recipe.trainer.steps == steps
    assert recipe.schedule.warmup_steps == warmup
    assert recipe.image_tower.model == "coswin_nano"
    assert recipe.weights == str(place / "run")


def test_what_cannot_be_fine_tuned_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name a folder with --out"):
        fine_tune(place / "run", "digits", Options())
    with pytest.raises(UsageError, match="is one part"):
        fine_tune(place / "run", str(place / "set" / "test"), options(tmp_path))
    opened = open_image_set(str(place / "set"), split="train", root=Path())
    assert isinstance(opened, CaptionSet)
