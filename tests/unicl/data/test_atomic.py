from pathlib import Path

import pytest

from unicl.data.atomic import atomic_file
from unicl.errors import UsageError


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_place_without_a_name_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UsageError, match=r"cannot write .*; name a new place"),
        atomic_file(Path(place)),
    ):
        pass
    assert not list(tmp_path.iterdir())
