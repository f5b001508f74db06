"""Every benchmark runs on its smallest sizes; what it finds there means nothing."""

import gc
import json
from pathlib import Path

import pytest

from benchmarks import NAMES, captions
from benchmarks.__main__ import _NOT_IN_ALL, main, question
from benchmarks.harness import ROOT


def run_quick(name: str, folder: Path, *options: str) -> dict:
    assert main([name, "--quick", "--out", str(folder), *options]) == 0
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["quick"] is True
    return record


def test_the_readme_says_what_all_leaves_out():
    readme = (ROOT / "benchmarks/README.md").read_text()
    of_all, below = readme.split("python -m benchmarks all ")[1].split("```")[0].split("\n", 1)
    named = [line.split()[3] for line in below.splitlines()]
    assert "all but those below" in of_all
    assert sorted(named) == sorted([*_NOT_IN_ALL, "table"])
    assert "inflation" in named


@pytest.mark.slow
def test_loss(tmp_path):
    record = run_quick("loss", tmp_path)
    assert len(record["bars"]) == 2
    assert record["facts"]["largest_gradient_difference"] < 1e-4
    (rows, _) = record["tables"].values()
    assert all(row["unicl_loss_mib"] < row["ClipLoss_mib"] for row in rows)


def test_text(tmp_path):
    record = run_quick("text", tmp_path)
    assert record["facts"]["largest_embedding_difference"] < 1e-5
    assert record["facts"]["largest_gradient_difference"] < 1e-4
    assert record["facts"]["tokens_of_the_longest_text"] < record["facts"]["context"]
    assert [bar["limit"] for bar in record["bars"]] == [3.0]


