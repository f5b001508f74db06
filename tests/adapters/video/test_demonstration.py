"""The demonstration in seconds: the same path, fewer scenes, two steps."""

from adapters.video import demonstration
from tests.adapters.demonstrations import check_shown, check_starts

SMALL = {"_NUM_TRAIN": 12, "_NAMES": demonstration._NAMES[:8], "_SHOWN": 2}


def test_towers_are_compared_with_random_ones(runs, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(demonstration, name, value)
    comparison = demonstration.demonstrate(runs / "image", tmp_path, steps=2)
    check_starts(comparison, tmp_path, runs / "image")
    check_shown(comparison, "retrieval/t2i_r1", 2)
