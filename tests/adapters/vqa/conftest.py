"""Runs that several modules read; none of them changes their weights."""

from pathlib import Path

import pytest

from tests.adapters.vqa.runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, and runs: towers, pretraining, answers and captions."""
    return write_runs(tmp_path_factory.mktemp("runs"))
