"""The GPU benchmark on a CPU: its whole path on a tiny model; the figures mean nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, gpu_sides
from benchmarks.__main__ import _NOT_IN_ALL, main
from benchmarks.accelerator import Meter, fitting, peak_flops, take_turns, utilisation
from benchmarks.gpu_sides import COMPILED, PLAIN, Case, Own, Peer, nearest_depth
from benchmarks.harness import ROOT
from benchmarks.record import Result, load, save
from benchmarks.table import render

CPU = torch.device("cpu")
METER = Meter(CPU)
TINY = gpu.plan(True, CPU).subjects[0]
T, B, H = gpu.plan(False, torch.device("cuda")).subjects


@pytest.fixture(autouse=True)
def _no_gpu_and_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Types are checked by random samples in the test run, which cannot be traced.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


def out_of_memory_above(limit, calls=None):
    """Return what fails as a GPU does for batches above a limit."""

    def attempt(batch_size):
        if calls is not None:
            calls.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("injected")
        return batch_size

    return attempt


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out == "gpu: skipped: there is no GPU here\n"
    assert not (tmp_path / "results").exists()


def test_it_runs_only_when_asked_for(capsys):
    assert main([]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "gpu How fast does a training step run on a GPU" in listed
    assert listed.count("(not in all)") == len(_NOT_IN_ALL)


def check_record(path):
    record = json.loads(path.read_text())
    rows = record["tables"]["Steps"]
    cases = [(row["step"], row["case"]) for row in rows]
    own = [("unicl", case.name) for case in gpu.CASES]
    peer = [("open_clip", case.name) for case in gpu.PEER_CASES]
    assert sorted(cases) == sorted(own + peer)
    assert all(row["images_per_second"] > 0 and row["note"] == "" for row in rows)
    assert [bar["what"].partition(", ")[2] for bar in record["bars"]] == [
        "model-FLOP utilisation in bf16, fastest case",
        "model FLOP/s over open_clip's ViT of equal FLOPs, both eager",
        "model FLOP/s over open_clip's ViT of equal FLOPs, blocks compiled",
    ]
    fastest = max(
        (row for row in rows if row["step"] == "unicl"), key=lambda row: row["images_per_second"]
    )
    assert record["bars"][0]["measured"] == fastest["mfu_percent"]
    assert [row["loss"] for row in record["tables"]["Loss alone"]] == ["tiled", "dense"]
    (towers,) = record["tables"]["Towers"]
    assert towers["peer_image_gflops"] == pytest.approx(towers["image_gflops"], rel=0.05)


def test_the_whole_path_on_a_tiny_model(tmp_path, capsys):
    assert main(["gpu", "--quick", "--out", str(tmp_path)]) == 0
    check_record(tmp_path / "gpu.json")
    assert "CoSwin-nano, open_clip, plain" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_path_with_compiled_blocks(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    check_record(tmp_path / "gpu.json")


def test_what_was_measured_is_kept_when_the_rest_is_cut(monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    found = gpu.measure(quick=True, device=CPU)
    first = next(found)
    assert [bar.what.rpartition(", ")[2] for bar in first.bars] == ["fastest case", "both eager"]
    monkeypatch.setattr(gpu, "_try", cut)
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert not any(row["case"] == COMPILED.name for row in first.tables["Steps"])


def test_main_saves_each_part(tmp_path, monkeypatch, capsys):
    def parts(*, quick):
        yield Result(facts={"part": 1})
        assert json.loads((tmp_path / "gpu.json").read_text())["facts"] == {"part": 1}
        yield Result(facts={"part": 2})

    monkeypatch.setattr(gpu, "measure", parts)
    assert main(["gpu", "--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["facts"] == {"part": 2}
    assert "part: 2" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    calls = []
    assert fitting(METER, 48, out_of_memory_above(13, calls)) == (12, 12)
    assert calls == [48, 24, 12]
    assert fitting(METER, 4, out_of_memory_above(0)) is None


def test_the_row_says_that_memory_ran_out(monkeypatch):
    real = gpu_sides.own_step

    def step(task, backend, inputs, *, chunks):
        out_of_memory_above(2)(len(inputs.towers["image"]))
        return real(task, backend, inputs, chunks=chunks)

    monkeypatch.setattr(gpu_sides, "own_step", step)
    monkeypatch.setattr(gpu, "CASES", (PLAIN,))
    monkeypatch.setattr(gpu, "PEER_CASES", (PLAIN,))
    *_, result = gpu.measure(quick=True, device=CPU)
    own, peer = result.tables["Steps"]
    assert (own["micro_batch_size"], own["note"]) == (2, "out of memory at 4")
    assert (peer["micro_batch_size"], peer["note"]) == (4, "")
    assert own["images_per_second"] > 0


def test_a_model_that_does_not_fit_at_all_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu_sides, "own_step", out_of_memory_above(-1))
    monkeypatch.setattr(Own, "prepare", lambda *_: lambda: out_of_memory_above(0)(1))
    *_, result = gpu.measure(quick=True, device=CPU)
    assert "CoSwin-nano left out: its weights and moments" in capsys.readouterr().out
    assert not result.bars


class FailingSide:
    name = "unicl"
    subject = TINY

    def drop(self):
        pass

    def prepare(self, case, batch_size):
        raise RuntimeError("no compiler here")


class Clock:
    meter = METER

    def __init__(self, late=False):
        self.late = lambda: late


def test_a_compiler_that_fails_costs_only_its_own_case():
    found = gpu._try(FailingSide(), COMPILED, 0, Clock())
    assert found.note == "does not compile: RuntimeError"
    assert found.run is None
    with pytest.raises(RuntimeError, match="no compiler here"):
        gpu._try(FailingSide(), PLAIN, 0, Clock())


def test_what_comes_too_late_is_left_out(capsys):
    assert gpu._try(FailingSide(), PLAIN, 0, Clock(late=True)).note == "left out: no time left"
    plan = replace(gpu.plan(True, CPU), seconds=-1.0)
    (result,) = gpu.measure_plan(plan, METER)
    assert "CoSwin-nano left out: -1 seconds have passed" in capsys.readouterr().out
    assert [row["loss"] for row in result.tables["Loss alone"]] == ["tiled", "dense"]


def test_turns_alternate_and_leave_out_what_runs_out_of_memory():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(METER, runs, rounds=2, repeats=2)
    assert "".join(calls) == "aaabbb" + "bbbaaa"
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    runs["b"] = lambda: out_of_memory_above(0)(1)
    assert take_turns(METER, runs, rounds=2, repeats=1).keys() == {"a"}


def test_utilisation_counts_backward_twice():
    # 100 images of 10 GFLOPs in 10 ms are 300 TFLOP/s with backward, of 1,000.
    assert utilisation(100 * 10e9, 0.01, 1000e12) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("none, this is the CPU", None),
    ],
)
def test_the_peak_is_looked_up_by_the_device_name(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("subject", "gflops", "depth"), [(T, 9.473, 12), (B, 31.71, 11), (H, 175.0, 26)]
)
def test_the_peer_has_the_depth_of_nearly_equal_flops(subject, gflops, depth):
    assert nearest_depth(subject, gflops * 1e9) == depth


def test_the_text_tower_of_the_peer_is_as_wide():
    model = gpu_sides._open_clip_model(TINY, 1)
    assert len(model.transformer.resblocks[0].mlp.c_fc.bias) == TINY.text.mlp_width
    # What open_clip computes from a ratio must not round down.
    assert int(H.text.width * (H.text.mlp_width / H.text.width)) == 4864


def test_every_case_takes_the_same_step():
    losses = {}
    for case in gpu.CASES:
        side = Own(TINY, CPU, "eager")
        losses[case.name] = float(side.prepare(case, 4)())
    plain = losses[PLAIN.name]
    assert losses == {name: pytest.approx(plain, abs=5e-3) for name in losses}


def test_whole_texts_are_more_work_and_chunks_are_not():
    side = Own(TINY, CPU, "eager")
    plain = side.flops(PLAIN, 4)
    assert side.flops(Case("whole", text_economies=False), 4) > plain
    assert side.flops(Case("chunks", chunks=4), 4) <= plain
    assert plain > 4 * side.image_flops


class Block(torch.nn.Linear):
    pass


def test_only_compiled_cases_are_compiled_and_blocks_share_their_code(monkeypatch):
    monkeypatch.undo()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.nn.Sequential(Block(2, 2), torch.nn.ReLU(), Block(2, 2))
    gpu_sides.compile_blocks(model, compiler)
    with torch.no_grad(), gpu_sides._stance(PLAIN):
        model(torch.zeros(1, 2))
    assert not graphs
    with torch.no_grad(), gpu_sides._stance(COMPILED):
        model(torch.zeros(1, 2))
    assert len(graphs) == 1


def test_the_blocks_of_all_towers_are_compiled(monkeypatch):
    found = Counter()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: found.update([type(module).__name__])
    )
    own = Own(TINY, CPU, "eager")
    assert found == {"Block": 5, "_Block": 1}
    found.clear()
    peer = Peer(TINY, own.ready_images(), own.image_flops, "eager")
    assert found == {"ResidualAttentionBlock": peer.layers + 1}


def test_the_table_names_the_gpu(tmp_path):
    save("gpu", "?", Result(facts={"gpu": "NVIDIA H100"}), quick=False, folder=tmp_path)
    assert "gpu: NVIDIA H100; " in render(tmp_path)
    assert load(tmp_path / "gpu.json")[0]["facts"]["gpu"] == "NVIDIA H100"
