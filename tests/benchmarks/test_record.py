import json
import platform
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from benchmarks.record import Bar, Result, load, save


@pytest.mark.parametrize(
    ("better", "measured", "reached"),
    [
        ("at most", 0.79, True),
        ("at most", 0.8, True),
        ("at most", 0.81, False),
        ("at least", 0.79, False),
        ("at least", 0.8, True),
        ("at least", 0.81, True),
    ],
)
def test_a_bar_knows_its_right_side(better, measured, reached):
    assert Bar("x", measured, 0.8, "x", better).reached is reached


def test_a_result_survives_the_file(tmp_path):
    bar = Bar("speed", 1.23456, 1.0, "x", "at least", (1.1, 1.3))
    result = Result([bar], {"rows": [{"batch": 16, "seconds": 0.123456}]}, {"dim": 512})
    path = save("speed", "How fast?", result, quick=True, folder=tmp_path)
    record, bars = load(path)
    assert bars == [Bar("speed", 1.235, 1.0, "x", "at least", (1.1, 1.3))]
    assert record["tables"] == {"rows": [{"batch": 16, "seconds": 0.1235}]}
    assert record["bars"][0]["reached"] is True
    assert record["quick"] is True
    assert record["facts"] == {"dim": 512}


def test_a_record_says_where_it_was_made_but_not_whose_machine_it_was(tmp_path):
    path = save("speed", "How fast?", Result(), quick=False, folder=tmp_path)
    text = path.read_text()
    record = json.loads(text)
    assert record["machine"]["threads"] >= 1
    assert record["machine"]["cores"] >= 1
    assert record["versions"].keys() >= {"python", "torch", "timm", "open_clip_torch"}
    assert record["commit"]
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert platform.node() not in text
