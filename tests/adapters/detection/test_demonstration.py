"""The demonstration in seconds: the same path, fewer scenes, two steps."""

from adapters.detection import demonstration
from tests.adapters.demonstrations import check_shown, check_starts

SMALL = {"_NUM_TRAIN": 8, "_NUM_VALID": 4, "_SHOWN": 2}


def test_towers_are_compared_with_random_ones(runs, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(demonstration, name, value)
    comparison = demonstration.demonstrate(runs / "towers", tmp_path, steps=1)
    check_starts(comparison, tmp_path, runs / "towers")
    check_shown(comparison, "detection/ap50", 2)
