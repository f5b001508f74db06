"""The shape of the house: import direction, public names."""

import subprocess
import sys
from pathlib import Path

import unicl

ROOT = Path(__file__).parent.parent


def test_no_import_runs_up():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_public_names_are_sorted_and_exist():
    assert unicl.__all__ == sorted(unicl.__all__)
    for name in unicl.__all__:
        assert getattr(unicl, name) is not None
        assert name in dir(unicl)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(unicl, "uniclloss")
