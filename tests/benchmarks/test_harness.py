import time

import pytest

from benchmarks import harness
from benchmarks.harness import Memory, Timing, compare, peak_memory, ratio
from unicl.errors import UniclError

MIB = 1 << 20


def hold_and_touch(held: int, touched: int, dropped: int = 0):
    """A memory case: keeps `held` MiB as its input, then touches as much as it is told."""
    bytearray(dropped * MIB)
    inputs = b"\1" * (held * MIB)
    return lambda: (inputs[0], b"\1" * (touched * MIB))[0]


def fail():
    raise ValueError("no such luck")


def test_sides_take_turns_and_the_order_alternates():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = compare(sides, repeats=2, warm_up=1)
    assert "".join(calls) == "ba" + "ab" + "ba"
    assert {name: len(timing.wall) for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_a_round_measures_the_wall_clock_and_the_processor():
    def spin():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    timings = compare({"sleep": lambda: time.sleep(0.05), "spin": spin}, repeats=1)
    assert timings["sleep"].wall[0] >= 0.05 > timings["sleep"].cpu[0]
    assert timings["spin"].cpu[0] >= 0.05


def test_ratio_is_taken_round_by_round():
    # The machine was twice as slow in the second round: the ratio does not see it.
    slow, fast = Timing((2.0, 4.0, 2.2), ()), Timing((1.0, 2.0, 1.0), ())
    found = ratio(slow, fast)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.2)


def test_peak_memory_is_that_of_the_case_alone():
    case = "tests.benchmarks.test_harness:hold_and_touch"
    held = peak_memory(case, held=20, touched=50, dropped=200)
    assert 49 < held.extra < 60
    assert 69 < held.total < 85


def test_a_case_that_fails_is_named():
    with pytest.raises(UniclError, match=r"test_harness:fail failed .*no such luck"):
        peak_memory("tests.benchmarks.test_harness:fail")


def test_memory_adds_up():
    held = Memory(imports=100.0, ready=150.0, peak=180.0)
    assert (held.extra, held.total) == (30.0, 80.0)


def test_other_load_leaves_out_the_own_work(monkeypatch):
    readings = iter([(0.0, 0.0, 0.0), (10.0, 12.0, 9.0)])  # wall, machine, own
    monkeypatch.setattr(harness.OtherLoad, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 2)
    assert harness.OtherLoad().share() == pytest.approx(0.15)
