"""Runs that several modules read; none of them changes their weights."""

from pathlib import Path

import pytest

from tests.adapters.video.runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs image, texts, frames and head, and their corpus."""
    return write_runs(tmp_path_factory.mktemp("runs"))
