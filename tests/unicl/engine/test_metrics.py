"""Speed and utilisation of a device, as a report line says them."""

import pytest
import torch

from unicl.engine import metrics
from unicl.engine.metrics import StepClock, log_line, peak_teraflops


def test_speed_counts_from_the_last_reading(monkeypatch):
    times = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times, 17.0))
    clock = StepClock()
    clock._restart()  # at 12
    for _ in range(5):
        clock.add(100)
        clock.add_flops(40e12)
    speed, seconds_left = clock.read(20, peak=100.0)
    assert speed == {"train/samples_per_second": 100, "train/tflops": 40, "train/mfu": 0.4}
    assert seconds_left == 20
    assert clock.read(0)[0] == {"train/samples_per_second": 0}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312),
        ("NVIDIA A100-SXM4-40GB", "fp32", None),
        ("NVIDIA GeForce GT 710", "bf16", None),
    ],
)
def test_a_peak_is_known_or_none(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_teraflops(torch.device("cuda:0"), precision) == peak
    assert peak_teraflops(torch.device("cpu"), precision) is None


@pytest.mark.parametrize("mfu", [None, 0.4321])
def test_the_line_has_what_is_known(caplog, mfu):
    caplog.set_level("INFO", "unicl")
    names = ("loss", "learning_rate", "grad_norm", "samples_per_second")
    row = {f"train/{name}": 100.0 for name in names} | ({"train/mfu": mfu} if mfu else {})
    log_line(3, 10, row, 61.0)
    (line,) = caplog.messages
    expected = "100 samples/s  MFU 43.2%  0:01:01 left" if mfu else "100 samples/s  0:01:01 left"
    assert line.endswith(expected)


def test_the_line_has_what_the_task_gives(caplog):
    caplog.set_level("INFO", "unicl")
    names = ("loss", "learning_rate", "grad_norm", "samples_per_second")
    row = {f"train/{name}": 100.0 for name in names}
    log_line(3, 10, {**row, "train/top1": 0.4321}, 61.0)
    log_line(3, 10, {**row, "train/scale": 14.28}, 61.0)
    log_line(3, 10, row, 61.0)
    head, texts, neither = caplog.messages
    assert "top1  43.2%" in head
    assert "scale" not in head
    assert "scale  14.28" in texts
    assert "top1" not in texts
    assert "top1" not in neither
    assert "scale" not in neither
