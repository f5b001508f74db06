"""Runs that several modules read; none of them changes their weights."""

from pathlib import Path

import pytest

from tests.adapters.detection.runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the detectors texts, numbers and none, and their scenes."""
    return write_runs(tmp_path_factory.mktemp("detectors"))
