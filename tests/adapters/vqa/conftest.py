"""Runs that several modules read; none of them changes their weights."""

from pathlib import Path

import pytest

from tests.adapters.vqa.roberta import write_roberta
from tests.adapters.vqa.runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, and runs: towers, pretraining, answers and captions."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a small RoBERTa."""
    return str(write_roberta(tmp_path_factory.mktemp("roberta")))