def test_coswin(tmp_path):
    record = run_quick("coswin", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [1.0, 1.0]
    facts = record["facts"]
    assert 1.04 < facts["coswin_tiny_gflops"] / facts["swin_tiny_patch4_window7_224_gflops"] < 1.07


def test_coswin3d(tmp_path):
    record = run_quick("coswin3d", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [0.9, 0.9, None, None]
    assert record["facts"]["time_windows"] == [2, 4, 8, 16]
    _, work = record["tables"].values()
    own, peer = work[:2]
    assert own["embedding_and_merging"] > peer["embedding_and_merging"] > 0
    assert 1.1 < own["all"] / peer["all"] < 1.3


def test_step(tmp_path):
    record = run_quick("step", tmp_path)
    own, peer = record["facts"]["fp32_first_losses"]
    assert own == pytest.approx(peer, abs=2e-3)
    assert record["facts"]["text_share_of_our_flops"] < 0.5


@pytest.mark.slow
def test_gradient_cache(tmp_path):
    record = run_quick("gradient_cache", tmp_path)
    assert len(record["bars"]) == 2
    memory, _ = record["tables"].values()
    assert [(row["batch"], row["chunk"]) for row in memory] == [
        (32, 32),
        (64, 32),
        (64, "uncached"),
    ]


@pytest.mark.slow
def test_distributed(tmp_path):
    record = run_quick("distributed", tmp_path)
    (curve,) = record["tables"].values()
    assert [row["batch"] for row in curve] == [512, 1024]
    assert all(row["extra_mib"] > 0 for row in curve)


@pytest.mark.slow
def test_zero_memory(tmp_path):
    record = run_quick("zero_memory", tmp_path)
    (rows,) = record["tables"].values()
    assert [row["engine"] for row in rows] == ["torch", "ZeRO 3"]
    assert all(row["measured"] > row["parameters"] > 0 for row in rows)


def test_cli(tmp_path):
    record = run_quick("cli", tmp_path)
    rows = {row["command"]: row["median"] for row in record["tables"]["Seconds of a process"]}
    assert rows["unicl --help"] > rows["python -c pass"] > 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loader(tmp_path):
    record = run_quick("loader", tmp_path)
    assert [bar["reached"] for bar in record["bars"]] == [None, None]
    (rows,) = record["tables"].values()
    assert [row["image_size"] for row in rows] == [224, 224, 48, 48]
    gc.collect()  # webdataset leaves its tar open until then


def test_clips(tmp_path):
    record = run_quick("clips", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [0.9, 0.9]
    (rows,) = record["tables"].values()
    assert all(row["clips_per_second"] > 0 for row in rows)


def test_retrieval(tmp_path):
    record = run_quick("retrieval", tmp_path)
    assert [bar["reached"] for bar in record["bars"]] == [True, True, True, None]
    _, found = record["tables"].values()
    ranks = [row["fp64"] for row in found if row["name"].endswith("_rank")]
    recalls = [row["fp64"] for row in found if not row["name"].endswith("_rank")]
    assert (len(ranks), len(recalls)) == (4, 6)
    assert 0.5 < min(recalls) <= max(recalls) <= 1 <= min(ranks)


def test_search(tmp_path):
    record = run_quick("search", tmp_path)
    (rows,) = record["tables"].values()
    assert len(rows) == 3
    assert all(row["recall_at_10"] > 0.8 and row["exact_ms"] > 0 for row in rows)
    assert [bar["limit"] for bar in record["bars"]] == [0.95, 10, None, 300]


def test_zero_shot(tmp_path):
    record = run_quick("zero_shot", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [5.0, 5.0]
    differences = [value for key, value in record["facts"].items() if "difference" in key]
    assert len(differences) == 2
    assert max(differences) < 1e-6


def test_linear_probe(tmp_path):
    record = run_quick("linear_probe", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [10.0, 0.2, 1.0]
    curve, others = record["tables"].values()
    assert all(abs(row["validation"] - row["scikit_learn"]) < 3 for row in curve)
    assert [row["features"] for row in others] == ["isotropic", "unit norm", "digits"]


@pytest.mark.slow
def test_question_answering_goes_on_where_it_stopped(tmp_path):
    runs = tmp_path / "runs"
    record = run_quick("question_answering", tmp_path, "--run", str(runs))
    assert len(record["bars"]) == 11
    by_type, by_steps = record["tables"].values()
    assert [row["start"] for row in by_type] == ["pretrained", "from nothing"]
    assert [row["step"] for row in by_steps] == [2]
    before = sorted(runs.glob("*/checkpoints/*/model.safetensors"))
    times = [path.stat().st_mtime_ns for path in before]
    assert run_quick("question_answering", tmp_path, "--run", str(runs))["bars"] == record["bars"]
    assert [path.stat().st_mtime_ns for path in before] == times


@pytest.mark.slow
def test_co_attention(tmp_path):
    record = run_quick("co_attention", tmp_path)
    assert [bar["limit"] for bar in record["bars"]] == [1.0, 1.0, 1.0, None]
    shares, memory = record["tables"].values()
    parts = ["image tower", "text encoder", "co-attention", "hidden words"]
    assert [row["part"] for row in shares] == parts
    assert [row["activations"] for row in memory] == ["kept", "checkpointing"]


def test_demo_reads_a_finished_run(tmp_path):
    run = tmp_path / "run"
    (run / "unicl").mkdir(parents=True)
    rows = [
        {"step": 10, "zero_shot/top1": 0.75, "zero_shot/top5": 0.92, "retrieval/i2t_r1": 0.5},
        {"step": 15, "train/samples_per_second": 900.0},
        {"step": 20, "zero_shot/top1": 0.71, "zero_shot/top5": 0.95, "retrieval/i2t_r1": 0.4},
    ]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "unicl" / "metrics.jsonl").write_text(metrics)
    (run / "report.html").write_text("<tr><td>Whole job</td><td>6.5 minutes</td></tr>")
    record = run_quick("demo", tmp_path, "--run", str(run))
    assert [(bar["measured"], bar["reached"]) for bar in record["bars"]] == [
        (6.5, True),
        (71.0, True),
        (95.0, True),
    ]
    assert record["facts"] == {
        "steps": 20,
        "median_samples_per_second": 900.0,
    }


def test_demo_refuses_an_unfinished_run(tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path)]) == 2
    assert "holds no finished demo" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["spead"]) == 2
    assert "no benchmark 'spead'; there are loss, text" in capsys.readouterr().err


def test_run_belongs_to_some(capsys, tmp_path):
    assert main(["loss", "--run", str(tmp_path)]) == 2
    assert "--run belongs to demo and question_answering" in capsys.readouterr().err


def test_the_list_asks_every_question(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    assert all(question(name).endswith("?") for name in NAMES)


def test_captions_are_short_differ_and_repeat_exactly():
    drawn = captions.draw_captions(64)
    assert drawn == captions.draw_captions(64)
    assert drawn != captions.draw_captions(64, seed=1)
    facts = captions.describe(captions.draw_tokens(64))
    assert 0.8 < facts["unique_texts"] / facts["texts"] <= 1
    assert facts["mean_tokens"] < facts["tokens_of_the_longest_text"] < 30
