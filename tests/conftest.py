"""The order in which two workers take the tests."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start each worker with half of the slow tests: at the end there are short ones to share.

    `--dist worksteal` gives each worker a run of neighbours first.
    """
    if not hasattr(config, "workerinput"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    half = (len(items) + 1) // 2 - len(slow[::2])
    items[:] = [*slow[::2], *fast[:half], *slow[1::2], *fast[half:]]
